"""Removal of snapshots: which are meant, and what is left of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import ONE_WORKER, Storage, mirrors

from coffret.connectors.errors import ConnectionLost
from coffret.connectors.faults import FaultyConnector
from coffret.engine.ops.rm import remove, renew, resolve
from coffret.engine.removal import open_removal
from coffret.engine.snapshot import NoSuchSnapshot, Snapshot, seal_snapshot, snapshot_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coffret.engine.repository import Repository

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
async def _mirrors_are_closed() -> AsyncIterator[None]:
    yield
    while mirrors:
        await mirrors.pop().close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(os.urandom(1000))
    return tmp_path / "source"


async def made(opened: Repository, source: Path, number: int) -> list[Snapshot]:
    return [(await opened.backup([bytes(source)], ONE_WORKER)).snapshot for _ in range(number)]


async def test_removed_snapshots_are_not_listed(source: Path) -> None:
    storage = Storage()
    opened = await storage.open()
    first, second, third = await made(opened, source, 3)
    found, gone = resolve(await opened.commits(), [first.short_id.upper(), "latest", third.id, third.short_id])
    assert ([each.id for each in found], gone) == ([first.id, third.id], [])
    await remove(opened, found)
    for view in (opened, await storage.open()):
        commits = await view.commits()
        assert [each.id for each in commits.snapshots] == [second.id]
        assert commits.removed == {first.id, third.id}
        # Their attempts have ended well all the same: what they stored is relied on.
        assert {first.attempt.hex(), third.attempt.hex()} <= commits.committed
        assert await view.find_snapshot("latest") == commits.snapshots[0]
        with pytest.raises(NoSuchSnapshot, match="was removed"):
            await view.find_snapshot(first.short_id)
        assert (await view.check()).clean
    names = await storage.names("removed/")
    assert {name.partition("/")[2] for name in names} == {f"{s.id}-{s.attempt.hex()}" for s in (first, third)}
    for name in names:
        removal = open_removal(opened.sealer, name, await storage.memory.get(name))
        assert removal.host == first.header.host
        assert removal.user == first.header.user
        assert removal.time_ns > third.header.time_ns


async def test_it_can_be_repeated(source: Path) -> None:
    """By the command that was interrupted, as it stands."""
    opened = await Storage().open()
    first, second = await made(opened, source, 2)
    await remove(opened, [first])
    found, gone = resolve(await opened.commits(), [first.short_id, first.id, second.id])
    assert ([each.id for each in found], gone) == ([second.id], [first.id])
    await remove(opened, [first, second, second])
    assert (await opened.commits()).snapshots == []


async def test_nothing_is_removed_if_one_is_unknown(source: Path) -> None:
    storage = Storage()
    opened = await storage.open()
    [snapshot] = await made(opened, source, 1)
    for text in ("nosuch", "", "0" * 33):
        with pytest.raises(NoSuchSnapshot):
            resolve(await opened.commits(), [snapshot.id, text])


async def test_all_objects_of_a_snapshot(source: Path) -> None:
    """Two hosts have copied one snapshot: it is removed with both its objects, and is back if it is copied again."""
    storage = Storage()
    opened = await storage.open()
    [snapshot] = await made(opened, source, 1)

    async def copied() -> Snapshot:
        copy = Snapshot(os.urandom(16), snapshot.header)
        await storage.memory.put(snapshot_name(copy.attempt), [seal_snapshot(opened.sealer, copy)])
        opened.forget_commits()
        return copy

    other = await copied()
    assert set((await opened.commits()).attempts[snapshot.header.snapshot_id]) == {snapshot.attempt, other.attempt}
    [found], _ = resolve(await opened.commits(), ["latest"])
    await remove(opened, [found])
    commits = await opened.commits()
    assert not commits.snapshots
    assert not commits.attempts
    assert commits.removed == {snapshot.id}
    assert len(await storage.names("removed/")) == 2
    again = await copied()
    commits = await opened.commits()
    assert [each.attempt for each in commits.snapshots] == [again.attempt]
    assert commits.removed == frozenset()
    assert resolve(commits, [snapshot.short_id])[1] == []


async def test_a_lost_answer(source: Path) -> None:
    """The record was put, and the answer lost; or another host has put one: it is removed, and that is no error."""
    storage = Storage()
    opened = await storage.open()
    first, second = await made(opened, source, 2)
    faulty = FaultyConnector(storage.memory)
    with_faults = await storage.open(faulty)
    await with_faults.commits()
    faulty.fail_after = {len(faulty.calls): ConnectionLost("no answer")}
    await remove(with_faults, [first])
    await remove(opened, [first])
    assert [each.id for each in (await opened.commits()).snapshots] == [second.id]
    assert len(await storage.names("removed/")) == 1
    # What could not be put is not removed, and said to be so.
    faulty.fail_before = {len(faulty.calls) + number: ConnectionLost("gone") for number in range(20)}
    with pytest.raises(ConnectionLost):
        await remove(with_faults, [second])
    opened.forget_commits()
    assert [each.id for each in (await opened.commits()).snapshots] == [second.id]


async def test_a_record_that_can_t_be_read_is_put_anew(source: Path) -> None:
    """It counts all the same; whoever removes the snapshot once more says so in its place."""
    storage = Storage()
    opened = await storage.open()
    first, second = await made(opened, source, 2)
    await remove(opened, [first, second])
    assert await renew(opened, [first.id, second.id]) == 0
    [name] = await storage.names(f"removed/{first.id}")
    await storage.memory.put(name, [b"damage"])
    found, gone = resolve(await opened.commits(), [first.id])
    assert (found, gone) == ([], [first.id])
    assert not (await opened.check()).clean
    assert await renew(opened, gone) == 1
    assert open_removal(opened.sealer, name, await storage.memory.get(name)).host
    assert (await opened.check()).clean
