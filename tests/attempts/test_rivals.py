"""Attempts: rivals in one process, and leases that are lost, revoked or can't be deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from msgspec.structs import replace
from tests.attempts.storage import ONE_WORKER, Storage, restores
from tests.harness import Recorder

from coffret.connectors.errors import ConnectionLost, StorageFull
from coffret.connectors.faults import FaultyConnector
from coffret.engine.attempt import Attempt
from coffret.engine.errors import LeaseLost, OutOfSpace, reported

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.engine.snapshot import Snapshot


pytestmark = pytest.mark.anyio


async def test_two_backups_through_one_repository(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One relies on what the other has stored and not committed; then that one's index objects are void."""
    storage = Storage()
    stored, relied, order = anyio.Event(), anyio.Event(), dict[str, bytes]()
    begin, commit = Attempt.begin, Attempt.commit

    async def begin_in_turn(attempt: Attempt, **options: bool) -> None:
        who = anyio.get_current_task().name
        order.setdefault(str(who), attempt.id)
        await begin(attempt, **options)
        if who == "late":
            await stored.wait()

    async def commit_in_turn(attempt: Attempt, snapshot: Snapshot) -> None:
        if attempt.id == order["lost"]:
            stored.set()
            await relied.wait()
            raise StorageFull("it never commits")
        await commit(attempt, snapshot)

    monkeypatch.setattr(Attempt, "begin", begin_in_turn)
    monkeypatch.setattr(Attempt, "commit", commit_in_turn)
    opened = await storage.open()

    async def lose() -> None:
        with pytest.raises(Exception) as raised:
            await opened.backup([bytes(source)], ONE_WORKER)
        assert isinstance(reported(raised.value), OutOfSpace)

    async def win() -> None:
        await opened.backup([bytes(source)], ONE_WORKER)
        relied.set()

    async with anyio.create_task_group() as group:
        group.start_soon(win, name="late")
        group.start_soon(lose, name="lost")
    await storage.revoke(order["lost"].hex())
    assert await restores(storage, source)


async def test_a_repository_restores_what_it_has_just_backed_up(source: Path) -> None:
    opened = await Storage().open()
    assert not (await opened.commits()).snapshots
    await opened.backup([bytes(source)], ONE_WORKER)
    assert await restores(Storage(), source, opened)


async def test_a_snapshot_is_committed_while_a_reader_lists(source: Path) -> None:
    """What is listed can be restored, whichever listing it comes between."""
    for prefix in ("snapshots/", "index/", "removed/"):
        storage, done = Storage(), list[str]()

        async def commit_now(method: str, name: str, before: str = prefix, done: list[str] = done) -> None:
            if method == "list" and name == before and not done:
                done.append(name)
                await (await storage.open()).backup([bytes(source)], ONE_WORKER)  # noqa: B023 - called at once

        reader = await storage.open(FaultyConnector(storage.memory, before=commit_now))
        found = (await reader.commits()).snapshots
        assert done
        assert len(found) == (prefix == "snapshots/")
        if found:
            assert await restores(storage, source, reader)


async def test_a_parent_is_committed_while_a_writer_lists(source: Path) -> None:
    """Its index objects were not listed: they are, once more, before the parent is given up."""
    storage, done = Storage(), list[str]()

    async def commit_now(method: str, name: str) -> None:
        if method == "list" and name == "snapshots/" and not done:
            done.append(name)
            await (await storage.open()).backup([bytes(source)], ONE_WORKER)

    recorder = Recorder()
    writer = await storage.open(FaultyConnector(storage.memory, before=commit_now))
    summary = await writer.backup([bytes(source)], ONE_WORKER, recorder)
    assert summary.snapshot.header.parent
    assert not recorder.notes
    assert await restores(storage, source)


@pytest.mark.parametrize("how", ["kept", "full"])
async def test_the_lease_can_t_be_deleted(source: Path, how: str) -> None:
    """That is told; it hides neither the snapshot nor what went wrong before."""
    storage = Storage()

    async def fail(method: str, name: str) -> None:
        if method == "delete":
            raise ConnectionLost("no answer")
        if how == "full" and method == "put" and name.startswith("packs/"):
            raise StorageFull("full")

    opened, recorder = await storage.open(FaultyConnector(storage.memory, before=fail)), Recorder()
    if how == "full":
        with pytest.raises(Exception) as raised:
            await opened.backup([bytes(source)], ONE_WORKER, recorder)
        assert isinstance(reported(raised.value), OutOfSpace)
    else:
        await opened.backup([bytes(source)], ONE_WORKER, recorder)
        assert await restores(storage, source)
    assert any("lease" in note for note in recorder.notes)


