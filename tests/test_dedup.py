"""Dedup: which chunks are stored, how they are gathered into blocks, and how what others have stored is adopted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from coffret.connectors.memory import MemoryConnector
from coffret.engine import dedup, sealing
from coffret.engine.attempt import list_index, update_mirror
from coffret.engine.chunkpool import Slab
from coffret.engine.dedup import Gatherer, dedup_stage
from coffret.engine.fetch import Fetcher
from coffret.engine.flow import Channel
from coffret.engine.index import IndexWriter, index_name
from coffret.engine.known import KnownChunks
from coffret.engine.messages import RawBlock, Run
from coffret.engine.mirror import Mirror
from coffret.engine.packfile import PackBuilder, pack_name
from coffret.engine.progress import Progress
from coffret.engine.records import (
    REF_BYTES,
    UNNAMED,
    Block,
    IndexObject,
    PackTable,
    decode_index,
    encode,
    iter_refs,
    pack_ref,
    refs_length,
)
from coffret.engine.sealing import RAW, Sealer, Secrets
from coffret.engine.snapshot import Commits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECRETS = Secrets(b"d" * 32, b"i" * 32, b"c" * 32)
SEALER = Sealer(SECRETS, b"r" * 32)
# Sizes as they are, divided by 8,192: a block has 128 bytes, a large chunk 64 or more.
BLOCK_BYTES, LARGE = 128, 64
ONE, TWO = b"1" * 16, b"2" * 16


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "BLOCK_BYTES", BLOCK_BYTES)
        patch.setattr(dedup, "_LARGE", LARGE)
        patch.setattr(dedup, "_NEARLY", BLOCK_BYTES * 3 // 4)
        yield


def ref(chunk: bytes) -> bytes:
    return pack_ref(blake3(chunk, key=SECRETS.id_key).digest(), len(chunk))


def chunk(number: int, length: int = 10) -> bytes:
    """Some bytes that no other number gives."""
    return blake3(b"%d" % number).digest(length=length)


@dataclass
class Slabs:
    """Slabs that are scribbled over when they go back to their worker, as a worker would."""

    lent: int = 0
    returned: list[int] = field(default_factory=list)

    def lend(self, content: bytes) -> Slab:
        memory, number = bytearray(content), self.lent
        self.lent += 1

        def free() -> None:
            memory[:] = b"\xee" * len(memory)
            self.returned.append(number)

        return Slab(memoryview(memory), free)


def run_of(chunks: Sequence[bytes], slabs: Slabs | None = None) -> Run:
    """Chunks in a slab, or, without slabs, in memory of their own."""
    joined, refs = b"".join(chunks), b"".join(map(ref, chunks))
    if slabs is None:
        return Run(joined, refs)
    slab = slabs.lend(joined + b"room for more")
    return Run(slab.view[: len(joined)], refs, slab)


def sealed(block: RawBlock) -> tuple[bytes, bytes]:
    """What a sealer makes of a block, which gives its slabs back."""
    result = b"".join(block.refs), b"".join(block.parts)
    assert len(result[1]) == block.raw_bytes == refs_length(result[0])
    block.release()
    return result


class TestGatherer:
    @given(
        st.lists(
            st.tuples(st.booleans(), st.lists(st.tuples(st.integers(1, 300) | st.integers(1, 30), st.booleans()))),
            max_size=8,
        )
    )
    def test_what_is_wanted_comes_out_once_and_whole(self, runs: list[tuple[bool, list[tuple[int, bool]]]]) -> None:
        """Whatever lies in which slab: blocks are sealed when all slabs have been taken that can be."""
        gatherer, slabs, number = Gatherer(meta=False), Slabs(), 0
        wanted, blocks = list[bytes](), list[RawBlock]()
        for in_slab, lengths in runs:
            chunks, fresh = [], []
            for length, new in lengths:
                chunks.append(chunk(number, length))
                fresh.append(new)
                number += 1
            run = run_of(chunks, slabs if in_slab else None)
            blocks += gatherer.add(run, fresh)
            if run.slab is not None:
                run.slab.release()
            wanted += [piece for piece, new in zip(chunks, fresh, strict=True) if new]
        # The last block holds nothing: only what was handed on can keep a slab from its worker.
        rest = gatherer.rest()
        assert all(not block.slabs for block in rest)
        got = []
        for block in blocks + rest:
            refs, data = sealed(block)
            at = 0
            for chunk_id, length in iter_refs(refs):
                piece = data[at : at + length]
                assert blake3(piece, key=SECRETS.id_key).digest() == chunk_id
                got.append(piece)
                at += length
            assert len(data) <= BLOCK_BYTES or len(refs) == REF_BYTES
        assert sorted(got) == sorted(wanted)
        assert sorted(slabs.returned) == list(range(slabs.lent))
        assert not gatherer.rest()

    def test_small_chunks_are_joined_up_to_a_block(self) -> None:
        gatherer = Gatherer(meta=True)
        blocks = gatherer.add(run_of([chunk(n, 50) for n in range(5)]), [True] * 5)
        assert [block.raw_bytes for block in blocks] == [100, 100]
        assert [block.raw_bytes for block in gatherer.rest()] == [50]
        assert all(block.meta for block in blocks)

    def test_a_large_chunk_is_a_block_of_its_own(self) -> None:
        gatherer = Gatherer(meta=False)
        blocks = gatherer.add(run_of([chunk(0), chunk(1, LARGE), chunk(2), chunk(3, 1000)]), [True] * 4)
        assert [block.raw_bytes for block in blocks] == [LARGE, 1000]
        assert [block.refs for block in gatherer.rest()] == [[ref(chunk(0)), ref(chunk(2))]]

    def test_neighbours_are_not_copied_or_split(self) -> None:
        """A block of a slab's own chunks points into the slab: sealing reads it from there."""
        gatherer, slabs = Gatherer(meta=False), Slabs()
        run = run_of([chunk(n, 20) for n in range(6)], slabs)
        assert isinstance(run.slab, Slab)
        [block] = gatherer.add(run, [True, True, True, False, True, True])
        assert [len(part) for part in block.parts] == [60, 40]
        assert all(part.obj is run.slab.view.obj for part in block.parts if isinstance(part, memoryview))
        assert block.slabs == [run.slab]
        run.slab.release()
        assert not slabs.returned
        block.release()
        assert slabs.returned == [0]

    def test_an_open_block_holds_no_slab(self) -> None:
        gatherer, slabs = Gatherer(meta=False), Slabs()
        run = run_of([chunk(0), chunk(1)], slabs)
        assert not gatherer.add(run, [True, False])
        assert run.slab is not None
        run.slab.release()
        assert slabs.returned == [0]
        [block] = gatherer.rest()
        assert sealed(block) == (ref(chunk(0)), chunk(0))

    def test_nothing_wanted(self) -> None:
        gatherer = Gatherer(meta=False)
        assert not gatherer.add(run_of([chunk(0), chunk(1, 500)]), [False, False])
        assert not gatherer.rest()


