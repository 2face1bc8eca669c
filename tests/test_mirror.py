"""The index mirror: what it says is what the listed index objects say."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tests.mirror_samples import (
    HEADER,
    REPOSITORY,
    agrees,
    chunk,
    expected,
    files,
    index,
    name,
    refresh,
    small_runs,
    table,
)

from coffret.engine.mirror import Location, Mirror, attempt_of, file_system, is_network, mirror_folder
from coffret.engine.records import UNNAMED, Block, IndexObject, PackTable, pack_ref

pytestmark = pytest.mark.anyio


async def test_merge_and_look_up(tmp_path: Path) -> None:
    objects = {
        name(a): index({f"{a}.{p}": range(a * 50 + p * 7, a * 50 + p * 7 + 10) for p in range(5)}) for a in range(9)
    }
    async with await Mirror.open(tmp_path / "m", REPOSITORY) as mirror:
        assert await refresh(mirror, objects) == sorted(objects)
        await agrees(mirror, objects)
    async with await Mirror.open(tmp_path / "m", REPOSITORY) as mirror:
        assert await refresh(mirror, objects) == []
        await agrees(mirror, objects)
        assert mirror.why_private == ""


async def test_many_chunks_through_real_folding(tmp_path: Path) -> None:
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        objects = {}
        for attempt in range(6):
            numbers = range(attempt * 12_000, (attempt + 1) * 12_000 + 1000)
            objects[name(attempt)] = index({f"{attempt} {at}": numbers[at : at + 500] for at in range(0, 13_000, 500)})
            await refresh(mirror, objects)
        ids = [chunk(number) for number in range(-1000, 73_000)]
        assert (await mirror.sift(ids)).absent == list(range(1000))
        where = await mirror.locate(ids)
        assert [found.length if found else 0 for found in where[1000::97]] == list(range(1, 73_001, 97))
        # A part of them goes: its rows are purged when they are much of a run.
        for gone in (0, 2, 4):
            del objects[name(gone)]
        await refresh(mirror, objects)
        absent = (await mirror.sift(ids)).absent
        assert absent == [n for n in range(len(ids)) if chunk_is_gone(n - 1000)]
        rows = sum(path.stat().st_size for path in files(tmp_path, "*.run")) / 57
        assert rows < 13_000 * 3 * 1.4


def chunk_is_gone(number: int) -> bool:
    """Whether a chunk of the test above was only in attempts 0, 2 and 4: the others reach 1,000 into the next."""
    owner, within = divmod(number, 12_000)
    return number < 0 or (owner % 2 == 0 and not (within < 1000 and owner > 0))


async def test_index_objects_without_packs_or_chunks(tmp_path: Path) -> None:
    objects = {name(1): IndexObject([]), name(2): index({"empty": []}), name(3): index({"p": [1]})}
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        assert await refresh(mirror, objects) == sorted(objects)
        await agrees(mirror, objects)
        assert await refresh(mirror, objects) == []
        assert await mirror.locate([]) == []
        await agrees(mirror, objects)


async def test_unnamed_parts_of_a_block_are_no_chunks(tmp_path: Path) -> None:
    block = Block(64, 50, 34, 0, pack_ref(UNNAMED, 10) + pack_ref(chunk(1), 4) + pack_ref(UNNAMED, 20))
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, {name(1): IndexObject([PackTable(bytes(32), HEADER, 200, [block])])})
        assert await mirror.locate([chunk(1), UNNAMED]) == [
            Location(bytes(32), 200, HEADER, 64, 50, 34, 0, 10, 4),
            None,
        ]


async def test_ids_that_are_no_even_hashes(tmp_path: Path) -> None:
    """Crowded buckets cost time, never an answer."""
    ids = [number.to_bytes(32, "big") for number in range(1, 3000)] + [b"\xff" * 32]
    refs = b"".join(pack_ref(chunk_id, 1) for chunk_id in ids)
    held = IndexObject([PackTable(b"p" * 32, HEADER, 9, [Block(64, 9, len(ids), 0, refs)])])
    with small_runs():
        async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
            await refresh(mirror, {name(1): held, name(2): held})
            assert (await mirror.sift([*ids, b"\xfe" * 32])).absent == [len(ids)]
            assert [len(await mirror.locate_all(chunk_id)) for chunk_id in ids[:50]] == [2] * 50


async def test_marked_packs_hold_nothing_for_a_writer(tmp_path: Path) -> None:
    objects = {name(1): index({"a": [1, 2], "b": [2, 3]}), name(2): index({"c": [3, 4]})}
    marked = frozenset({table("b", []).pack, table("c", []).pack})
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
        ids = [chunk(n) for n in (1, 2, 3, 4, 5)]
        assert (await mirror.sift(ids)).absent == [4]
        assert (await mirror.sift(ids, marked=marked)).absent == [2, 3, 4]
        # A reader takes them where there is nothing else.
        found = await mirror.locate(ids, avoid=marked)
        assert [where and where.pack in marked for where in found] == [False, False, True, True, None]


async def test_pending_attempts_are_adopted_and_revoked_ones_ignored(tmp_path: Path) -> None:
    objects = {name(1): index({"a": [1, 2]}), name(2): index({"b": [2, 3]}), name(3): index({"c": [3, 4]})}
    settled, revoked = {attempt_of(name(1))}, {attempt_of(name(3))}
    ids = [chunk(n) for n in (1, 2, 3, 4)]
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        assert await refresh(mirror, objects, settled=settled, revoked=revoked) == [name(1), name(2)]
        sifted = await mirror.sift(ids)
        assert sifted.absent == [3]
        assert [(n, where.pack) for n, where in sifted.adopt] == [(2, table("b", []).pack)]
        # One that is pending may lie in a marked pack only: then it is absent like any other.
        marked = frozenset({table("b", []).pack})
        assert (await mirror.sift(ids, marked=marked)).absent == [2, 3]
        # The writer's own index object is sure when its attempt is among the settled.
        await mirror.merge([(name(1, 1), index({"b": [3]}))])
        assert (await mirror.sift(ids)).adopt == []
        await mirror.merge([(name(4), index({"d": [4]}))])
        assert [n for n, _ in (await mirror.sift(ids)).adopt] == [3]


async def test_an_index_object_replaced_by_maintenance(tmp_path: Path) -> None:
    objects = {name(n): index({f"{n}": [n, n + 1]}) for n in range(20)}
    async with await Mirror.open(tmp_path, REPOSITORY) as reader, await Mirror.open(tmp_path, REPOSITORY) as writer:
        await refresh(reader, objects)
        merged = {name(99): index({f"new {n}": [n] for n in range(5)})}
        await refresh(writer, merged)
        await agrees(writer, merged)
        # The reader's view is that of its own listing until it lists again: it may lack what is gone, never invent.
        truth = expected(objects)
        for found, chunk_id in zip(await reader.locate(list(truth)), truth, strict=True):
            assert found is None or found in truth[chunk_id]
        assert await refresh(reader, merged) == []
        await agrees(reader, merged)


async def test_another_repository_s_mirror_is_not_believed(tmp_path: Path) -> None:
    objects = {name(1): index({"a": [1]})}
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
    async with await Mirror.open(tmp_path, "another") as mirror:
        assert await refresh(mirror, objects) == [name(1)]
    assert mirror_folder(tmp_path, REPOSITORY, "/a") != mirror_folder(tmp_path, REPOSITORY, "/b")


async def test_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with await Mirror.open(tmp_path / "cache" / "m", REPOSITORY) as mirror:
            await refresh(mirror, {name(1): index({"a": [1]})})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache" / "m").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache" / "m").iterdir()} == {0o600}


async def test_a_private_mirror_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    objects = {name(1): index({"a": [1]})}
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file" / "m"):
        async with await Mirror.open(folder, REPOSITORY) as mirror:
            assert mirror.why_private
            await refresh(mirror, objects)
            await agrees(mirror, objects)
            assert len(files(tmp_path)) == 2
        assert [path.name for path in files(tmp_path)] == ["file"]


def test_network_file_systems_are_told_from_others() -> None:
    assert file_system(Path("/proc/self/no/such/folder")) == "proc"
    assert all(map(is_network, ("nfs", "nfs4", "cifs", "9p", "fuse.sshfs")))
    assert not any(map(is_network, ("", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "fuse.fuse-overlayfs")))
