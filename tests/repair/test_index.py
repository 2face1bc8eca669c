"""`repair index`: from packs alone, beside whatever else goes on."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from tests import fault_harness
from tests.attempts.storage import ONE_WORKER, restores
from tests.fault_harness import contents, make_source, objects, put_in_place
from tests.harness import Recorder
from tests.server import sealed
from tests.test_json import validate_all

from coffret.connectors.errors import ConnectionLost
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.trace import TraceConnector
from coffret.engine import sealing
from coffret.engine.errors import Damaged, reported
from coffret.engine.footers import read_footer
from coffret.engine.index import open_index
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.repair import IndexRepairOptions, repair_index
from coffret.engine.packfile import pack_name
from coffret.engine.records import Block, IndexObject, Mark, PackTable, encode, iter_refs, pack_ref

if TYPE_CHECKING:
    from pathlib import Path

    from tests.attempts.storage import Storage

    from coffret.connectors.base import Connector
    from coffret.engine.ops.repair import IndexRepairSummary

pytestmark = pytest.mark.anyio  # of what is asynchronous


async def repair(storage: Storage, connector: Connector | None = None, **options: bool) -> IndexRepairSummary:
    return await repair_index(await storage.open(connector), IndexRepairOptions(**options), Recorder())


async def two_backups(storage: Storage, source: Path) -> None:
    await (await storage.open()).backup([bytes(source)], ONE_WORKER)
    (source / "second").write_bytes(os.urandom(40_000))
    await (await storage.open()).backup([bytes(source)], ONE_WORKER)


async def lose(storage: Storage, prefix: str) -> None:
    for name in await storage.names(prefix):
        await storage.memory.delete(name)


async def tables(storage: Storage) -> dict[str, list[PackTable]]:
    sealer = (await storage.open()).sealer
    return {
        name: open_index(sealer, name, await storage.memory.get(name)).packs for name in await storage.names("index/")
    }


async def put_index(storage: Storage, tables: list[PackTable], attempt: bytes, outcome: str = "") -> str:
    """An index object of an attempt, and how that ended, if it did."""
    sealer, name = (await storage.open()).sealer, f"index/{attempt.hex()}-0"
    body = sealer.seal(sealing.INDEX, name, attempt, encode(IndexObject(tables)))
    await storage.memory.put(name, [body])
    if outcome:
        end = f"snapshots/{attempt.hex()}"
        body = sealer.seal(sealing.END, end, attempt, encode({"outcome": outcome, "time_ns": 1}))
        await storage.memory.put(end, [body])
    return name


async def mark(storage: Storage, packs: list[bytes]) -> None:
    body = (await storage.open()).sealer.seal(sealing.MARK, "trash/1", bytes(16), encode(Mark(b"".join(packs))))
    await storage.memory.put("trash/1", [body])


def test_after_losing_index_and_cache(tmp_path: Path) -> None:
    """The whole of both: everything restores, and check is clean."""
    run, source = fault_harness.create(tmp_path), make_source(tmp_path / "source", large_bytes=1 << 20)
    for number in range(3):
        (source / f"more{number}").write_bytes(os.urandom(20_000))
        run("backup", source, "--workers", "1")
    before = run("check", "--json").summary
    shutil.rmtree(run.repository / "index")
    shutil.rmtree(tmp_path / "cache")
    run("check", codes=(4,))
    run("restore", "latest", "--to", tmp_path / "lost", codes=(1, 3))
    tried = run("repair", "index", "--dry-run", "--json").summary
    assert (tried["packs_indexed"], tried["dry_run"]) == (before["packs"], True)
    run("check", codes=(4,))
    done = validate_all(run("repair", "index", "--json"), summary="summary of repair index")[-1]
    assert done["packs_indexed"] == done["packs"] == before["packs"]
    assert run("check", "--json").summary["files"] == before["files"]
    for number, snapshot in enumerate(run("ls", "--json").of_type("item")):
        target = tmp_path / f"target{number}"
        run("restore", str(snapshot["snapshot_id"]), "--to", target)
        assert len(contents(target)) == len(contents(source)) - 2 + number
    assert contents(target) == contents(source)
    # Nothing is done twice, and what a backup finds it does not store again.
    put = len(objects(run.repository, "index"))
    assert run("repair", "index").stdout.startswith("repair: indexed 0 of ")
    assert len(objects(run.repository, "index")) == put
    assert run("repair", "index", "--all", "--json").summary["packs_indexed"] == before["packs"]
    assert run("backup", source, "--workers", "1", "--json", "--force").summary["bytes_added"] < 100_000
    run("check")
    assert not objects(run.repository, "leases")


def test_a_damaged_index_object(tmp_path: Path) -> None:
    """It goes, once all is named again; not while there is a pack of which nothing else tells."""
    run, source = fault_harness.create(tmp_path, encrypted=False), make_source(tmp_path / "source", large_bytes=1 << 20)
    run("backup", source, "--workers", "1")
    [bad] = objects(run.repository, "index")
    pack = max(objects(run.repository, "packs"), key=lambda path: path.stat().st_size)
    data = pack.read_bytes()
    put_in_place(bad, bad.read_bytes()[:-1])
    put_in_place(pack, data[:-1])
    outcome = run("repair", "index", codes=(3,))
    assert f"repair: {pack.relative_to(run.repository)}: a pack has no valid trailer" in outcome.stderr
    assert outcome.stdout.endswith("; 1 pack can't be read\n")
    assert bad.exists()
    put_in_place(pack, data)
    done = run("repair", "index", "--json").summary
    assert done["dropped_objects"] == [str(bad.relative_to(run.repository))]
    assert not bad.exists()
    run("check")
    run("restore", "latest", "--to", tmp_path / "target")
    assert contents(tmp_path / "target") == contents(source)


def test_an_index_object_that_nobody_with_a_key_wrote(tmp_path: Path) -> None:
    """Whoever may add objects can put one, of an attempt of his own that never ends: maintenance waits for repair."""
    run, source = fault_harness.create(tmp_path, encrypted=False), make_source(tmp_path / "source", large_bytes=1 << 20)
    run("backup", source, "--workers", "1")
    name, body = sealed.index(sealed.attempt())
    (run.repository / name).write_bytes(body)
    assert "`coffret at REPO repair index`" in run("maintenance", codes=(1,)).stderr
    assert run("repair", "index", "--json").summary["dropped_objects"] == [name]
    run("maintenance")
    run("check")


async def test_only_ends_are_read(storage: Storage, source: Path) -> None:
    """Of each pack the header, and the last bytes, two kilobytes more than the table at most."""
    (source / "huge").write_bytes(os.urandom(6 << 20))
    await two_backups(storage, source)
    await lose(storage, "index/")
    sizes = [info.size_bytes async for info in storage.memory.list("packs/")]
    assert sum(sizes) > 6 << 20
    connector = TraceConnector(storage.memory)
    summary = await repair(storage, connector)
    assert summary.indexed == len(sizes)
    assert connector.calls["get"].size_bytes < 30_000
    assert await restores(storage, source)


async def test_what_is_named_in_part_is_named_whole(storage: Storage, source: Path) -> None:
    """An index object that adopted one chunk of a pack says nothing of the others."""
    await two_backups(storage, source)
    found = [table for each in (await tables(storage)).values() for table in each]
    await lose(storage, "index/")
    part = []
    for table in found:
        block = table.blocks[-1]
        (_, length), *rest = iter_refs(block.refs)
        refs = pack_ref(bytes(32), length) + b"".join(pack_ref(*ref) for ref in rest)
        part.append(PackTable(table.pack, table.header, table.size_bytes, [*table.blocks[:-1], block]))
        part[-1].blocks[-1] = Block(block.offset, block.stored_bytes, block.raw_bytes, block.codec, refs)
    # The first without its last block, the others without a name for one chunk.
    part[0].blocks.pop()
    await put_index(storage, part, os.urandom(16), "maintained")
    assert (await repair(storage)).indexed == len(found)
    assert await restores(storage, source)
    assert (await repair(storage)).indexed == 0


@pytest.mark.parametrize("exclusive", [False, True])
async def test_marked_packs_are_left_alone(storage: Storage, source: Path, exclusive: bool) -> None:
    """Unless somebody vouches that nobody sweeps them now."""
    await two_backups(storage, source)
    packs = [table.pack for each in (await tables(storage)).values() for table in each]
    await lose(storage, "index/")
    await mark(storage, packs[:2])
    summary = await repair(storage, exclusive=exclusive)
    assert (summary.left, summary.indexed) == ((0, len(packs)) if exclusive else (2, len(packs) - 2))
    named = {table.pack for each in (await tables(storage)).values() for table in each}
    assert named == set(packs if exclusive else packs[2:])
    assert await restores(storage, source) == exclusive


async def test_a_mark_that_can_t_be_read(storage: Storage, source: Path) -> None:
    await two_backups(storage, source)
    await storage.memory.put("trash/1", [b"x" * 100])
    with pytest.raises(Exception) as raised:
        await repair(storage)
    assert isinstance(reported(raised.value), Damaged)
    assert await storage.names("leases/") == []


@pytest.mark.parametrize("outcome", ["", "revoked"])
async def test_packs_of_attempts_that_did_not_end_well(storage: Storage, source: Path, outcome: str) -> None:
    """What they say may become void at any time: their packs are named by an index object that stays."""
    await two_backups(storage, source)
    found = [table for each in (await tables(storage)).values() for table in each]
    await lose(storage, "index/")
    other = os.urandom(16)
    await put_index(storage, found, other, outcome)
    assert (await repair(storage)).indexed == len(found)
    if not outcome:
        await storage.revoke(other.hex())
    assert await restores(storage, source)


async def test_an_attempt_that_is_ended_tries_again(storage: Storage, source: Path) -> None:
    await two_backups(storage, source)
    await lose(storage, "index/")
    revoked: list[str] = []

    async def revoke(method: str, name: str) -> None:
        if method == "put" and name.startswith("snapshots/") and not revoked:
            revoked.append(name)
            await storage.revoke(name.partition("/")[2])

    await repair(storage, FaultyConnector(storage.memory, before=revoke))
    assert revoked
    assert await restores(storage, source)
    assert await storage.names("leases/") == []


@pytest.mark.parametrize("when", ["before", "after"])
async def test_stopped_at_each_change(
    storage: Storage, source: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call fails, or its answer is lost: what was there stays, and another run does the rest."""
    monkeypatch.setattr("coffret.engine.index.INDEX_EVERY_CHUNKS", 20)
    await two_backups(storage, source)
    [first, _] = await storage.names("index/")
    await storage.memory.put(first, [b"damaged"])
    before = {name: await storage.memory.get(name) for name in await storage.names("")}
    number, changes = 0, 1
    while number < changes:
        await lose(storage, "")
        for name, body in before.items():
            await storage.memory.put(name, [body])
        counted = 0

        async def stop(method: str, name: str, number: int = number) -> None:
            nonlocal counted
            if method in ("put", "delete"):
                counted += 1
                if counted > number:  # and the storage stays away
                    raise ConnectionLost("gone")

        options: dict[str, Any] = {when: stop}
        try:
            await repair(storage, FaultyConnector(storage.memory, **options))
        except (ConnectionLost, ExceptionGroup):
            changes = number + 2
        kept = {name for name in before if not name.startswith(("index/", "leases/"))}
        assert kept <= set(await storage.names(""))
        await repair(storage)
        checked = await (await storage.open()).check(options=CheckOptions(fast=True))
        assert set(checked.damaged_objects) <= {first} and not checked.damaged_files
        number += 1
    assert number > 4
    assert await restores(storage, source)


async def test_impossible_packs(storage: Storage, source: Path) -> None:
    """Each is named, and costs the others nothing."""
    await two_backups(storage, source)
    names = await storage.names("packs/")
    data = await storage.memory.get(names[0])
    await lose(storage, "index/")
    bad = {
        pack_name(bytes([1]) * 32): b"",
        pack_name(bytes([2]) * 32): data[:70],
        pack_name(bytes([3]) * 32): data[:-20] + (1 << 29).to_bytes(4, "little") + data[-16:],
        pack_name(bytes([4]) * 32): data[:-16] + (1 << 29).to_bytes(4, "little") + data[-12:],
        pack_name(bytes([5]) * 32): bytes(len(data)),
        "packs/ab/odd": data,
    }
    for name, body in bad.items():
        await storage.memory.put(name, [body])
    summary = await repair(storage)
    assert sorted(summary.damaged_packs) == sorted(bad)
    assert summary.indexed == len(names)
    assert await restores(storage, source)
    sealer = (await storage.open()).sealer
    for name, body in bad.items():
        if name != "packs/ab/odd":
            with pytest.raises(Damaged, match=name):
                await read_footer(storage.memory, sealer, name, len(body))
