"""Space comes back, and nothing else goes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import ONE_WORKER, Storage, restores
from tests.fault_harness import make_source

from coffret.engine.ops.maintenance import MaintenanceOptions, MaintenanceSummary, maintain
from coffret.engine.ops.rm import remove
from coffret.engine.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.engine.repository import Repository

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("closed_mirrors")]

NOW = MaintenanceOptions(grace_s=0)


async def maintained(opened: Repository, options: MaintenanceOptions = NOW) -> MaintenanceSummary:
    return await maintain(opened, options, Progress())


async def size(storage: Storage) -> int:
    return sum([info.size_bytes async for info in storage.memory.list("")])


async def backed_up(opened: Repository, source: Path) -> str:
    return (await opened.backup([bytes(source)], ONE_WORKER)).snapshot.id


def rewrite(source: Path, seed: int, files: int) -> None:
    rng = random.Random(seed)
    for path in sorted(path for path in source.rglob("file*"))[:files]:
        path.write_bytes(rng.randbytes(rng.randrange(1, 60_000)))


async def test_nothing_to_do(tmp_path: Path) -> None:
    storage = Storage()
    opened = await storage.open()
    assert (await maintained(opened)).nothing
    source = make_source(tmp_path / "source")
    await backed_up(opened, source)
    before = await storage.names("")
    assert (await maintained(opened)).nothing
    assert await storage.names("") == before


async def test_space_comes_back(tmp_path: Path) -> None:
    """Of snapshots that were removed, whole packs and parts of packs: to within 5 % of a fresh repository."""
    storage, source = Storage(), make_source(tmp_path / "source", files=200, large_bytes=3 << 20)
    opened = await storage.open()
    ids = []
    for number in range(6):
        rewrite(source, number, 150)
        (source / "large").write_bytes(random.Random(number).randbytes(3 << 20))
        ids.append(await backed_up(opened, source))
    full = await size(storage)
    commits = await opened.commits()
    await remove(opened, [each for each in commits.snapshots if each.id != ids[-1]])
    summary = await maintained(opened)
    assert summary.swept_packs > 0
    assert summary.sweep_in_s is None
    fresh = Storage()
    await backed_up(await fresh.open(), source)
    assert await size(storage) <= 1.05 * await size(fresh) < full / 3
    assert await restores(storage, source)
    assert (await (await storage.open()).check()).clean
    again = await maintained(opened)
    assert (again.marked_packs, again.swept_packs) == (0, 0)
