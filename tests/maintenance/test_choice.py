"""Which packs are chosen, and which tables are put again: the pure parts."""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from coffret.connectors.base import ObjectInfo
from coffret.connectors.memory import MemoryConnector
from coffret.engine.index import covered
from coffret.engine.maintenance_choice import MAX_UNUSED, PackUse, choose
from coffret.engine.maintenance_dead import DEAD_AFTER_S, find_dead
from coffret.engine.maintenance_index import TableMerge
from coffret.engine.packfile import pack_name
from coffret.engine.packlist import PackList
from coffret.engine.records import UNNAMED, Block, PackTable, iter_refs, pack_ref

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PACK_BYTES = 32 << 20
SMALL = PACK_BYTES // 4
# However busy the machine is.
PATIENT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def uses(draw: st.DrawFn) -> list[PackUse]:
    found = []
    for number in range(draw(st.integers(0, 30))):
        size = draw(st.integers(1000, PACK_BYTES))
        live = draw(st.one_of(st.just(0), st.just(size), st.integers(0, size)))
        found.append(PackUse(number.to_bytes(32, "big"), size, live, draw(st.booleans())))
    return draw(st.permutations(found))


@PATIENT
@given(uses(), st.integers(1, 40))
def test_what_is_chosen(packs: list[PackUse], most: int) -> None:
    by_id = {use.pack: use for use in packs}
    chosen = choose(packs, PACK_BYTES, max_packs=most)
    assert len(chosen.packs) <= most
    assert all(by_id[pack].free for pack in chosen.packs)
    assert chosen.size_bytes == sum(by_id[pack].size_bytes for pack in chosen.packs)
    left = [use for use in packs if use.pack not in chosen.packs]
    if len(chosen.packs) < most:
        assert not any(use.free and not use.live_bytes for use in left)
        unused = sum(use.unused_bytes for use in left if use.free and use.live_bytes)
        live = sum(use.live_bytes for use in packs)
        assert unused <= MAX_UNUSED * live


@PATIENT
@given(uses())
def test_it_ends(packs: list[PackUse]) -> None:
    """When what was needed of the chosen packs lies in full packs, nothing more is chosen."""
    chosen = set(choose(packs, PACK_BYTES).packs)
    after = [use for use in packs if use.pack not in chosen]
    live = sum(use.live_bytes for use in packs if use.pack in chosen)
    for number in range(0, live, PACK_BYTES):
        size = min(PACK_BYTES, live - number)
        after.append(PackUse(b"new" + number.to_bytes(29, "big"), size, size, True))
    again = choose(after, PACK_BYTES)
    assert not any(pack.startswith(b"new") for pack in again.packs)


