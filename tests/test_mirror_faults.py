"""The index mirror when its files are damaged, its process is killed, or others use it at the same time."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from tests.mirror_samples import (
    HEADER,
    REPOSITORY,
    agrees,
    chunk,
    files,
    index,
    name,
    refresh,
    small_runs,
    table,
    two_packs,
)

from coffret.engine.errors import CoffretError, Damaged, OutOfSpace
from coffret.engine.mirror import Mirror, attempt_of
from coffret.engine.mirror_store import Store
from coffret.engine.records import Block, IndexObject, PackTable

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio


async def test_a_folder_removed_while_in_use(tmp_path: Path) -> None:
    objects = {name(n): index({f"{n}": [n]}) for n in range(5)}
    folder = tmp_path / "m"
    async with await Mirror.open(folder, REPOSITORY) as mirror:
        await refresh(mirror, objects)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        await agrees(mirror, objects)
        await mirror.merge([(name(7), index({"7": [7]}))])
        # What was in it is gone with it, and nothing of it is said to be there under the new one's numbers.
        assert list(mirror.objects) == [name(7)]
        assert (await mirror.sift([chunk(n) for n in (0, 1, 7)])).absent == [0, 1]
        objects[name(7)] = index({"7": [7]})
        assert await refresh(mirror, objects) == [name(n) for n in range(5)]
        await agrees(mirror, objects)


def damaged_sizes(size: int) -> set[int]:
    """Lengths a run's file might be left with: none, within header, rows, packs and table, page ends, and too long."""
    return {0, 1, 113, 114, 115, 171, 4095, 4096, size // 3, size // 2, size - 16_388, size - 4, size - 1, size + 1}


async def test_a_run_of_another_size_is_merged_again(tmp_path: Path) -> None:
    objects = {name(n): index({f"{n}.{p}": [n * 40 + p, p] for p in range(40)}) for n in range(5)}
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
    [run] = files(tmp_path, "*.run")
    whole, manifest = run.read_bytes(), (tmp_path / "manifest").read_bytes()
    for size in sorted(damaged_sizes(len(whole))):
        run.write_bytes(whole[:size].ljust(size, b"\0"))
        (tmp_path / "manifest").write_bytes(manifest)
        async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
            assert await refresh(mirror, objects) == sorted(objects), size
            await agrees(mirror, objects)


@pytest.mark.parametrize("missing", ["file", "token", "other order"])
async def test_a_run_that_is_not_the_one_named(tmp_path: Path, missing: str) -> None:
    objects = {name(n): index({f"{n}": [n]}) for n in range(5)}
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
    [run] = files(tmp_path, "*.run")
    whole = run.read_bytes()
    if missing == "file":
        run.unlink()
    elif missing == "token":
        run.write_bytes(whole[:8] + bytes(16) + whole[24:])
    else:
        run.write_bytes(whole[7::-1] + whole[8:])
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        assert await refresh(mirror, objects) == sorted(objects)
        await agrees(mirror, objects)


async def test_only_what_a_bad_run_held_is_merged_again(tmp_path: Path) -> None:
    with small_runs():
        large = {name(1): index({f"{p}": range(p * 5, p * 5 + 5) for p in range(20)})}
        objects = large | {name(2): index({"x": [1000]})}
        async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
            await refresh(mirror, large)
            await refresh(mirror, objects)
        runs = sorted(files(tmp_path, "*.run"), key=lambda path: path.stat().st_size)
        assert len(runs) == 2
        runs[0].unlink()
        async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
            assert await refresh(mirror, objects) == [name(2)]
            await agrees(mirror, objects)


async def test_a_manifest_cut_short_or_altered_anywhere(tmp_path: Path) -> None:
    objects = {name(n): index({f"{n}": [n]}) for n in range(2)}
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
    whole = (tmp_path / "manifest").read_bytes()
    for at in range(len(whole)):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            (tmp_path / "manifest").write_bytes(data)
            assert not Store(tmp_path, REPOSITORY).load()[0].objects
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        assert await refresh(mirror, objects) == sorted(objects)
        await agrees(mirror, objects)


async def test_a_run_altered_anywhere_kills_nobody(tmp_path: Path) -> None:
    """Where the disk fails an answer may be wrong, as it says nothing of the repository: chunks are always verified."""
    objects = {name(n): index({f"{n}": [n]}) for n in range(2)}
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
    [run] = files(tmp_path, "*.run")
    whole = run.read_bytes()
    for at in [*range(0, 400, 3), *range(len(whole) - 20, len(whole))]:
        run.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
            await mirror.reconcile(list(objects))
            ids = [chunk(n) for n in range(2)]
            await mirror.sift(ids, marked=frozenset([bytes(32)]))
            await mirror.locate(ids)


async def test_a_damaged_table_found_while_folding(tmp_path: Path) -> None:
    objects = {name(n): index({f"{n}": [n]}) for n in range(2)}
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
        [run] = files(tmp_path, "*.run")
        whole = run.read_bytes()
        for wild in (b"\0\0\0\0", b"\xff\xff\xff\x7f"):
            run.write_bytes(whole[:-4] + wild)
            objects[name(len(objects))] = index({"x": [7]})
            with pytest.raises(CoffretError, match="damaged"):
                await refresh(mirror, objects)
            assert await refresh(mirror, objects) == sorted(objects)
            await agrees(mirror, objects)
            [run] = files(tmp_path, "*.run")
            whole = run.read_bytes()


def test_a_manifest_overtaken_between_reading_it_and_its_runs(tmp_path: Path) -> None:
    with small_runs():
        other = Store(tmp_path, REPOSITORY)
        list(other.change([(name(1), two_packs(1))], {}))

        class Overtaken(Store):
            """Another process folds the run away at the worst moment."""

            def _read(self) -> bytes:
                data = super()._read()
                if len(other.load()[0].objects) == 1:
                    list(other.change([(name(2), two_packs(2))], {}))
                return data

        assert set(Overtaken(tmp_path, REPOSITORY).load()[0].objects) == {name(1), name(2)}


async def test_impossible_numbers_change_nothing(tmp_path: Path) -> None:
    objects = {name(1): index({"a": [1]})}
    good = table("b", [2]).blocks
    wrong = [
        PackTable(b"short", HEADER, 1, good),
        PackTable(bytes(32), b"short", 1, good),
        PackTable(bytes(32), HEADER, -1, good),
        PackTable(bytes(32), HEADER, 1, [Block(1 << 32, 1, 1, 0, good[0].refs)]),
        PackTable(bytes(32), HEADER, 1, [Block(1, 1, 1, 300, good[0].refs)]),
        PackTable(bytes(32), HEADER, 1, [Block(1, 1, 1, 0, b"no refs")]),
    ]
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
        before = files(tmp_path)
        for bad in wrong:
            with pytest.raises(Damaged):
                await mirror.merge([(name(2), index({"b": [2]})), (name(3), IndexObject([bad]))])
            await agrees(mirror, objects)
        assert files(tmp_path) == before


def test_a_change_given_up_at_any_step_leaves_no_trace(tmp_path: Path) -> None:
    with small_runs():
        store = Store(tmp_path, REPOSITORY)
        list(store.change([(name(1), index({"a": range(10)}))], {}))
        before = files(tmp_path)
        many = index({f"{p}": range(p * 20, p * 20 + 20) for p in range(1, 10)})
        for count in itertools.count():
            change = store.change([(name(2), many)], {})
            steps = sum(1 for _ in itertools.islice(change, count))
            if steps < count:
                break
            change.close()
            assert files(tmp_path) == before
            assert list(store.load()[0].objects) == [name(1)]
        assert count > 10
        assert list(store.load()[0].objects) == [name(1), name(2)]


async def test_a_merge_that_is_cancelled(tmp_path: Path) -> None:
    objects = {name(1): index({"a": range(10)})}
    many = index({f"{p}": range(p * 100, p * 100 + 100) for p in range(1, 40)})
    with small_runs():
        async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
            await refresh(mirror, objects)
            with anyio.move_on_after(0.02):
                await mirror.merge([(name(2), many)])
            truth = {held: objects.get(held, many) for held in mirror.objects}
            await refresh(mirror, truth)
            await agrees(mirror, truth)


async def test_what_is_not_to_be_believed_any_more_outlives_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only adds may be lost with the manifest's new name; a doubt, or a pack known to be bad, may not."""
    folder, named, flushed = tmp_path / "m", b"", []
    flush = os.fsync

    def flushing(fd: int) -> None:
        flush(fd)
        if os.path.samestat(os.fstat(fd), folder.stat()):
            flushed.append((folder / "manifest").read_bytes())

    monkeypatch.setattr(os, "fsync", flushing)
    async with await Mirror.open(folder, REPOSITORY) as mirror:
        await refresh(mirror, {name(1): index({"1": [1]})})
        assert not flushed
        for change in (mirror.doubt, lambda: mirror.judge(frozenset({b"p" * 32}), frozenset())):
            await change()
            assert flushed
            assert (folder / "manifest").read_bytes() not in (named, *flushed[:-1])
            named = flushed[-1]
            assert named == (folder / "manifest").read_bytes()
    assert len(flushed) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


async def test_a_full_disk(small_disk: Path) -> None:
    async with await Mirror.open(small_disk / "m", REPOSITORY) as mirror:
        objects = {name(1): index({"a": range(10)})}
        await refresh(mirror, objects)
        with pytest.raises(OutOfSpace) as caught:
            await mirror.merge([(name(2), index({"b": range(30_000)}))])
        assert "--cache-dir" in caught.value.remedy
        await agrees(mirror, objects)
        objects[name(3)] = index({"c": range(20)})
        await refresh(mirror, objects)
        await agrees(mirror, objects)


async def test_a_folder_that_can_t_be_read_is_one_clear_error(tmp_path: Path) -> None:
    async with await Mirror.open(tmp_path / "m", REPOSITORY) as mirror:
        (tmp_path / "m" / "manifest").mkdir()
        with pytest.raises(CoffretError) as caught:
            await mirror.reconcile([name(1)])
        assert "--no-cache" in caught.value.remedy


WRITER = """
import sys, anyio
from pathlib import Path
from coffret.engine.mirror import Mirror
from tests.mirror_samples import REPOSITORY, name, small_runs, two_packs

async def main(folder, first, count, step):
    async with await Mirror.open(Path(folder), REPOSITORY) as mirror:
        names = [name(n) for n in range(10_000)]
        await mirror.reconcile(names, settled=())
        for n in range(int(first), int(first) + int(count) * int(step), int(step)):
            await mirror.merge([(name(n), two_packs(n))])
            print(n, flush=True)

with small_runs():
    anyio.run(main, *sys.argv[1:])
"""


def start_writer(folder: Path, first: int, count: int, step: int = 1) -> subprocess.Popen[str]:
    """A process that merges index objects first, first + step, …, and prints the number of each when it is in."""
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / ".pkg"), str(root)])}
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(count), str(step)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


