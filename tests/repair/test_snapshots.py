"""`repair snapshots`: what is whole is kept, what is lost is named, and nothing that was there goes."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from tests import fault_harness
from tests.attempts.storage import ONE_WORKER
from tests.fault_harness import contents, make_source, objects, put_in_place
from tests.harness import Recorder, repository
from tests.restore.case import ALL, MIB, Case, case, chunks, flip, flip_bit
from tests.test_json import validate_all

from coffret.connectors.errors import ConnectionLost
from coffret.connectors.faults import FaultyConnector
from coffret.engine import check_packs, sealing
from coffret.engine.catalog_reader import Catalog
from coffret.engine.errors import ChunkMissing
from coffret.engine.fetch import Fetcher
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.repair import SnapshotRepairOptions, repair_snapshots
from coffret.engine.records import Mark, encode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.attempts.storage import Storage

    from coffret.engine.ops.repair import SnapshotRepairSummary
    from coffret.engine.records import SourceFault
    from coffret.engine.snapshot import Snapshot

pytestmark = pytest.mark.anyio
FAST = SnapshotRepairOptions(fast=True)


@pytest.fixture(autouse=True)
def _one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_packs, "OPEN_WORKERS", 1)


async def repaired(c: Case, options: SnapshotRepairOptions | None = None) -> tuple[Snapshot, list[SourceFault]]:
    """Repair the one damaged snapshot of a case; (what came of it, its faults)."""
    summary = await repair_snapshots(c.opened, None, options or SnapshotRepairOptions(), Recorder())
    assert [found.id for found in summary.damaged] == [c.snapshot.id]
    [made] = summary.repaired
    assert made.damaged.id == c.snapshot.id
    faults = await c.opened.faults(made.snapshot)
    assert made.lost == len(faults) == made.snapshot.header.counts.errors
    return made.snapshot, faults


def below(c: Case, faults: Sequence[SourceFault]) -> set[str]:
    return {os.fsdecode(fault.path).removeprefix(f"{c.source}/") for fault in faults}


async def is_clean(c: Case, snapshot: Snapshot) -> bool:
    return not (await c.opened.check([(snapshot, None)], CheckOptions(), Recorder())).damaged_snapshots


@pytest.mark.parametrize("how", ["damaged", "missing"])
async def test_files_that_are_lost(place: Path, how: str) -> None:
    """The others are in a new snapshot, which needs nothing of the damaged pack: it can go."""
    async with case(place) as c:
        located = await chunks(c)
        bad = located["large"][2]
        if how == "damaged":
            flip(c, bad)
            costs = {
                name
                for name, found in located.items()
                if any((at.pack, at.offset) == (bad.pack, bad.offset) for at in found)
            }
        else:
            c.file_of(bad.pack).unlink()
            costs = {name for name, found in located.items() if any(at.pack == bad.pack for at in found)}
        made, faults = await repaired(c, FAST if how == "missing" else None)
        assert below(c, faults) == costs
        assert all(fault.reason.startswith("lost: a chunk lies in ") for fault in faults)
        old, new = c.snapshot.header, made.header
        assert (new.parent, new.time_ns, new.host, new.roots) == (
            old.snapshot_id, old.time_ns + 1, old.host, old.roots,
        )  # fmt: skip
        assert new.counts.files == old.counts.files - len(costs)
        assert new.counts.directories == old.counts.directories
        # The damaged one stays, and the new one is the latest.
        assert [found.id for found in (await c.opened.commits()).snapshots] == [c.snapshot.id, made.id]
        assert (await c.opened.find_snapshot("latest")).id == made.id
        again = await repair_snapshots(c.opened, None, SnapshotRepairOptions(), Recorder())
        assert (len(again.damaged), again.repaired) == (1, [])
        c.file_of(bad.pack).unlink(missing_ok=True)
    async with repository(place) as opened:
        c.opened, c.snapshot = opened, made
        assert await is_clean(c, made)
        assert await c.restore() == {}
        assert c.restored() == ALL - costs
        # The next backup stores what is lost; one that does not know of a pack that is gone has to be told.
        options = replace(ONE_WORKER, force=how == "damaged")
        summary = await opened.backup([os.fsencode(c.source)], options)
        assert summary.snapshot.header.parent == (b"" if options.force else made.header.snapshot_id)
        assert summary.counts.files == new.counts.files + len(costs)
        await opened.commits()
        assert await is_clean(c, summary.snapshot)


async def test_nothing_to_repair(place: Path) -> None:
    async with case(place) as c:
        before = {path: path.read_bytes() for path in (place / "repository").rglob("*") if path.is_file()}
        summary = await repair_snapshots(c.opened, None, SnapshotRepairOptions(), Recorder())
        assert (summary.snapshots, summary.damaged, summary.repaired) == (1, [], [])
        assert before == {path: path.read_bytes() for path in (place / "repository").rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [0, 1, -1])
async def test_a_page_that_is_lost(place: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Directories whose entries were in it are there, as far as something in them is."""
    for each in range(2400):
        path = place / "source" / f"{each % 6}" / f"name{each}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    async with repository(place) as opened:
        c = Case(opened, place)
        await c.back_up()
        header, load = c.snapshot.header, opened.fetcher().load
        pages: dict[bytes, dict[bytes, int]] = {}
        async for page, sections in Catalog(header.catalog, header.depth, load).pages():
            pages[page.ref] = {(s.directory + b"/" + e.name).strip(b"/"): e.mode for s in sections for e in s.entries}
        assert len(pages) > 3
        bad = list(pages)[number]
        real = Fetcher.load

        async def failing(self: Fetcher, refs: Sequence[bytes]) -> list[bytes]:
            if bad in refs:
                raise ChunkMissing("damaged")
            return await real(self, refs)

        with monkeypatch.context() as patch:
            patch.setattr(Fetcher, "load", failing)
            made, faults = await repaired(c, FAST)
        left = {name: mode for ref, found in pages.items() if ref != bad for name, mode in found.items()}
        needed = {b"/".join(name.split(b"/")[:depth]) for name in left for depth in range(name.count(b"/") + 1)}
        stand_ins = (needed | {b""}) - left.keys()
        found: dict[bytes, int] = {}
        async for directory, entries in opened.entries(made, b"", recursive=True):
            found |= {(directory + b"/" + entry.name).strip(b"/"): entry.mode for entry in entries}
        assert found.keys() == left.keys() | stand_ins
        assert all(found[name] == mode for name, mode in left.items())
        assert all(found[name] == stat.S_IFDIR | 0o700 for name in stand_ins)
        lost = len(pages[bad])
        reasons = [fault.reason for fault in faults]
        assert sum(f"lost: {lost} entries from " in reason for reason in reasons) == 1
        assert len(faults) == 1 + len(stand_ins)
        assert stand_ins or number  # of the first page directories are lost; of others perhaps
        assert made.header.counts.files + sum(map(stat.S_ISREG, pages[bad].values())) == header.counts.files
        assert await is_clean(c, made)