@st.composite
def tables(draw: st.DrawFn) -> list[PackTable]:
    """Whole tables of a few packs, and parts of them."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        pack = draw(st.integers(0, 3))
        blocks, at = [], 64
        for number in range(3):
            ids = [bytes([pack, number, inner]) + bytes(29) for inner in range(2)]
            kept = [draw(st.integers(0, 3)) > 0 for _ in ids]
            while kept and not kept[-1] and draw(st.booleans()):  # as what is adopted of a block is told
                kept.pop()
            refs = b"".join(pack_ref(each if keep else UNNAMED, 10) for each, keep in zip(ids, kept, strict=False))
            if refs and draw(st.integers(0, 3)) > 0:
                blocks.append(Block(at, 36, 20, 0, refs))
            at += 36
        found.append(PackTable(bytes([pack]) * 32, bytes(64), at + 100, blocks))
    return found


def named(found: list[PackTable]) -> set[tuple[bytes, int, bytes]]:
    return {
        (table.pack, block.offset, chunk_id)
        for table in found
        for block in table.blocks
        for chunk_id, _ in iter_refs(block.refs)
        if chunk_id != UNNAMED
    }


@PATIENT
@given(tables(), st.sets(st.integers(0, 3)))
def test_merging_says_all_that_was_said(found: list[PackTable], without: set[int]) -> None:
    gone = {bytes([pack]) * 32 for pack in without}
    merge = TableMerge(gone)
    put = [*merge.add(found), *merge.rest()]
    assert named(put) == named([table for table in found if table.pack not in gone])
    # Said twice it is put once.
    again = TableMerge(gone)
    assert named([*again.add(found + found), *again.rest()]) == named(put)
    whole = [table for table in put if len(table.blocks) == 3 and covered(table) == 64 + 3 * 36]
    assert len({table.pack for table in whole}) == len(whole)


def test_the_dead() -> None:
    ids = {name: name * 32 for name in "abcdef"}
    info = {
        name: ObjectInfo(f"leases/{ids[name]}", 1, mtime_s) for name, mtime_s in (("a", 0.0), ("b", 9000.0), ("c", 0.0))
    }
    leases = {ids[name]: found for name, found in info.items()}
    left = {ids["d"]: 0.0, ids["e"]: 9_900.0, ids["b"]: 0.0, ids["f"]: 0.0}
    dead = find_dead(leases, {ids["c"], ids["f"]}, left, now_s=10_000, grace_s=3600, own="")
    assert dead.bury == {ids["a"], ids["d"]}
    assert dead.drop == {ids["c"]}
    assert find_dead(leases, set(), {}, now_s=9000 + DEAD_AFTER_S, grace_s=0, own=ids["a"]).bury == {ids["c"]}


@settings(PATIENT, max_examples=30)
@given(st.integers(0, 600), st.integers(500, SMALL), st.floats(0, 1), st.randoms(use_true_random=False))
def test_how_often_a_byte_is_copied(count: int, least: int, often: float, rng: random.Random) -> None:
    """By the bound that `maintenance_choice` tells, for every byte; and so many small packs stay, no more."""
    most = 1 + math.log(SMALL / least, 4)
    packs: dict[PackUse, int] = {}  # how often what lies there was copied, at most
    number = itertools.count()

    def put(size: int, meta: bool, copied: int) -> None:
        packs[PackUse(next(number).to_bytes(32, "big"), size, size, True, meta)] = copied

    for _ in range(count):
        put(min(SMALL, int(least * (SMALL / least) ** rng.random() ** 3)), rng.random() < 0.3, 0)
        if rng.random() < often:
            continue  # no maintenance after this backup
        while chosen := set(choose(packs, PACK_BYTES).packs):
            gone = {use: packs.pop(use) for use in list(packs) if use.pack in chosen}
            for meta in (False, True):
                joined = {use: copied for use, copied in gone.items() if use.meta == meta}
                left = sum(use.size_bytes for use in joined)
                for at in range(0, left, PACK_BYTES):
                    put(min(PACK_BYTES, left - at), meta, 1 + max(joined.values()))
        assert max(packs.values()) <= most
        for meta in (False, True):
            stay = [use for use in packs if use.meta == meta and use.size_bytes < SMALL]
            assert len(stay) <= 16 + 8 * math.log10(SMALL / least)


class Listing(MemoryConnector):
    """A storage that lists these, and has nothing."""

    def __init__(self, infos: list[ObjectInfo]) -> None:
        super().__init__()
        self._infos = infos

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        for info in self._infos:
            yield info


@pytest.mark.anyio
async def test_packs_are_found_by_their_ids() -> None:
    """Also those that begin alike, and with what is no pack between them."""
    rng = random.Random(1)
    ids = [rng.randbytes(32) for _ in range(2000)] + [bytes(2) + rng.randbytes(30) for _ in range(50)]
    sizes = {pack: rng.randrange(1 << 40) for pack in ids}
    others = ["packs/aa/bb", f"packs/00/{'ff' * 32}", "packs/x"]
    infos = [ObjectInfo(pack_name(pack), size, size / 8) for pack, size in sizes.items()]
    listed = await PackList.listed(Listing([*infos, *(ObjectInfo(name, 1, 1.0) for name in others)]))
    assert [pack for pack, _, _ in listed] == sorted(ids)
    assert len(listed) == len(ids)
    for pack, size in sizes.items():
        assert listed[listed.number(pack)] == (pack, size, size / 8)
    assert {listed.number(rng.randbytes(32)) for _ in range(1000)} == {-1}
    assert PackList().number(ids[0]) == -1
    # What lies across two records is none.
    first, second = sorted(ids)[:2]
    near = PackList([first + bytes(16) + second + bytes(16), *[b""] * 4095])
    assert (near.number(second), near.number(bytes(2) + second[:30])) == (1, -1)
