"""A check reads packs and walks catalogs at the same time: within one limit, and told of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from msgspec.structs import replace
from tests.attempts.storage import ONE_WORKER, Storage

from coffret.connectors.faults import FaultyConnector
from coffret.engine.ops.check import CheckOptions
from coffret.engine.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


async def test_packs_and_catalogs_share_a_limit(source: Path) -> None:
    storage = Storage()
    for number in range(4):
        (source / "large").write_bytes(bytes([number]) * 3_000_000)
        await (await storage.open()).backup([bytes(source)], ONE_WORKER)
    storage.memory.capabilities = replace(storage.memory.capabilities, parallel_gets=2)
    at_once = most = walked = 0

    async def begin(method: str, name: str) -> None:
        nonlocal at_once, most, walked
        if name.startswith("packs/") and method != "list":
            at_once += 1
            walked += method == "get"
            most = max(most, at_once)
            await anyio.sleep(0.02)  # others begin meanwhile if they may

    async def end(method: str, name: str) -> None:
        nonlocal at_once
        if name.startswith("packs/") and method != "list":
            at_once -= 1

    opened = await storage.open(FaultyConnector(storage.memory, before=begin, after=end))
    summary = await opened.check(None, CheckOptions(workers=1))
    assert summary.clean and summary.packs >= 8
    assert walked and most == 2


async def test_files_are_shown_when_the_packs_are_done(source: Path) -> None:
    """The walk waits for the display to say so: it would for ever if that came after it."""
    storage, progress, waited = Storage(), Progress(), 0
    await (await storage.open()).backup([bytes(source)], ONE_WORKER)

    async def wait(method: str, name: str) -> None:
        nonlocal waited
        if method == "get" and name.startswith("packs/"):
            waited += 1
            with anyio.fail_after(60):
                while progress.phase != "files":  # noqa: ASYNC110
                    await anyio.sleep(0.01)

    opened = await storage.open(FaultyConnector(storage.memory, before=wait))
    summary = await opened.check(None, CheckOptions(workers=1), progress)
    assert summary.clean and waited
    assert progress.files == progress.files_total == summary.files > 0
