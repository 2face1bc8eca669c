"""Damage in packs that are being swept: it costs what it hit, holds nothing else up, and nothing is thrown away."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.harness import Program, Recorder
from tests.maintenance.oracle import Oracle
from tests.maintenance.scene import Scene
from tests.maintenance.scenery import PIECES, with_garbage
from tests.test_json import validate_all

from coffret.engine.catalog_reader import Catalog
from coffret.engine.maintenance_marks import list_marks, read_mark
from coffret.engine.ops.maintenance import MaintenanceOptions
from coffret.engine.ops.repair import IndexRepairOptions, repair_index
from coffret.engine.ops.rm import remove
from coffret.engine.packfile import pack_name
from coffret.engine.records import iter_refs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.attempts.storage import Storage

    from coffret.engine.ops.check import CheckSummary
    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("closed_mirrors")]


async def marked_packs(storage: Storage, opened: Repository) -> list[str]:
    [info] = (await list_marks(storage.memory)).open.values()
    return [pack_name(pack) for pack in await read_mark(storage.memory, opened.sealer, info)]


async def damage(storage: Storage, name: str) -> bytes:
    """Flip a bit in the first block of a pack; return what was there."""
    body = await storage.memory.get(name)
    await storage.memory.put(name, [body[:100], bytes([body[100] ^ 1]), body[101:]])
    return body


async def test_what_can_t_be_copied_is_kept(tmp_path: Path) -> None:
    scene = await Scene(tmp_path).begin(slice(0, 3), slice(2, 4), slice(4, 6))
    storage = scene.storage
    packs = set(await storage.names("packs/"))
    first, hurt, other = await scene.snapshots()
    await remove(scene.opened, [first])
    assert (await scene.maintain(MaintenanceOptions(grace_s=3600))).to_copy_bytes > 0
    marked = await marked_packs(storage, scene.opened)
    bodies = {name: await storage.memory.get(name) for name in marked}
    large = max(marked, key=lambda name: len(bodies[name]))  # of content
    await damage(storage, large)
    damaged = await storage.memory.get(large)
    scene.now_s += 3601
    summary = await scene.maintain()
    assert (summary.damaged_packs, summary.swept_packs) == ([large], len(marked))
    [(path, reason)] = scene.recorder.faults.items()
    assert path == large.encode() and "is damaged at 64" in reason
    left = set(await storage.names("packs/"))
    [kept] = left - packs
    assert not left & set(marked) and kept in reason
    assert (await storage.memory.get(kept))[:-16] == damaged
    assert not Oracle(storage, scene.opened.sealer).violation()
    assert await scene.restored(other) == b"".join(PIECES[4:6])
    assert await scene.restored(hurt) is None
    # It is over, and is not begun again.
    assert (await scene.maintain()).nothing
    assert set(await storage.names("packs/")) == left
    checked = await (await storage.open()).check()
    assert set(checked.damaged_snapshots) == {hurt.id}


async def test_who_does_not_know_of_it_keeps_it_again(tmp_path: Path) -> None:
    """Another machine may choose what was kept, since most of it is garbage; once in a run at most."""
    scene = await Scene(tmp_path).begin(slice(0, 3), slice(2, 4))
    storage = scene.storage
    first, hurt = await scene.snapshots()
    await remove(scene.opened, [first])
    await scene.maintain(MaintenanceOptions(grace_s=3600))
    large = max(await marked_packs(storage, scene.opened), key=lambda name: len(storage.memory._objects[name][0]))
    whole = await damage(storage, large)
    damaged = await storage.memory.get(large)
    scene.now_s += 3601
    await scene.maintain()
    scene.opened = await storage.open()
    assert len((await scene.maintain()).damaged_packs) <= 1
    assert (await scene.maintain()).nothing
    assert [name for name in await storage.names("packs/") if storage.memory._objects[name][0].startswith(damaged)]
    # It is put back from a copy of the repository.
    await storage.memory.put(large, [whole])
    await repair_index(await storage.open(), IndexRepairOptions(), Recorder())
    assert await scene.restored(hurt) == b"".join(PIECES[2:4])
    await scene.opened.check()
    summary = await scene.maintain()
    assert summary.swept_packs and not summary.damaged_packs
    assert await scene.restored(hurt) == b"".join(PIECES[2:4])
    assert (await (await storage.open()).check()).clean


async def test_it_is_sought_in_other_marked_packs(tmp_path: Path) -> None:
    """Of two copies, both to be swept, the one that was chosen to be copied is damaged."""
    scene = await Scene(tmp_path).begin(slice(0, 3))
    storage = scene.storage
    await scene.opened.mirror.judge(await bad_packs(storage), frozenset())  # so that all is stored once more
    await scene.back_up(slice(0, 3))
    await scene.back_up(slice(2, 3))
    snapshots = await scene.snapshots()
    scene.opened = await storage.open()
    await remove(scene.opened, snapshots[:2])
    await scene.maintain(MaintenanceOptions(grace_s=3600))
    large = [name for name in await marked_packs(storage, scene.opened) if len(await storage.memory.get(name)) > 4000]
    assert len(large) == 2
    await damage(storage, min(large))
    scene.now_s += 3601
    summary = await scene.maintain()
    assert summary.swept_packs and not summary.damaged_packs
    assert await scene.restored(snapshots[2]) == PIECES[2]
    assert (await (await storage.open()).check()).clean


@pytest.mark.parametrize("how", ["missing", "cut short", "flipped"])
async def test_what_nothing_needs_is_gone_for_good(tmp_path: Path, how: str) -> None:
    """A check that names a pack for ever would hide the day on which something is lost."""
    scene = await Scene(tmp_path).begin(slice(0, 3), slice(3, 6))
    memory = scene.storage.memory
    first, second = await scene.snapshots()
    [pack] = await holding(scene, first)
    await scene.remove(0)
    body = await memory.get(pack)
    if how == "missing":
        await memory.delete(pack)
    elif how == "cut short":
        await memory.put(pack, [body[:1000]])
    else:
        await damage(scene.storage, pack)
    checked = await (await scene.storage.open()).check()
    assert (checked.damaged_packs, checked.damaged_snapshots) == ([pack], [])
    marked = await scene.maintain(MaintenanceOptions(grace_s=3600))
    assert pack in await marked_packs(scene.storage, scene.opened)
    assert (await scene.maintain(MaintenanceOptions(grace_s=3600))).missing_packs == 0
    scene.now_s += 3601
    swept = await scene.maintain(MaintenanceOptions(grace_s=3600))
    assert swept.missing_packs == (how == "missing")
    assert swept.swept_packs + swept.missing_packs == marked.marked_packs
    assert (await scene.maintain()).nothing
    assert (await (await scene.storage.open()).check()).clean
    assert await scene.restored(second) == b"".join(PIECES[3:6])
    scene.whole()


async def test_damage_in_what_nothing_needs_of_a_pack(tmp_path: Path) -> None:
    """All else of it is copied, though it is known to be damaged; where something is needed it is left alone."""
    scene, content = await Scene(tmp_path).begin(), os.urandom(6 << 20)
    storage = scene.storage
    await scene.back_up(slice(0), content)
    [first] = await scene.snapshots()
    # Of a pack with several blocks one is needed: that in which the second snapshot's content lies.
    blocks = await layout(scene, first)
    packs = [name for name, _ in blocks]
    pack = max(packs, key=packs.count)
    needed, idle, *_ = (offset for name, offset in blocks if name == pack)
    begin, end = blocks[pack, needed]
    content = content[begin + (end - begin) // 3 : end - (end - begin) // 3]
    await scene.back_up(slice(0), content)
    [_, second] = await scene.snapshots()
    await scene.remove(0)
    body = await storage.memory.get(pack)

    async def checked() -> CheckSummary:
        return await scene.opened.check()

    async def flip(at: int) -> None:
        await storage.memory.put(pack, [body[: at + 10], bytes([body[at + 10] ^ 1]), body[at + 11 :]])

    await flip(needed)
    assert (await checked()).damaged_snapshots == [second.id]
    await scene.maintain()
    assert pack in await storage.names("packs/")
    await storage.memory.put(pack, [body])
    assert (await checked()).clean
    await flip(idle)
    found = await checked()
    assert (found.damaged_packs, found.damaged_snapshots) == ([pack], [])
    summary = await scene.maintain()
    assert pack not in await storage.names("packs/")
    assert summary.swept_packs and not summary.damaged_packs
    assert (await checked()).clean
    assert (await (await storage.open()).check()).clean
    assert await scene.restored(second) == content


async def layout(scene: Scene, snapshot: Snapshot) -> dict[tuple[str, int], tuple[int, int]]:
    """Which part of a snapshot's one file lies in which block, by pack and offset there."""
    catalog = Catalog(snapshot.header.catalog, snapshot.header.depth, scene.opened.fetcher().load)
    [file] = [each async for _, entries in catalog.walk(b"") for each in entries if each.name == b"stream"]
    parts: dict[tuple[str, int], tuple[int, int]] = {}
    end = 0
    async for refs in catalog.file_refs(file):
        for chunk_id, length in iter_refs(refs):
            [at] = await scene.opened.mirror.locate([chunk_id])
            assert at is not None
            begin, end = end, end + length
            parts[pack_name(at.pack), at.offset] = parts.get((pack_name(at.pack), at.offset), (begin, 0))[0], end
    return parts