async def test_a_backup_is_done_though_its_state_can_t_be_told(source: Path) -> None:
    """Snapshots are listed for it once more, after the commit; the lease is taken away in any case."""
    storage, recorder = Storage(), Recorder()
    committed = False

    async def fail(method: str, name: str) -> None:
        if committed and method == "list":
            raise ConnectionLost("gone")

    async def after(method: str, name: str) -> None:
        nonlocal committed
        committed = committed or (method == "put" and name.startswith("snapshots/"))

    telling = replace(ONE_WORKER, tell_state=True)
    opened = await storage.open(FaultyConnector(storage.memory, before=fail, after=after))
    summary = await opened.backup([bytes(source)], telling, recorder)
    assert summary.state is None
    assert [note for note in recorder.notes if "state can't be told: gone" in note]
    assert not await storage.names("leases/")
    assert await restores(storage, source)
    opened = await storage.open()
    summary = await opened.backup([bytes(source)], telling)
    assert summary.state == opened.state_of((await opened.commits()).snapshots)


async def test_who_stops_a_backup_that_is_done_is_told(source: Path) -> None:
    storage, recorder, committed = Storage(), Recorder(), False

    async def stop(method: str, name: str) -> None:
        if committed and method == "list":
            scope.cancel()
            await anyio.sleep_forever()

    async def after(method: str, name: str) -> None:
        nonlocal committed
        committed = committed or (method == "put" and name.startswith("snapshots/"))

    opened = await storage.open(FaultyConnector(storage.memory, before=stop, after=after))
    with anyio.CancelScope() as scope:
        await opened.backup([bytes(source)], replace(ONE_WORKER, tell_state=True), recorder)
    assert scope.cancelled_caught
    [snapshot] = (await (await storage.open()).commits()).snapshots
    assert f"snapshot {snapshot.short_id} is made all the same" in recorder.notes
    assert not await storage.names("leases/")


async def test_a_revoked_writer_counts_anew(source: Path) -> None:
    storage, revoked = Storage(), list[str]()

    async def revoke(method: str, name: str) -> None:
        if method == "put" and name.startswith("snapshots/") and not revoked:
            revoked.append(name)
            await storage.revoke(name.partition("/")[2])

    told = Recorder()
    plain = (await (await Storage().open()).backup([bytes(source)], ONE_WORKER, told)).counts
    opened, recorder = await storage.open(FaultyConnector(storage.memory, before=revoke)), Recorder()
    counts = (await opened.backup([bytes(source)], ONE_WORKER, recorder)).counts
    assert revoked
    assert (counts.read_bytes, counts.new, counts.files) == (plain.read_bytes, plain.new, plain.files)
    for name in ("files", "entries", "size_bytes", "read_bytes", "new", "unmodified", "errors"):
        assert getattr(recorder, name) == getattr(told, name), name


async def test_the_lease_is_refreshed_while_the_repository_is_listed(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing and fetching a large index may take longer than a lease lasts."""
    monkeypatch.setattr("coffret.engine.attempt.LEASE_REFRESH_S", 0.001)
    storage, puts = Storage(), list[str]()

    async def watch(method: str, name: str) -> None:
        if method == "put" and name.startswith("leases/"):
            puts.append(name)
        if method == "list" and name == "index/":
            before = len(puts)
            with anyio.fail_after(60):
                while len(puts) < before + 2:  # noqa: ASYNC110
                    await anyio.sleep(0.001)

    opened = await storage.open(FaultyConnector(storage.memory, before=watch))
    await opened.backup([bytes(source)], ONE_WORKER)


async def test_lease_lost_again_and_again(source: Path) -> None:
    storage = Storage()

    async def revoke(method: str, name: str) -> None:
        if method == "put" and name.startswith("snapshots/"):
            await storage.revoke(name.partition("/")[2])

    opened = await storage.open(FaultyConnector(storage.memory, before=revoke))
    with pytest.raises(Exception) as raised:
        await opened.backup([bytes(source)], ONE_WORKER)
    assert isinstance(reported(raised.value), LeaseLost)
    assert len(await storage.names("snapshots/")) == 3
