"""A check, and meanwhile snapshots are removed, their space given back, the dead buried: it calls nothing damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import ONE_WORKER, Storage
from tests.fault_harness import ROUNDS
from tests.maintenance.scenery import PIECES, small_storage

from coffret.connectors.errors import ConnectionLost
from coffret.connectors.faults import FaultyConnector
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.maintenance import MaintenanceOptions, maintain
from coffret.engine.ops.rm import remove
from coffret.engine.progress import Progress
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.engine.progress import Fault

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("closed_mirrors")]

NOW = MaintenanceOptions(grace_s=0)


async def scene(home: Path, clock: list[float]) -> Storage:
    """Snapshots that have much in common, and what a backup left that died before its commit."""
    storage = small_storage()
    storage.memory.clock = lambda: clock[0]
    content = home / "content"
    for number in range(3):
        content.write_bytes(b"".join(PIECES[number : number + 3]))
        await (await storage.open()).backup(StreamSource(b"stream", f"cat {content}"), ONE_WORKER)

    async def die(method: str, name: str) -> None:
        if method == "put" and name.startswith("snapshots/"):
            raise ConnectionLost("the process is dead")

    content.write_bytes(PIECES[5])
    opened = await storage.open(FaultyConnector(storage.memory, before=die))
    with pytest.raises((ConnectionLost, ExceptionGroup)):
        await opened.backup(StreamSource(b"stream", f"cat {content}"), ONE_WORKER)
    return storage


async def check_while_it_happens(home: Path, number: int, *, fast: bool) -> list[str]:
    """Before the check's call of a number all happens that may happen in an hour; the calls it made."""
    clock = [1.8e9]
    storage = await scene(home, clock)
    calls: list[str] = []

    async def happen(method: str, name: str) -> None:
        calls.append(f"{method} {name}")
        if len(calls) == number + 1:
            clock[0] += 3600
            opened = await storage.open()
            await remove(opened, (await opened.commits()).snapshots[:2])
            for _ in range(2):
                await maintain(opened, NOW, Progress())

    opened = await storage.open(FaultyConnector(storage.memory, before=happen))
    faults: list[Fault] = []
    summary = await opened.check(None, CheckOptions(fast=fast, workers=1), Progress(on_fault=faults.append))
    assert (summary.clean, faults) == (True, []), (number, calls[number:])
    return calls


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "whole"])
async def test_at_each_call(tmp_path: Path, fast: bool) -> None:
    number, step = 0, 1 if fast or ROUNDS > 1 else 3
    while number < len(await check_while_it_happens(tmp_path, number, fast=fast)):
        number += step
    assert number > 20
