"""A sync that stops before any of its calls, while what it wants to rely on is marked, and swept: nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from tests.attempts.storage import ONE_WORKER, Storage
from tests.maintenance.oracle import Oracle
from tests.maintenance.scenery import PIECES, small_storage

from coffret.connectors.faults import FaultyConnector
from coffret.engine.attempt import Attempt
from coffret.engine.errors import InTheWay, reported
from coffret.engine.ops.maintenance import MaintenanceOptions, maintain
from coffret.engine.ops.rm import remove
from coffret.engine.ops.sync import SyncOptions
from coffret.engine.progress import Progress
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.engine.repository import Repository

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("closed_mirrors")]

NOW = MaintenanceOptions(grace_s=0)


async def back_up(storage: Storage, content: Path, *pieces: bytes) -> None:
    await anyio.Path(content).write_bytes(b"".join(pieces))
    await (await storage.open()).backup(StreamSource(b"stream", f"cat {content}"), ONE_WORKER)


async def comes_through(opened: Repository) -> bool:
    """Maintain; whether nobody was in the way."""
    try:
        await maintain(opened, NOW, Progress())
    except (ExceptionGroup, InTheWay) as error:
        if not isinstance(reported(error), InTheWay):
            raise
        return False
    return True


async def stopped(home: Path, number: int, *, hours: int) -> bool:
    """Sync, stopped before a call, by its number; whether there is one. An hour later it is taken for dead."""
    clock = [1.8e9]
    source = small_storage()
    target = small_storage(like=source)
    target.memory.clock = lambda: clock[0]
    content = home / "content"
    await back_up(source, content, *PIECES[:3])
    await back_up(target, content, *PIECES[1:4])
    opened = await target.open()
    oracle = Oracle(target, opened.sealer)
    await remove(opened, (await opened.commits()).snapshots)
    other = Attempt(opened.connector, opened.sealer, opened.mirror, what="backup")
    await other.announce()
    assert not await comes_through(opened)  # what the sync could use is marked now
    calls = 0

    async def stop(method: str, name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == number + 1:
            await other.end()
            clock[0] += 3600 * hours
            for _ in range(2):
                assert await comes_through(opened) or not hours
                assert not oracle.violation(), (number, hours, method, name)

    there, here = await source.open(), await target.open(FaultyConnector(target.memory, before=stop))
    summary = await here.sync(there, (await there.listed()).snapshots, SyncOptions(limits=ONE_WORKER.limits))
    assert len(summary.copied) == 1
    for _ in range(2):
        assert not oracle.violation(), (number, hours)
        [snapshot] = oracle.snapshots()
        assert oracle.content(snapshot) == {b"stream": b"".join(PIECES[:3])}
        clock[0] += 3600
        assert await comes_through(opened)
    return calls > number


@pytest.mark.parametrize("hours", [0, 1])
async def test_before_any_call(tmp_path: Path, hours: int) -> None:
    number = 0
    while await stopped(tmp_path, number, hours=hours):
        number += 1
    assert number > 10
