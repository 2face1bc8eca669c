"""What maintenance waits for, refuses, ends, merges and leaves behind."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import Storage
from tests.maintenance.scene import Scene

from coffret.connectors.base import Capabilities
from coffret.connectors.errors import NotFound
from coffret.engine.attempt import Attempt
from coffret.engine.errors import Damaged, InTheWay, LeaseLost, UsageError
from coffret.engine.index import open_index
from coffret.engine.maintenance_marks import list_marks
from coffret.engine.ops.maintenance import MaintenanceOptions
from coffret.engine.snapshot import open_end

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("closed_mirrors")]


async def test_the_grace(tmp_path: Path) -> None:
    """By the storage's clock, from when the last attempt seen has ended."""
    scene = await Scene(tmp_path).begin(slice(0, 2), slice(2, 4))
    await scene.remove(0)
    day = MaintenanceOptions(grace_s=86400)
    first = await scene.maintain(day)
    assert first.marked_packs > 0
    assert first.sweep_in_s == pytest.approx(86400)
    packs = await scene.storage.names("packs/")
    scene.now_s += 86000
    again = await scene.maintain(day)
    assert (again.marked_packs, again.swept_packs) == (0, 0)
    assert again.sweep_in_s == pytest.approx(400)
    assert await scene.storage.names("packs/") == packs
    scene.now_s += 401
    last = await scene.maintain(day)
    assert (last.swept_packs, last.sweep_in_s) == (first.marked_packs, None)
    assert len(await scene.storage.names("packs/")) == len(packs) - last.swept_packs
    scene.whole()


async def test_a_lease_in_the_way(tmp_path: Path) -> None:
    scene = await Scene(tmp_path).begin(slice(0, 2), slice(2, 4))
    writer = Attempt(scene.storage.memory, scene.opened.sealer, scene.opened.mirror, what="backup")
    await writer.announce()
    await writer.begin()
    await scene.remove(0)
    packs = await scene.storage.names("packs/")
    for minutes in (0, 29):
        scene.now_s += minutes * 60
        error = await scene.refused()
        assert isinstance(error, InTheWay)
        assert error.exit_code == 11
        assert "a backup on" in str(error)
        assert len(str(error).splitlines()) == 1
        assert await scene.storage.names("packs/") == packs
    scene.now_s += 120
    summary = await scene.maintain()
    assert (summary.ended_attempts, summary.swept_packs > 0) == (1, True)
    assert not await scene.storage.names("leases/")
    with pytest.raises(LeaseLost):
        await writer.conclude()
    await writer.end()
    scene.whole()


async def test_swept_snapshots_leave_a_small_marker(tmp_path: Path) -> None:
    """Their names stay taken; and a copy that comes later, under another name, is there."""
    scene = await Scene(tmp_path).begin(slice(0, 2), slice(2, 4))
    [gone, _] = (await scene.opened.commits()).snapshots
    await scene.remove(0)
    await scene.maintain()
    name = f"snapshots/{gone.attempt.hex()}"
    data = await scene.storage.memory.get(name)
    assert open_end(scene.opened.sealer, name, data).outcome == "swept"
    assert len(data) < 200
    commits = await scene.opened.commits()
    assert gone.attempt.hex() in commits.committed
    assert gone.id in commits.removed
    await scene.back_up(slice(0, 2))
    await scene.maintain()
    scene.whole()


async def test_an_interrupted_backup(tmp_path: Path) -> None:
    """What it left can be taken up for as long as the grace; then it is swept."""
    scene = await Scene(tmp_path).begin(slice(0, 2))
    before = await scene.storage.names("packs/")
    attempt = await scene.back_up(slice(2, 4))
    commits = await scene.opened.commits()
    [name] = [f"snapshots/{each.attempt.hex()}" for each in commits.snapshots if each.id == attempt]
    await scene.storage.memory.delete(name)  # as if it had never come so far
    scene.opened.forget_commits()
    left = await scene.storage.names("packs/")
    day = MaintenanceOptions(grace_s=86400)
    assert (await scene.maintain(day)).nothing
    assert await scene.storage.names("packs/") == left
    scene.now_s += 86401
    summary = await scene.maintain(day)
    assert (summary.ended_attempts, summary.marked_packs) == (1, len(left) - len(before))
    scene.now_s += 86401
    await scene.maintain(day)
    assert sorted(await scene.storage.names("packs/")) == sorted(before)
    scene.whole()