async def agrees_with_writers(folder: Path, least: set[int]) -> set[int]:
    """Check that what the mirror holds is whole, and at least `least`; return it."""
    names = {name(n): n for n in range(1000)}
    async with await Mirror.open(folder, REPOSITORY) as mirror:
        await mirror.reconcile(list(names), settled=set(map(attempt_of, names)))
        held = {names[found] for found in mirror.objects}
        assert least <= held
        await agrees(mirror, {name(n): two_packs(n) for n in held})
    return held


async def test_kill_9_while_merging(tmp_path: Path) -> None:
    rng, first = random.Random(5), 0
    for _ in range(4):
        writer = start_writer(tmp_path, first, 1000)
        assert writer.stdout is not None
        done = {int(await anyio.to_thread.run_sync(writer.stdout.readline))}
        await anyio.sleep(rng.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        done |= {int(line) for line in await anyio.to_thread.run_sync(writer.stdout.readlines)}
        writer.wait()
        writer.stdout.close()
        held = await agrees_with_writers(tmp_path, done)
        first = max(held) + 1
    # The next change, which the killed lock does not hold up, removes what was left half done.
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await mirror.reconcile([name(n) for n in range(first)], settled=())
        await mirror.merge([(name(999), two_packs(999))])
    manifest, _ = Store(tmp_path, REPOSITORY).load()
    assert {path.name for path in files(tmp_path, "*.run")} == {info.file_name for info in manifest.runs}


async def test_processes_that_merge_at_the_same_time(tmp_path: Path) -> None:
    objects = {name(500): two_packs(500)}
    async with await Mirror.open(tmp_path, REPOSITORY) as mirror:
        await refresh(mirror, objects)
        writers = [start_writer(tmp_path, first, 25, 2) for first in (0, 1)]
        while any(writer.poll() is None for writer in writers):
            # Our view does not change with theirs, though they fold our run away.
            await agrees(mirror, objects)
            await anyio.sleep(0.02)
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.close()
        assert [writer.returncode for writer in writers] == [0, 0]
        await agrees(mirror, objects)
        objects[name(501)] = two_packs(501)
        await mirror.merge([(name(501), objects[name(501)])])
        assert set(mirror.objects) == set(objects)
        assert (await mirror.sift([chunk(3)])).absent == [0]
    assert await agrees_with_writers(tmp_path, set()) == {*range(50), 500, 501}
