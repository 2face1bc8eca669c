"""Maintenance that dies at any of its calls: nothing is lost, and the next run brings it to the same end."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import ONE_WORKER, Storage
from tests.maintenance.oracle import Oracle
from tests.maintenance.scenery import PIECES, small_storage

from coffret.connectors.errors import ConnectionLost, ConnectorError
from coffret.connectors.wrapper import Wrapper
from coffret.engine.errors import InTheWay, reported
from coffret.engine.maintenance_marks import list_marks
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.maintenance import MaintenanceOptions, maintain
from coffret.engine.ops.repair import IndexRepairOptions, repair_index
from coffret.engine.ops.rm import remove
from coffret.engine.progress import Progress
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coffret.connectors.base import Buffer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("closed_mirrors")]

NOW = MaintenanceOptions(grace_s=0)
clock = [1.8e9]


class Dying(Wrapper):
    """A storage whose user dies at a call, by its number among those that change something; `done`: after it."""

    def __init__(self, storage: Storage, number: int, *, done: bool) -> None:
        super().__init__(storage.memory)
        self.calls: list[str] = []
        self._number, self._done, self.dead = number, done, False

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        if self._alive(f"put {name}"):
            await self.inner.put(name, body, if_absent=if_absent)
        self._answer()

    async def delete(self, name: str) -> None:
        if self._alive(f"delete {name}"):
            await self.inner.delete(name)
        self._answer()

    async def stat(self, name: str) -> object:  # type: ignore[override]
        self._answer()
        return await self.inner.stat(name)

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self._answer()
        return await self.inner.get(name, offset=offset, length=length)

    def _alive(self, call: str) -> bool:
        """Whether the call is to have its effect."""
        if self.dead:
            return False
        self.calls.append(call)
        self.dead = len(self.calls) - 1 == self._number
        return not self.dead or self._done

    def _answer(self) -> None:
        if self.dead:
            raise ConnectionLost("the process is dead")


async def scene(home: Path) -> tuple[Storage, Oracle]:
    """A repository in which packs are to be deleted, and others copied, with the remains of a dead backup."""
    storage = small_storage()
    storage.memory.clock = lambda: clock[0]
    opened = await storage.open()
    content = home / "content"
    for number in range(4):
        content.write_bytes(b"".join(PIECES[number : number + 3]))
        await opened.backup(StreamSource(b"stream", f"cat {content}"), ONE_WORKER)
    await remove(opened, (await opened.commits()).snapshots[::2])
    return storage, Oracle(storage, opened.sealer)


async def one_run(storage: Storage, number: int, *, done: bool) -> Dying:
    """A run that dies at a call, or comes to its end."""
    dying = Dying(storage, number, done=done)
    opened = await storage.open(dying)
    try:
        await maintain(opened, NOW, Progress())
        assert not dying.dead or dying.calls[-1].startswith("delete leases/"), dying.calls
    except (Exception, ExceptionGroup) as error:
        known = reported(error)
        assert dying.dead or isinstance(known, InTheWay), error
        assert isinstance(error, ConnectorError | ExceptionGroup | InTheWay), error
    return dying


def kinds(names: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        kind = name.partition("/")[0]
        counts[kind] = counts.get(kind, 0) + 1
    return counts


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
async def test_killed_at_each_call(tmp_path: Path, done: bool) -> None:
    storage, oracle = await scene(tmp_path)
    before = dict(storage.memory._objects)
    whole = await one_run(storage, -1, done=done)
    assert not oracle.violation()
    for kind in ("put trash/", "put packs/", "put index/", "delete index/", "delete packs/", "put snapshots/"):
        assert any(call.startswith(kind) for call in whole.calls), whole.calls
    end = kinds(await storage.names(""))
    for number in range(len(whole.calls)):
        storage.memory._objects.clear()
        storage.memory._objects.update(before)
        dying = await one_run(storage, number, done=done)
        assert dying.dead
        assert not oracle.violation(), (number, dying.calls)
        again = await one_run(storage, -1, done=done)  # the lease of the dead one may be in the way
        assert not oracle.violation(), (number, dying.calls, again.calls)
        clock[0] += 3600
        for _ in range(2):
            last = await one_run(storage, -1, done=done)
            assert not oracle.violation(), (number, dying.calls, last.calls)
        found = kinds(await storage.names(""))
        assert {kind: found.get(kind, 0) for kind in ("packs", "leases")} == {"packs": end["packs"], "leases": 0}, (
            number
        )
        assert found["index"] <= end["index"] + 1
        assert (await (await storage.open()).commits()).damaged == []


@pytest.mark.parametrize(("done", "again"), [(False, False), (True, True)], ids=["not done", "done, and repeated"])
async def test_a_repair_that_dies_beside_a_mark(
    tmp_path: Path, done: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the repository for itself, and names what is marked: the sweep ends it, when it is dead for sure."""
    monkeypatch.setattr("coffret.engine.index.INDEX_EVERY_CHUNKS", 30)
    storage, oracle = await scene(tmp_path)
    await maintain(await storage.open(), MaintenanceOptions(grace_s=3600), Progress())
    clock[0] += 3600
    marked = dict(storage.memory._objects)
    await one_run(storage, -1, done=done)
    end = kinds(await storage.names(""))
    number, calls = 0, 1
    while number < calls:
        storage.memory._objects.clear()
        storage.memory._objects.update(marked)
        dying = Dying(storage, number, done=done)
        with suppress(ConnectorError, ExceptionGroup):
            await repair_index(await storage.open(dying), IndexRepairOptions(all=True, exclusive=True), Progress())
        calls = number + 2 if dying.dead else len(dying.calls)
        if again:
            await repair_index(await storage.open(), IndexRepairOptions(all=True, exclusive=True), Progress())
        await one_run(storage, -1, done=done)  # its lease may be in the way
        assert not oracle.violation(), (number, dying.calls)
        clock[0] += 3600
        for _ in range(2):
            await one_run(storage, -1, done=done)
            assert not oracle.violation(), (number, dying.calls)
        assert not (await list_marks(storage.memory)).open, (number, dying.calls)
        found = kinds(await storage.names(""))
        assert (found["packs"], found.get("leases", 0)) == (end["packs"], 0), (number, dying.calls)
        assert (await (await storage.open()).check(options=CheckOptions(fast=True))).clean
        number += 1
    assert number > 4  # lease, index objects, end, lease