@pytest.mark.parametrize("kind", ["snapshots/", "index/"])
async def test_what_cannot_be_read_stops_it(tmp_path: Path, kind: str) -> None:
    scene = await Scene(tmp_path).begin(slice(0, 2), slice(2, 4))
    await scene.remove(0)
    name = (await scene.storage.names(kind))[-1]
    data = bytearray(await scene.storage.memory.get(name))
    data[-1] ^= 1
    await scene.storage.memory.put(name, [data])
    before = await scene.storage.names("")
    scene.opened = await scene.storage.open()
    error = await scene.refused()
    assert isinstance(error, Damaged)
    assert name in str(error)
    assert await scene.storage.names("") == before


async def test_what_cannot_be_resolved_stops_it(tmp_path: Path) -> None:
    scene = await Scene(tmp_path).begin(slice(0, 2), slice(2, 4))
    kept = (await scene.opened.commits()).snapshots[1]
    await scene.remove(0)
    packs = await scene.storage.names("packs/")
    await scene.storage.memory.delete(packs[-2])
    before = await scene.storage.names("")
    error = await scene.refused()
    assert isinstance(error, Damaged)
    assert kept.short_id in str(error)
    assert await scene.storage.names("") == before


async def test_a_storage_without_exclusive_puts(tmp_path: Path) -> None:
    scene = await Scene(tmp_path).begin(slice(0, 2), slice(2, 4))
    await scene.remove(0)
    scene.storage.memory.capabilities = Capabilities(exclusive_puts=False)
    before = await scene.storage.names("")
    error = await scene.refused()
    assert isinstance(error, UsageError)
    assert "--exclusive" in error.remedy
    assert await scene.storage.names("") == before
    assert (await scene.maintain(MaintenanceOptions(grace_s=0, exclusive=True))).swept_packs > 0
    scene.whole()


async def test_index_objects_and_packs_are_merged(tmp_path: Path) -> None:
    """Many backups leave many small objects; the merged index has copies of the config."""
    scene = await Scene(tmp_path).begin()
    for number in range(20):
        await scene.back_up(slice(0, 0), random.Random(number).randbytes(300))
    packs, indexes = len(await scene.storage.names("packs/")), len(await scene.storage.names("index/"))
    assert indexes >= 20
    dry = await scene.maintain(MaintenanceOptions(grace_s=0, dry_run=True))
    assert len(await scene.storage.names("index/")) == indexes
    summary = await scene.maintain()
    assert summary.swept_packs == dry.marked_packs == packs
    assert len(await scene.storage.names("packs/")) == 2
    names = await scene.storage.names("index/")
    assert len(names) <= 2
    index = open_index(scene.opened.sealer, names[0], await scene.storage.memory.get(names[0]))
    assert index.config == scene.opened.config_data
    assert (await scene.maintain()).nothing
    scene.whole()


async def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    scene = await Scene(tmp_path).begin(slice(0, 2), slice(2, 4))
    await scene.remove(0)
    before = dict(scene.storage.memory._objects)
    summary = await scene.maintain(MaintenanceOptions(dry_run=True))
    assert summary.marked_packs > 0
    assert scene.storage.memory._objects == before


async def test_a_listing_is_no_moment(tmp_path: Path) -> None:
    """Who finds what was seen of a mark, and not the mark, takes the mark's own number, and finds it taken."""
    storage = Storage()
    await storage.memory.put("trash/1-seen", [b""])
    marks = await list_marks(storage.memory)
    assert (marks.top, marks.open) == (0, {})
    with pytest.raises(NotFound):
        await storage.memory.stat("trash/1")