# What the repository has ----------------------------------------------------------------------------------------------


def pack(attempt: bytes, chunks: Sequence[bytes]) -> tuple[bytes, PackTable]:
    """A pack of one block, and its table."""
    builder = PackBuilder(memoryview(bytearray(1 << 16)), SEALER, attempt)
    raw, refs = b"".join(chunks), b"".join(map(ref, chunks))
    offset = builder.reserve(len(raw), len(raw), RAW, refs)
    assert offset is not None
    builder.seal(raw, offset)
    pack_id, length = builder.finish()
    return bytes(builder.buffer[:length]), PackTable(pack_id, builder.header, length, builder.blocks)


class Repository:
    """Packs and index objects in memory, and a mirror that follows them."""

    def __init__(self) -> None:
        self.connector = MemoryConnector()

    async def store(self, attempt: bytes, chunks: Sequence[bytes], number: int = 0) -> PackTable:
        """Put a pack, and an index object of an attempt that names it."""
        data, table = pack(attempt, chunks)
        await self.connector.put(pack_name(table.pack), [data])
        name = index_name(attempt, number)
        await self.connector.put(
            name, [SEALER.seal(sealing.INDEX, name, attempt, encode(IndexObject([table])))], if_absent=True
        )
        return table

    async def mirror(self, *, ended: Sequence[bytes] = (), revoked: Sequence[bytes] = ()) -> Mirror:
        """A new mirror of what is there, some of the attempts having ended."""
        mirror = await Mirror.open(None, "repository")
        listed = await list_index(self.connector)
        committed = frozenset(attempt.hex() for attempt in ended)
        commits = Commits([], committed, frozenset(attempt.hex() for attempt in revoked), [])
        assert not await update_mirror(self.connector, SEALER, mirror, listed, commits)
        return mirror