async def test_a_writer_stops_before_or_after_any_put(tmp_path: Path) -> None:
    """While it is, maintenance runs twice, with no grace; after an hour it is taken for dead. Then it goes on."""
    content = tmp_path / "content"
    for hours in (0, 1):
        for after in (False, True):
            number = 0
            while True:
                storage, oracle = await scene(tmp_path)
                content.write_bytes(b"".join(PIECES))
                stopping = Stopping(storage, number, after=after, hours=hours)
                opened = await storage.open(stopping)
                try:
                    made = (await opened.backup(StreamSource(b"stream", f"cat {content}"), ONE_WORKER)).snapshot
                    oracle.made.add(made.attempt.hex())
                except Exception as error:
                    assert hours and "another process ended" in str(reported(error)), error
                assert not oracle.violation(), (number, after, hours)
                await one_run(storage, -1, done=True)
                assert not oracle.violation(), (number, after, hours)
                for snapshot in oracle.snapshots():
                    oracle.content(snapshot)
                if not stopping.stopped:
                    break
                number += 1
            assert number >= 4  # lease, pack, index, snapshot


class Stopping(Wrapper):
    """A storage whose user stands still before or after a put, by number, while maintenance runs."""

    def __init__(self, storage: Storage, number: int, *, after: bool, hours: int) -> None:
        super().__init__(storage.memory)
        self._storage, self._number, self._after, self._hours = storage, number, after, hours
        self._puts = 0
        self.stopped = False

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        mine, self._puts = self._puts, self._puts + 1
        if mine == self._number and not self._after:
            await self._stop()
        await self.inner.put(name, body, if_absent=if_absent)
        if mine == self._number and self._after:
            await self._stop()

    async def _stop(self) -> None:
        self.stopped = True
        await one_run(self._storage, -1, done=True)
        clock[0] += 3600 * self._hours
        await one_run(self._storage, -1, done=True)
