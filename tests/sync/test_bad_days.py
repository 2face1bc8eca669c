"""Syncs that meet damage, are interrupted, revoked or repeated, and caches that lie: nothing is lost or wrong."""

from __future__ import annotations

import os
import random
import sqlite3
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.fault_harness import make_source
from tests.harness import Recorder
from tests.sync.sides import ALL, SMALL, Side, is_whole, remove, restores, sync

from coffret.connectors.errors import ConnectionLost, StorageFull
from coffret.connectors.faults import FaultyConnector
from coffret.engine import sealing
from coffret.engine.errors import LeaseLost, OutOfSpace, StorageError, reported
from coffret.engine.ops.sync import lacking
from coffret.engine.records import End, encode
from coffret.engine.selection import Selection
from coffret.engine.snapshot import NoSuchSnapshot

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


async def _data_packs(side: Side) -> list[str]:
    """Names of packs, the largest first."""
    infos = [info async for info in side.memory.list("packs/")]
    return [info.name for info in sorted(infos, key=lambda info: -info.size_bytes)]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
async def test_a_damaged_snapshot_is_left_out(source: Path, tmp_path: Path, how: str) -> None:
    """It is named; the others are copied."""
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    small = make_source(tmp_path / "small", seed=9, files=3, large_bytes=2000)
    first = await a.backup(small)
    bad = await a.backup(source)
    name = (await _data_packs(a))[0]
    data = bytearray(await a.memory.get(name))
    data[len(data) // 2] ^= 1
    await a.memory.delete(name)
    if how != "gone":
        await a.memory.put(name, [data if how == "flipped" else data[: len(data) // 2]])
    (small / "more").write_bytes(b"more")
    last = await a.backup(small)
    recorder = Recorder()
    summary = await sync(await a.open(), await b.open(), progress=recorder)
    assert [snapshot.id for snapshot in summary.copied] == [first, last]
    assert [snapshot.id for snapshot in summary.damaged] == [bad]
    assert list(recorder.faults) == [bad[:8].encode()] and name in recorder.faults[bad[:8].encode()]
    assert await b.ids() == {first, last} and await is_whole(b)


async def test_another_copy_of_a_damaged_pack(source: Path, tmp_path: Path) -> None:
    a, b = Side.made(), Side.made()
    made = await a.backup(source)
    [kept] = await a.names("leases/") or [""]
    assert not kept
    # A second machine that does not know of the first's packs, since its index objects are hidden for a while.
    hidden = {name: await a.memory.get(name) for name in await a.names("index/")}
    for name in hidden:
        await a.memory.delete(name)
    before = await _data_packs(a)
    await a.backup(source)
    for name, data in hidden.items():
        await a.memory.put(name, [data])
    altered = bytearray(await a.memory.get(before[0]))
    altered[len(altered) // 2] ^= 1
    await a.memory.put(before[0], [altered])
    summary = await sync(await a.open(), await b.open())
    assert made in {snapshot.id for snapshot in summary.copied} and not summary.damaged
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


async def test_interrupted_at_every_call(source: Path, tmp_path: Path) -> None:
    """Wherever the target fails, it stays whole, and the next run takes up what was stored."""
    a = Side.made(tmp_path / "cache")
    made = await a.backup(source)
    calls = FaultyConnector((probe := Side.made()).memory)
    await sync(await a.open(), await probe.open(calls))
    writes = [number for number, (method, _) in enumerate(calls.calls) if method in ("put", "delete")]
    assert len(writes) >= 6
    for number in writes:
        for lost in (False, True):
            b = Side.made(tmp_path / f"cache{number}{lost}")
            fault = {number: StorageFull("full")}
            failing = FaultyConnector(b.memory, fail_before={} if lost else fault, fail_after=fault if lost else {})
            try:
                await sync(await a.open(), await b.open(failing))
            except Exception as error:
                assert isinstance(reported(error), OutOfSpace)
            if "packs" not in calls.calls[number][1]:
                assert await is_whole(b)
            await sync(await a.open(), await b.open())
            assert await b.ids() == {made} and await is_whole(b)


async def test_cancelled(source: Path, tmp_path: Path) -> None:
    """What was stored is indexed, so that it is not moved again."""
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    made = await a.backup(source)
    with anyio.CancelScope() as scope:

        async def cancel(method: str, name: str) -> None:
            if method == "put" and name.startswith("packs/"):
                scope.cancel()

        await sync(await a.open(), await b.open(FaultyConnector(b.memory, after=cancel)))
    assert scope.cancelled_caught and await b.ids() == set()
    assert await b.names("index/") and not await b.names("leases/")
    progress = Recorder()
    await sync(await a.open(), await b.open(), progress=progress)
    assert progress.read_bytes < 1 << 20  # not the large file once more
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


async def test_revoked_while_at_work(source: Path, tmp_path: Path) -> None:
    """Maintenance takes the attempt for dead: another one does it all."""
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    made = await a.backup(source)
    opened = await b.open()
    revoked: list[str] = []

    async def revoke(method: str, name: str) -> None:
        if method == "put" and name.startswith("index/") and not revoked:
            revoked.append(f"snapshots/{name.partition('/')[2].partition('-')[0]}")
            end = encode(End("revoked", 0))
            body = opened.sealer.seal(sealing.END, revoked[0], os.urandom(16), end)
            await b.memory.put(revoked[0], [body], if_absent=True)

    recorder = Recorder()
    await sync(await a.open(), await b.open(FaultyConnector(b.memory, after=revoke)), progress=recorder)
    assert revoked and recorder.notes == ["another process ended this attempt; trying again"]
    assert await b.ids() == {made} and await is_whole(b) and await restores(b, made, source, tmp_path)


async def test_revoked_again_and_again(source: Path) -> None:
    a, b = Side.made(), Side.made()
    await a.backup(source)
    opened = await b.open()

    async def revoke(method: str, name: str) -> None:
        if method == "put" and name.startswith("leases/"):
            name = f"snapshots/{name.partition('/')[2]}"
            await b.memory.put(name, [opened.sealer.seal(sealing.END, name, os.urandom(16), encode(End("revoked", 0)))])

    with pytest.raises(Exception) as raised:
        await sync(await a.open(), await b.open(FaultyConnector(b.memory, after=revoke)))
    assert isinstance(reported(raised.value), LeaseLost)


@pytest.mark.parametrize("cached", [False, True])
async def test_two_at_once(source: Path, tmp_path: Path, cached: bool) -> None:
    """Two hosts, or two processes of one, copy the same snapshot: it is listed once."""
    cache = tmp_path / "cache" if cached else None
    a, b = Side.made(cache), Side.made(cache)
    made = await a.backup(source)
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(sync, await a.open(), await b.open())
    commits = await (await b.open()).listed()
    assert 1 <= len(commits.committed) <= 2 and [each.id for each in commits.snapshots] == [made]
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


async def test_what_was_removed_stays_so_until_it_is_named(source: Path, tmp_path: Path) -> None:
    a, b = Side.made(), Side.made()
    made = await a.backup(source)
    await sync(await a.open(), await b.open())
    await remove(b, made)
    assert await b.ids() == set()
    mine, other = await (await a.open()).listed(), await (await b.open()).listed()
    lack = lacking(mine, other, ALL)
    assert not lack.snapshots and [each.id for each in lack.removed] == [made]
    assert not lacking(mine, other, Selection(named=["latest"])).snapshots
    await sync(await a.open(), await b.open(), Selection(named=[made[:10]]))
    assert await b.ids() == {made} and await restores(b, made, source, tmp_path)
    # And nothing was removed from the first.
    assert not lacking(other, mine, ALL).removed


@pytest.mark.parametrize("window", [7, 1 << 15])
async def test_a_forged_cache(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Who can write to the cache can't have a snapshot name what it should not."""
    monkeypatch.setattr("coffret.engine.sync_catalog._WINDOW_CHUNKS", window)
    a, b = Side.made(tmp_path / "cache", chunker=SMALL), Side.made(tmp_path / "cache", chunker=SMALL)
    (source / "long").write_bytes(os.urandom(300_000))
    await a.backup(source)
    await sync(await a.open(), await b.open())
    [path] = (tmp_path / "cache").rglob("ids-*.db")
    assert path.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as connection:
        for table in ("leaves", "containers"):
            rows = connection.execute(f"select source, target from {table}").fetchall()
            assert rows
            for (key, target), (_, other) in zip(rows, rows[1:] + rows[:1], strict=True):
                forged = other if other != target else target[::-1]
                connection.execute(f"update {table} set target = ? where source = ?", (forged, key))
    connection.close()
    (source / "directory1" / "more").write_bytes(os.urandom(5000))
    made = await a.backup(source)
    await sync(await a.open(), await b.open())
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


async def test_a_damaged_cache(source: Path, tmp_path: Path) -> None:
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    await a.backup(source)
    await sync(await a.open(), await b.open())
    [path] = (tmp_path / "cache").rglob("ids-*.db")
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))
    (source / "directory1" / "more").write_bytes(os.urandom(5000))
    made = await a.backup(source)
    await sync(await a.open(), await b.open())
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


async def test_a_snapshot_that_was_removed_vouches_for_nothing(source: Path, tmp_path: Path) -> None:
    """What lay below it may have been swept: it is looked up, and what is gone is moved again."""
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    first = await a.backup(source)
    await sync(await a.open(), await b.open())
    second = await a.backup(source)
    await remove(b, first)
    for prefix in ("packs/", "index/"):  # swept
        for name in await b.names(prefix):
            await b.memory.delete(name)
    await sync(await a.open(), await b.open())
    assert await b.ids() == {second} and await restores(b, second, source, tmp_path) and await is_whole(b)


async def test_named_ones(source: Path) -> None:
    a, b = Side.made(), Side.made()
    one, two = await a.backup(source), await b.backup(source)
    mine, other = await (await a.open()).listed(), await (await b.open()).listed()
    with pytest.raises(NoSuchSnapshot):
        lacking(mine, other, Selection(named=[two]))
    assert not lacking(mine, other, Selection(named=[two]), both_ways=True).snapshots
    assert [each.id for each in lacking(mine, other, Selection(named=[one]), both_ways=True).snapshots] == [one]
    with pytest.raises(NoSuchSnapshot):
        lacking(mine, other, Selection(named=["ffff"]), both_ways=True)


async def test_a_source_that_can_not_be_asked(source: Path) -> None:
    """That is no damage: the sync ends, and says so."""
    a, b = Side.made(), Side.made()
    await a.backup(source)

    async def lose(method: str, name: str) -> None:
        if method.startswith("get") and name.startswith("packs/"):
            raise ConnectionLost("the connection is lost")

    with pytest.raises(Exception) as raised:
        await sync(await a.open(FaultyConnector(a.memory, before=lose)), await b.open())
    assert isinstance(reported(raised.value), StorageError)


async def test_removed_from_the_target_meanwhile(source: Path) -> None:
    """Another host has copied the snapshot, and somebody has removed it, since it was found to be lacking."""
    a, b = Side.made(), Side.made()
    made = await a.backup(source)
    lack = lacking(await (await a.open()).listed(), await (await b.open()).listed(), ALL)
    await sync(await a.open(), await b.open())
    recorder = Recorder()
    assert not (await (await b.open()).sync(await a.open(), lack.snapshots, progress=recorder)).copied
    await remove(b, made)
    assert not (await (await b.open()).sync(await a.open(), lack.snapshots, progress=recorder)).copied
    assert await b.ids() == set() and "was removed from the target meanwhile" in recorder.notes[-1]


async def test_removed_from_the_source_meanwhile(source: Path) -> None:
    """Removed and swept: not damaged."""
    a, b = Side.made(), Side.made()
    made = await a.backup(source)
    lack = lacking(await (await a.open()).listed(), await (await b.open()).listed(), ALL)
    await remove(a, made)
    for name in await a.names("packs/"):
        await a.memory.delete(name)
    recorder = Recorder()
    summary = await (await b.open()).sync(await a.open(), lack.snapshots, progress=recorder)
    assert not summary.copied and not summary.damaged and not recorder.faults
    assert "meanwhile" in recorder.notes[-1]