def refs(*numbers: int) -> bytes:
    return b"".join(ref(chunk(number)) for number in numbers)


@pytest.mark.anyio
class TestKnownChunks:
    async def test_the_first_to_ask_stores(self) -> None:
        async with await Repository().mirror() as mirror:
            known = KnownChunks(mirror, marked=frozenset())
            assert await known.claim(refs(1, 2, 1)) == [True, True, False]
            assert await known.claim(refs(3, 2, 1)) == [True, False, False]
            assert await known.claim(b"") == []

    async def test_what_is_stored_is_not_stored_again(self) -> None:
        repository = Repository()
        await repository.store(ONE, [chunk(1), chunk(2)])
        async with await repository.mirror(ended=[ONE]) as mirror:
            known = KnownChunks(mirror, marked=frozenset())
            assert await known.claim(refs(1, 3, 2, 3)) == [False, True, False, False]
            assert await known.claim(refs(1, 3)) == [False, False]
            assert not known.adopted

    async def test_several_may_ask_at_once(self) -> None:
        repository = Repository()
        await repository.store(ONE, [chunk(1)])
        async with await repository.mirror(ended=[ONE]) as mirror:
            known, answers = KnownChunks(mirror, marked=frozenset()), list[list[bool]]()

            async def ask() -> None:
                answers.append(await known.claim(refs(1, 2, 3)))

            async with anyio.create_task_group() as group:
                for _ in range(10):
                    group.start_soon(ask)
            assert [sum(column) for column in zip(*answers, strict=True)] == [0, 1, 1]

    async def test_what_only_marked_packs_hold_is_absent(self) -> None:
        repository = Repository()
        doomed = await repository.store(ONE, [chunk(1), chunk(2)])
        await repository.store(TWO, [chunk(2)])
        async with await repository.mirror(ended=[ONE, TWO]) as mirror:
            known = KnownChunks(mirror, marked=frozenset([doomed.pack]))
            assert await known.claim(refs(1, 2)) == [True, False]

    async def test_what_an_attempt_at_work_has_stored_is_adopted(self) -> None:
        repository = Repository()
        table = await repository.store(ONE, [chunk(1), chunk(2), chunk(3)])
        async with await repository.mirror() as mirror:
            known = KnownChunks(mirror, marked=frozenset())
            assert await known.claim(refs(2, 4)) == [False, True]
            assert [location.pack for location in known.adopted.values()] == [table.pack]
            assert list(known.adopted) == [ref(chunk(2))[:32]]

    async def test_what_a_committed_attempt_names_too_is_not(self) -> None:
        repository = Repository()
        await repository.store(ONE, [chunk(1)])
        await repository.store(TWO, [chunk(1)])
        async with await repository.mirror(ended=[TWO]) as mirror:
            known = KnownChunks(mirror, marked=frozenset())
            assert await known.claim(refs(1)) == [False]
            assert not known.adopted

    async def test_what_a_revoked_attempt_has_stored_is_absent(self) -> None:
        repository = Repository()
        await repository.store(ONE, [chunk(1)])
        async with await repository.mirror(revoked=[ONE]) as mirror:
            assert await KnownChunks(mirror, marked=frozenset()).claim(refs(1)) == [True]

    async def test_what_is_indexed_need_not_be_remembered(self) -> None:
        repository = Repository()
        async with await repository.mirror() as mirror:
            known = KnownChunks(mirror, marked=frozenset())
            index = IndexWriter(repository.connector, SEALER, TWO, mirror=mirror, known=known)
            assert await known.claim(refs(1, 2)) == [True, True]
            data, table = pack(TWO, [chunk(1)])
            await repository.connector.put(pack_name(table.pack), [data])
            await index.add(table)
            await index.flush()
            assert known._claimed == {ref(chunk(2))[:32]}
            assert await known.claim(refs(1, 2)) == [False, False]