async def holding(scene: Scene, snapshot: Snapshot) -> set[str]:
    """The packs of its content."""
    packs = set()
    async for _, entries in scene.opened.entries(snapshot, b"", recursive=True):
        for entry in entries:
            ids = [chunk_id for chunk_id, _ in iter_refs(entry.content)]
            packs |= {pack_name(at.pack) for at in await scene.opened.mirror.locate(ids) if at}
    return packs


async def test_what_the_program_says(tmp_path: Path) -> None:
    """One line that names the pack, and an exit code; the day after all is as it should be but for that."""
    program, source = Program(tmp_path), tmp_path / "source"
    program("create", "--no-encryption")
    for kept, gone in ((b"kept" * 1000, os.urandom(200_000)), (b"kept" * 1000, b"")):
        source.mkdir(exist_ok=True)
        (source / "kept").write_bytes(kept)
        (source / "gone").write_bytes(gone)
        program("backup", source)
    program("rm", program("ls", "--json").of_type("item")[0]["snapshot_id"])
    program("maintenance")
    hurt = max((program.repository / "packs").glob("*/*"), key=lambda path: path.stat().st_size)
    with hurt.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    told = program("maintenance", "--grace", "0", code=3)
    (line,) = [line for line in told.stderr.splitlines() if "is damaged" in line]
    assert line.startswith(f"maintenance: packs/{hurt.parent.name}/{hurt.name}: is damaged at 64: ")
    assert "kept what can't be read of 1 damaged pack" in told.stdout
    assert not hurt.exists()
    again = program("maintenance", "--grace", "0", "--json")
    validate_all(again, summary="summary of maintenance")
    assert again.summary["damaged_packs"] == []
    assert program("check", code=4).stderr


async def bad_packs(storage: Storage) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(name.rpartition("/")[2]) for name in await storage.names("packs/"))


async def test_what_the_program_says_of_what_nothing_needs(tmp_path: Path) -> None:
    program = with_garbage(tmp_path)
    packs = sorted((program.repository / "packs").glob("*/*"), key=lambda path: path.stat().st_mtime_ns)
    lost = max(packs[:2], key=lambda path: path.stat().st_size)  # the removed snapshot's content, beside its catalog
    lost.unlink()
    told = program("check", code=4).stdout
    assert told == "check: found damage: 1 pack, and nothing is lost by it; `coffret maintenance` takes it away\n"
    assert "forgot 1 missing pack that no snapshot needs" in program("maintenance", "--grace", "0").stdout
    assert program("check").stdout.endswith("completed successfully\n")