async def test_attributes_that_are_lost(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is kept without them."""
    (place / "source").mkdir()
    (place / "source" / "file").write_bytes(b"content")
    try:
        os.setxattr(place / "source" / "file", "user.large", os.urandom(2000))
    except OSError:
        pytest.skip("this file system has no extended attributes")
    async with repository(place) as opened:
        c = Case(opened, place)
        await c.back_up()
        [entry] = [
            entry
            async for _, entries in opened.entries(c.snapshot, os.fsencode(c.source)[1:], recursive=True)
            for entry in entries
            if entry.name == b"file"
        ]
        assert entry.extra is not None and entry.extra.xattrs_ref
        bad, real = entry.extra.xattrs_ref, Fetcher.load

        async def failing(self: Fetcher, refs: Sequence[bytes]) -> list[bytes]:
            if bad in refs:
                raise ChunkMissing("damaged")
            return await real(self, refs)

        with monkeypatch.context() as patch:
            patch.setattr(Fetcher, "load", failing)
            c.snapshot, faults = await repaired(c, FAST)
        assert below(c, faults) == {"file"}
        assert await c.restore() == {}
        assert (c.target / "file").read_bytes() == b"content"
        assert os.listxattr(c.target / "file") == []


async def damaged_storage(storage: Storage, source: Path) -> str:
    """A repository in memory one pack of which is damaged in its first block; returns that pack's name."""
    (source / "other").write_bytes(os.urandom(3 * MIB))
    await (await storage.open()).backup([bytes(source)], ONE_WORKER)
    sizes = {info.size_bytes: info.name async for info in storage.memory.list("packs/")}
    name = sizes[max(sizes)]
    body = bytearray(await storage.memory.get(name))
    body[100] ^= 1
    await storage.memory.put(name, [body])
    return name


async def repair(storage: Storage, connector: Any = None) -> SnapshotRepairSummary:
    opened = await storage.open(connector)
    await opened.commits()
    return await repair_snapshots(opened, None, SnapshotRepairOptions(), Recorder())


async def test_marked_packs_are_not_relied_on(storage: Storage, source: Path) -> None:
    """What is to be swept is stored again: the sweep need not wait for a repair that begins now."""
    await damaged_storage(storage, source)
    packs = [bytes.fromhex(name.rpartition("/")[2]) for name in await storage.names("packs/")]
    body = (await storage.open()).sealer.seal(sealing.MARK, "trash/1", bytes(16), encode(Mark(b"".join(packs))))
    await storage.memory.put("trash/1", [body])
    [made] = (await repair(storage)).repaired
    assert made.lost
    for pack in packs:
        await storage.memory.delete(f"packs/{pack.hex()[:2]}/{pack.hex()}")
    summary = await (await storage.open()).check([(made.snapshot, None)])
    assert summary.files and not summary.damaged_snapshots


async def test_an_attempt_that_is_ended_tries_again(storage: Storage, source: Path) -> None:
    await damaged_storage(storage, source)
    revoked: list[str] = []

    async def revoke(method: str, name: str) -> None:
        if method == "put" and name.startswith("snapshots/") and not revoked:
            revoked.append(name)
            await storage.revoke(name.partition("/")[2])

    [made] = (await repair(storage, FaultyConnector(storage.memory, before=revoke))).repaired
    assert revoked
    assert not (await (await storage.open()).check([(made.snapshot, None)])).damaged_snapshots
    assert await storage.names("leases/") == []


async def test_stopped_at_each_change(storage: Storage, source: Path) -> None:
    """What was there stays, and another run repairs."""
    await damaged_storage(storage, source)
    before = {name: await storage.memory.get(name) for name in await storage.names("")}
    number, ended = 0, False
    while not ended:
        counted = 0

        async def stop(method: str, name: str, number: int = number) -> None:
            nonlocal counted
            if method in ("put", "delete"):
                counted += 1
                if counted > number:
                    raise ConnectionLost("gone")

        try:
            await repair(storage, FaultyConnector(storage.memory, before=stop))
            ended = True
        except (ConnectionLost, ExceptionGroup):
            number += 1
        assert before.items() <= {name: await storage.memory.get(name) for name in await storage.names("")}.items()
    assert number >= 4
    [old, new] = (await (await storage.open()).commits()).snapshots
    assert new.header.parent == old.header.snapshot_id
    assert not (await (await storage.open()).check([(new, None)])).damaged_snapshots


def test_the_program(tmp_path: Path) -> None:
    run = fault_harness.create(tmp_path)
    source = make_source(tmp_path / "source", large_bytes=2 << 20)
    (source / "other").write_bytes(os.urandom(2 << 20))
    run("backup", source, "--workers", "1")
    assert run("repair", "snapshots").stdout == "repair: 0 snapshots of 1 are damaged, 0 repaired\n"
    pack = max(objects(run.repository, "packs"), key=lambda path: path.stat().st_size)
    flip_bit(pack, 1000)
    dry = validate_all(
        run("repair", "snapshots", "--dry-run", "--json"), "item of repair snapshots", "summary of repair snapshots"
    )[-1]
    assert (len(dry["damaged_snapshots"]), dry["repaired"]) == (1, 0)
    outcome = run("repair", "snapshots", "latest", "--json")
    messages = validate_all(outcome, "item of repair snapshots", "summary of repair snapshots")
    [item] = outcome.of_type("item")
    assert messages[-1]["repaired"] == 1
    told = run("ls", "latest", codes=(0,)).stderr
    assert told.count("not backed up as it should be: ") == item["lost"] > 0
    run("restore", "latest", "--to", tmp_path / "target")
    found, expected = contents(tmp_path / "target"), contents(source)
    assert len(found) == len(expected) - item["lost"]
    assert found.items() <= expected.items()
    assert "was repaired before" in run("repair", "snapshots").stderr
    run("check", item["snapshot_id"], codes=(0, 4))  # packs it shares are damaged
    # Both ways to be rid of the damaged one.
    outcome = run("repair", "snapshots", "--forget")
    assert outcome.stdout == "repair: 1 snapshot of 2 is damaged, 0 repaired, 1 removed\n"
    assert [each["snapshot_id"] for each in run("ls", "--json").of_type("item")] == [item["snapshot_id"]]
    pack.unlink()
    (source / "third").write_bytes(os.urandom(2 << 20))
    before = objects(run.repository, "packs")
    run("backup", source, "--workers", "1", "--force")
    fresh = [path for path in objects(run.repository, "packs") if path not in before]
    flip_bit(max(fresh, key=lambda path: path.stat().st_size), 1000)
    found = run("repair", "snapshots", "--forget", "--json").summary
    assert found["removed_snapshots"] == found["damaged_snapshots"]
    assert len(found["removed_snapshots"]) == 1
    assert "WARNING" not in run("ls").stderr
    assert run("repair", "snapshots").stdout.startswith("repair: 0 snapshots of ")


@pytest.mark.parametrize("what", ["a snapshot", "of nobody"])
def test_an_end_that_can_t_be_read(tmp_path: Path, what: str) -> None:
    """Nothing can be removed while it stands there. It can be given up, and all that others need is still found."""
    run = fault_harness.create(tmp_path)
    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    run("backup", source, "--workers", "1")
    [first] = objects(run.repository, "snapshots")
    (source / "more").write_bytes(b"more")
    kept = run("backup", source, "--workers", "1", "--json").summary["snapshot_id"]
    if what == "a snapshot":
        flip_bit(first, 100)
        bad = first
    else:
        bad = first.with_name(os.urandom(16).hex())
        bad.write_bytes(first.read_bytes())
    run("check", codes=(4,))
    outcome = run("maintenance", codes=(1,))
    assert f"snapshots/{bad.name}" in outcome.stderr and "repair snapshots --forget" in outcome.stderr
    outcome = run("repair", "snapshots", codes=(3,))
    assert f"snapshots/{bad.name} can't be read" in outcome.stderr and "--forget gives it up" in outcome.stderr
    dry = run("repair", "snapshots", "--forget", "--dry-run", "--json", codes=(3,))
    assert validate_all(dry, "item of repair snapshots", "summary of repair snapshots")[-1]["unreadable_objects"] == [
        f"snapshots/{bad.name}"
    ]
    run("check", codes=(4,))
    outcome = run("repair", "snapshots", "--forget", "--json")
    messages = validate_all(outcome, "item of repair snapshots", "summary of repair snapshots")
    assert messages[-1]["given_up_objects"] == [f"snapshots/{bad.name}"]
    run("--no-cache", "check")
    listed = [each["snapshot_id"] for each in run("ls", "--json").of_type("item")]
    if what == "of nobody":
        run("rm", *(each for each in listed if each != kept))
    else:
        assert listed == [kept]
    for _ in range(3):
        run("maintenance", "--grace", "0s")
    run("--no-cache", "check")
    run("restore", kept, "--to", tmp_path / "target")
    assert contents(tmp_path / "target") == contents(source)


def test_nothing_can_be_read(tmp_path: Path) -> None:
    """Without the root of its catalog a snapshot is lost, and the others are not."""
    run, source = fault_harness.create(tmp_path, encrypted=False), make_source(tmp_path / "source", large_bytes=1 << 20)
    run("backup", source, "--workers", "1")
    pack = min(objects(run.repository, "packs"), key=lambda path: path.stat().st_size)
    put_in_place(pack, pack.read_bytes()[:100] + bytes(100) + pack.read_bytes()[200:])
    (source / "more").write_bytes(b"more")
    outcome = run("repair", "snapshots", codes=(3,))
    assert "can't be repaired, nothing of it can be read: " in outcome.stderr
    assert outcome.stdout == "repair: 1 snapshot of 1 is damaged, 0 repaired\n"