@pytest.mark.anyio
class TestAdoption:
    async def test_the_adopters_index_is_enough(self) -> None:
        """Two chunks out of a block of five, by an index object that names those two alone."""
        repository, connector = Repository(), MemoryConnector()
        repository.connector = connector
        chunks = [chunk(number, 10 + number) for number in range(5)]
        table = await repository.store(ONE, chunks)
        async with await repository.mirror() as mirror:
            known = KnownChunks(mirror, marked=frozenset())
            asked = ref(chunks[3]) + ref(chunks[1])
            assert await known.claim(asked) == [False, False]
            await IndexWriter(connector, SEALER, TWO, mirror=mirror, known=known).flush()
        name = index_name(TWO, 0)
        [adopted] = decode_index(SEALER.open(sealing.INDEX, name, await connector.get(name))[1]).packs
        whole = table.blocks[0]
        named = pack_ref(UNNAMED, 10) + ref(chunks[1]) + pack_ref(UNNAMED, 12) + ref(chunks[3])
        assert adopted.blocks == [Block(whole.offset, whole.stored_bytes, whole.raw_bytes, whole.codec, named)]
        assert (adopted.pack, adopted.header, adopted.size_bytes) == (table.pack, table.header, table.size_bytes)
        await connector.delete(index_name(ONE, 0))
        async with await repository.mirror(ended=[TWO]) as mirror:
            fetcher = Fetcher(connector, SEALER, mirror, id_key=SECRETS.id_key)
            assert await fetcher.load([asked, ref(chunks[1])]) == [chunks[3] + chunks[1], chunks[1]]
            located = await mirror.locate([ref(piece)[:32] for piece in chunks] + [UNNAMED])
            assert [location is not None for location in located] == [False, True, False, True, False, False]

    async def test_an_adopted_location_can_be_adopted_again(self) -> None:
        repository = Repository()
        await repository.store(ONE, [chunk(1), chunk(2), chunk(3)])
        for attempt in (TWO, b"3" * 16):
            async with await repository.mirror() as mirror:
                known = KnownChunks(mirror, marked=frozenset())
                assert await known.claim(refs(2)) == [False]
                await IndexWriter(repository.connector, SEALER, attempt, mirror=mirror, known=known).flush()
            for old in (ONE, TWO)[: 1 if attempt == TWO else 2]:
                await repository.connector.delete(index_name(old, 0))
        async with await repository.mirror() as mirror:
            fetcher = Fetcher(repository.connector, SEALER, mirror, id_key=SECRETS.id_key)
            assert await fetcher.load([ref(chunk(2))]) == [chunk(2)]

    async def test_nothing_to_say_is_not_said(self) -> None:
        repository = Repository()
        async with await repository.mirror() as mirror:
            known = KnownChunks(mirror, marked=frozenset())
            await IndexWriter(repository.connector, SEALER, TWO, mirror=mirror, known=known).flush()
        assert not [info async for info in repository.connector.list("")]


@pytest.mark.anyio
class TestStage:
    async def test_known_chunks_are_dropped_and_slabs_go_back(self) -> None:
        repository, slabs, progress = Repository(), Slabs(), Progress()
        await repository.store(ONE, [chunk(n) for n in range(0, 40, 2)])
        inbox = Channel[Run]("in", max_items=2, max_bytes=1 << 20, size=lambda run: run.size_bytes)
        outbox = Channel[RawBlock]("out", max_items=100, max_bytes=1 << 20, size=lambda block: block.raw_bytes)
        inlet, outlet, got = inbox.sender(), outbox.sender(), list[bytes]()

        async def feed() -> None:
            with inlet:
                for first in range(0, 40, 5):
                    await inlet.send(run_of([chunk(n) for n in range(first, first + 5)], slabs))
                await inlet.send(run_of([chunk(0), chunk(2)], slabs))  # nothing of it is new
                page = Run(b"a page", ref(b"a page"), meta=True)
                await inlet.send(page)

        async with await repository.mirror(ended=[ONE]) as mirror, anyio.create_task_group() as group:
            known = KnownChunks(mirror, marked=frozenset())
            index = IndexWriter(repository.connector, SEALER, TWO, mirror=mirror, known=known)
            group.start_soon(feed)
            await dedup_stage(inbox, outlet, known=known, index=index, progress=progress)
            async for block in outbox:
                meta, (_, data) = block.meta, sealed(block)
                assert meta == (data == b"a page")
                got.append(data)
        assert b"".join(got) == b"".join(chunk(n) for n in range(1, 40, 2)) + b"a page"
        assert progress.added_bytes == 20 * 10 + 6
        assert sorted(slabs.returned) == list(range(9))
