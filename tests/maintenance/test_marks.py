"""Marks that the storage has lost or damaged: nothing a writer relies on is swept, and there is a way on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.attempts.storage import ONE_WORKER, Storage
from tests.harness import Recorder
from tests.maintenance.scene import Scene
from tests.maintenance.scenery import PIECES, with_garbage

from coffret.connectors.faults import FaultyConnector
from coffret.engine import sealing
from coffret.engine.errors import Damaged, InTheWay, reported
from coffret.engine.maintenance_marks import list_marks
from coffret.engine.ops.maintenance import MaintenanceOptions
from coffret.engine.ops.repair import IndexRepairOptions, repair_index
from coffret.engine.records import encode
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("closed_mirrors")]
AN_HOUR = MaintenanceOptions(grace_s=3600)


async def marked(tmp_path: Path) -> Scene:
    """A repository in which the first of two snapshots is removed, and what it had is marked, and was seen."""
    scene = await Scene(tmp_path).begin(slice(0, 3), slice(3, 6))
    await scene.remove(0)
    for _ in range(2):
        assert (await scene.maintain(AN_HOUR)).sweep_in_s
    assert await scene.storage.names("trash/") == ["trash/1", "trash/1-seen"]
    return scene


async def flip(storage: Storage, name: str) -> None:
    body = await storage.memory.get(name)
    await storage.memory.put(name, [body[:-1], bytes([body[-1] ^ 1])])


async def is_clean(scene: Scene) -> bool:
    return (await (await scene.storage.open()).check()).clean


async def test_one_that_is_lost_while_a_writer_relies_on_what_it_named(tmp_path: Path) -> None:
    """The next has its number. What was seen of the first says nothing of who is at work now."""
    scene = await marked(tmp_path)
    memory = scene.storage.memory
    await memory.delete("trash/1")
    relied, go_on, refusals = anyio.Event(), anyio.Event(), []
    content = tmp_path / "content"
    content.write_bytes(b"".join(PIECES[0:3]) + os.urandom(1000))

    async def stop(method: str, name: str) -> None:
        if method == "put" and name.startswith("packs/"):  # all but the fresh end is there already
            relied.set()
            await go_on.wait()

    writer = await scene.storage.open(FaultyConnector(memory, before=stop))
    async with anyio.create_task_group() as group:
        group.start_soon(writer.backup, StreamSource(b"stream", f"cat {content}"), ONE_WORKER)
        await relied.wait()
        with pytest.raises(Exception) as raised:
            await scene.maintain()
        refusals.append(reported(raised.value))
        go_on.set()
    assert isinstance(refusals[0], InTheWay)
    scene.whole()
    await scene.maintain()
    scene.whole()
    [_, latest] = (await (await scene.storage.open()).commits()).snapshots
    assert await scene.restored(latest) == content.read_bytes()
    assert await is_clean(scene)


@pytest.mark.parametrize("what", ["mark", "seen", "both"])
async def test_one_that_can_t_be_read_ends_after_its_grace(tmp_path: Path, what: str) -> None:
    """Till then backups are refused, since nobody knows what it names; then what it named is looked for anew."""
    scene = await marked(tmp_path)
    storage = scene.storage
    for name in {"mark": ["trash/1"], "seen": ["trash/1-seen"], "both": ["trash/1", "trash/1-seen"]}[what]:
        await flip(storage, name)
    packs = await storage.names("packs/")
    if what != "seen":
        with pytest.raises(Exception) as raised:
            await scene.back_up(slice(0, 2))
        error = reported(raised.value)
        assert isinstance(error, Damaged) and "coffret at REPO maintenance" in error.remedy
    scene.now_s += 10
    waits = await scene.maintain(AN_HOUR)
    assert waits.sweep_in_s is not None and waits.sweep_in_s > 3500
    assert await storage.names("packs/") == packs
    scene.now_s += 3601
    summary = await scene.maintain(AN_HOUR)
    if what != "seen":
        assert any("trash/1 can't be read, and is ended" in note for note in scene.recorder.notes)
        assert (summary.swept_packs, summary.marked_packs > 0) == (0, True)
        scene.now_s += 3601
        summary = await scene.maintain(AN_HOUR)
    assert summary.swept_packs and len(await storage.names("packs/")) < len(packs)
    scene.whole()
    await scene.back_up(slice(0, 2))
    # What is over and can't be read is put anew by the repair of the index.
    assert await is_clean(scene) == (what == "seen")
    found = await repair_index(await storage.open(), IndexRepairOptions(), Recorder())
    assert found.renewed == [name for name in ("trash/1",) if what != "seen"]
    assert await is_clean(scene)
    assert (await scene.maintain()).nothing


async def test_junk_beside_an_open_one(tmp_path: Path) -> None:
    scene = await marked(tmp_path)
    await scene.storage.memory.put("trash/2", [b"junk" * 100])
    summary = await scene.maintain()
    assert summary.swept_packs
    assert not (await list_marks(scene.storage.memory)).open
    scene.whole()


async def test_the_end_of_an_earlier_one_is_lost(tmp_path: Path) -> None:
    """Two are open then: they are swept one after the other, and what is gone is not called lost."""
    scene = await marked(tmp_path)
    memory = scene.storage.memory
    assert (await scene.maintain()).swept_packs
    await scene.back_up(slice(6, 8))
    await scene.remove(1)
    assert (await scene.maintain(AN_HOUR)).marked_packs
    await memory.delete("trash/1-done")
    assert sorted((await list_marks(memory)).open) == [1, 2]
    summary = await scene.maintain()
    assert summary.swept_packs and not summary.missing_packs
    assert not (await list_marks(memory)).open
    scene.whole()
    assert await is_clean(scene)


@pytest.mark.parametrize("name", ["trash/1", "trash/1-seen", "trash/1-done"])
async def test_what_is_over_is_put_anew(tmp_path: Path, name: str) -> None:
    scene = await marked(tmp_path)
    assert (await scene.maintain()).swept_packs
    await flip(scene.storage, name)
    assert not await is_clean(scene)
    scene.opened = await scene.storage.open()
    dry = await repair_index(scene.opened, IndexRepairOptions(dry_run=True), Recorder())
    assert dry.renewed == [name] and not await is_clean(scene)
    assert (await repair_index(scene.opened, IndexRepairOptions(), Recorder())).renewed == [name]
    assert await is_clean(scene)
    assert not (await list_marks(scene.storage.memory)).open


async def test_an_open_one_is_not_put_anew(tmp_path: Path) -> None:
    scene = await marked(tmp_path)
    await flip(scene.storage, "trash/1-seen")
    before = await scene.storage.memory.get("trash/1-seen")
    assert not (await repair_index(await scene.storage.open(), IndexRepairOptions(), Recorder())).renewed
    assert await scene.storage.memory.get("trash/1-seen") == before


async def test_what_was_seen_need_not_say_of_which(tmp_path: Path) -> None:
    """As in repositories of before it did."""
    scene = await marked(tmp_path)
    name = "trash/1-seen"
    body = scene.opened.sealer.seal(sealing.MARK, name, bytes(16), encode({"attempts": b""}))
    await scene.storage.memory.put(name, [body])
    assert (await scene.maintain()).swept_packs
    assert await scene.storage.memory.get(name) == body


async def test_what_the_program_says(tmp_path: Path) -> None:
    program, source = with_garbage(tmp_path), tmp_path / "source"
    program("maintenance")
    mark = program.repository / "trash" / "1"
    mark.chmod(0o600)
    mark.write_bytes(mark.read_bytes()[:-1] + b"?")
    refused = program("backup", source, code=1)
    assert "trash/1, which names packs to be swept, can't be read" in refused.stderr
    assert "coffret at REPO maintenance" in refused.stderr
    told = program("check", code=4).stdout
    assert told.endswith("; run `coffret maintenance`, then `coffret repair index`\n")
    program("maintenance", "--dry-run", code=1)
    assert "what is marked can be swept in" in program("maintenance").stdout
    program("maintenance", "--grace", "0")
    program("backup", source)
    program("repair", "index")
    program("check")
