"""A tree goes into a repository and comes out as it was; and the second time what did not change is not read."""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.harness import IS_ROOT, NOBODY, Program, Recorder, needs_root, repository, scratch
from tests.trees import build, describe, differences, make_hostile_tree, remove_tree, trees

from coffret.engine.ops.backup import BackupOptions, BackupSummary
from coffret.engine.ops.restore import RestoreOptions
from coffret.engine.pipeline import Limits
from coffret.engine.settings import COMPRESSION_LEVELS, RACY_NS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.trees import Directory

    from coffret.engine.repository import Repository

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def quiet_place() -> Iterator[Path]:
    """Where fewer others make files than where temporary files go by default."""
    with scratch(parent=Path("/var/tmp")) as path:
        yield path


async def back_up(
    opened: Repository, *paths: Path, progress: Recorder | None = None, **options: object
) -> BackupSummary:
    """Back up with one worker, which is all that small trees need."""
    chosen = BackupOptions(limits=Limits(workers=1), **options)  # type: ignore[arg-type]
    return await opened.backup([os.fsencode(path) for path in paths], chosen, progress)


async def comes_back(opened: Repository, made: BackupSummary, source: Path, target: Path, *, sparse: bool) -> None:
    """Restore into a new directory and compare; it is removed again."""
    progress = Recorder()
    summary = await opened.restore(
        made.snapshot, os.fsencode(target), options=RestoreOptions(sparse=sparse), progress=progress
    )
    assert progress.faults == {}
    assert summary.errors == 0
    # Without --sparse a hole may come back as zeros, which is the same content.
    ignore = () if sparse else ("extents",)
    assert differences(describe(source), describe(target), ignore=ignore) == []
    remove_tree(target)


class TestHostileTree:
    """The program on a tree of everything, as root and as another user, encrypted and not."""

    @pytest.mark.parametrize("uid", [pytest.param(0, marks=needs_root), NOBODY], ids=["root", "nobody"])
    def test_comes_back(self, uid: int) -> None:
        if not IS_ROOT:
            uid = os.geteuid()
        with scratch(uid=uid) as place:
            program = Program(place, uid=uid)
            if uid == 0:
                program = program.with_environment(COFFRET_PASSPHRASE="correct horse")
            refused = self.make(place / "source", uid)
            expected = describe(place / "source")
            program("create", *(() if uid == 0 else ("--no-encryption",)))
            made = program.backup("source")
            assert made["errors"] == 0
            program("check")
            target = place / "target"
            outcome = program("restore", "--json", "--sparse", "--to", target, "latest")
            assert outcome.summary["errors"] == 0
            assert differences(expected, describe(target)) == []
            notes = [message["note"] for message in outcome.of_type("status") if "note" in message]
            assert len(notes) == (uid != 0)
            remove_tree(target)
            if "hard links" not in refused:
                assert expected[b"links/first"].links
            program("restore", "--to", target, "latest")
            assert differences(expected, describe(target), ignore=["extents"]) == []

    @staticmethod
    def make(path: Path, uid: int) -> frozenset[str]:
        """Make the tree, as its owner: in a process of its own if that is another user."""
        if uid == os.geteuid():
            return make_hostile_tree(path, seed=3, root_user=IS_ROOT)
        pid = os.fork()
        if not pid:
            status = 1
            with suppress(BaseException):
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                make_hostile_tree(path, seed=3, root_user=False)
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        return frozenset()


@needs_root
def test_what_root_backed_up_is_restored_by_another_user() -> None:
    with scratch() as place:
        root, nobody = Program(place), Program(place / "nobody", uid=NOBODY)
        root.home.chmod(0o755)
        nobody.home.mkdir()
        os.chown(nobody.home, NOBODY, NOBODY)
        source = place / "source"
        source.mkdir()
        for name, mode in (("closed", 0), ("write-only", 0o300), ("set-id", 0o2777)):
            (source / name / "below").mkdir(parents=True)
            (source / name / "below" / "file").write_text(name)
            (source / name).chmod(mode)
        files = (("roots", 0, 0o6755), ("own", NOBODY, 0o4711), ("sticky", 5, 0o1640), ("read-only", 0, 0o444))
        for name, uid, mode in files:
            (source / name).write_text(name)
            os.chown(source / name, uid, uid)
            (source / name).chmod(mode)
            os.setxattr(source / name, "user.kept", b"1")
        os.setxattr(source / "roots", "trusted.left-out", b"1")
        root("create", "--no-encryption")
        root.backup(source)
        for path in (root.repository, *root.repository.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        nobody = nobody.with_environment(COFFRET_REPOSITORY=str(root.repository))
        outcome = nobody("restore", "--json", "--to", "target", "latest")
        notes = [message["note"] for message in outcome.of_type("status") if "note" in message]
        assert notes == ["owners are not restored, since this is not root"]
        expected = describe(source)
        expected[b"set-id"] = replace(expected[b"set-id"], mode=0o777)
        expected[b"roots"] = replace(expected[b"roots"], mode=0o755, xattrs={"user.kept": b"1"})
        assert differences(expected, describe(nobody.home / "target"), ignore=["uid", "gid"]) == []
        assert {node.uid for node in describe(nobody.home / "target").values()} == {NOBODY}
        quiet = nobody("restore", "--json", "--no-owner", "--to", "again", "latest")
        assert not [message for message in quiet.of_type("status") if "note" in message]


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_a_tree_deeper_than_files_may_be_open(place: Path) -> None:
    """Beside the way down there is a directory at each level, so that a restore goes up and down again."""
    level = place / "source"
    for number in range(300):
        (level / "beside").mkdir(parents=True)
        (level / "beside" / "file").write_text(f"{number}")
        level /= "d"
    program = Program(place, prefix=("prlimit", "--nofile=100"))
    program("create", "--no-encryption")
    program.backup("source")
    program("restore", "--to", "target", "latest")
    assert differences(describe(place / "source"), describe(place / "target")) == []


@pytest.mark.anyio
async def test_every_compression(place: Path) -> None:
    source = place / "source"
    source.mkdir()
    noise = Random(17).randbytes(2 * MIB)
    stored: dict[str, int] = {}
    async with repository(place) as opened:
        for name, level in COMPRESSION_LEVELS.items():
            text = name.encode() + b" text that comes again and again" * 30_000
            (source / f"{name}-text").write_bytes(text)
            (source / f"{name}-noise").write_bytes(name.encode() + noise[len(stored) * 100 :])
            made = await back_up(opened, source, level=level)
            stored[name] = made.counts.stored_bytes
        await comes_back(opened, made, source, place / "target", sparse=False)
    assert stored["off"] > len(text) + len(noise)
    assert max(stored["fast"], stored["default"], stored["max"]) < stored["off"] - len(text) // 2


@given(tree=trees(root_user=IS_ROOT), sparse=st.booleans())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_tree_comes_back(place: Path, tree: Directory, sparse: bool) -> None:
    """All have the same path in one repository: each is compared with the one before, of which it may share parts."""
    source = place / "source"

    async def main() -> None:
        async with repository(place) as opened:
            made = await back_up(opened, source)
            assert made.counts.errors == 0
            await comes_back(opened, made, source, place / "target", sparse=sparse)

    for path in (source, place / "target"):  # which the example before may have left
        remove_tree(path)
    build(tree, source)
    anyio.run(main)


def settle(*paths: Path) -> None:
    """Wait until nothing is so young that the next backup would read it once more."""
    newest = max(max(os.lstat(path).st_ctime_ns, os.lstat(path).st_mtime_ns) for path in paths)
    time.sleep(max(0, newest + RACY_NS + 50_000_000 - time.time_ns()) / 1e9)


def ancestry(path: Path) -> list[tuple[int, int]]:
    """What changes in the directories above when anybody makes or removes a file there."""
    return [(os.stat(above).st_mtime_ns, os.stat(above).st_ctime_ns) for above in path.parents]


def small_tree(source: Path) -> None:
    """Twenty files in two directories, and one large enough to be read as a stream."""
    random = Random(5)
    for number in range(20):
        file = source / f"d{number % 2}" / f"{number:02}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random.randbytes(1000 + number))
    (source / "large").write_bytes(random.randbytes(9 * MIB))
    (source / "link").symlink_to("large")


@pytest.mark.anyio
class TestUnchanged:
    async def test_nothing_is_read_twice(self, quiet_place: Path) -> None:
        place, source = quiet_place, quiet_place / "source"
        small_tree(source)
        settle(source, *source.rglob("*"))
        size = 9 * MIB + sum(1000 + number for number in range(20))
        async with repository(place) as opened:
            first = await back_up(opened, source)
            assert first.counts.read_bytes == size
            for _ in range(10):  # the directories above are in the catalog, and others may be at work in them
                before = ancestry(source)
                settle(*source.parents)  # if none changes from here on, none is racy
                older, newer = await back_up(opened, source), await back_up(opened, source)
                assert (older.counts.read_bytes, newer.counts.read_bytes) == (0, 0)
                assert (newer.counts.new, newer.counts.files) == (0, 21)
                assert newer.snapshot.header.parent == older.snapshot.header.snapshot_id
                if ancestry(source) == before:
                    assert newer.snapshot.header.catalog == older.snapshot.header.catalog
                    assert newer.counts.changed == newer.counts.added_bytes == 0
                    break
            else:
                pytest.skip("the directories above are never quiet")
            progress = Recorder()
            forced = await back_up(opened, source, force=True, progress=progress)
            assert forced.counts.read_bytes == size
            assert forced.snapshot.header.parent == b""
            assert progress.items[os.fsencode(source / "large")] == "new"
            await comes_back(opened, newer, source, place / "target", sparse=True)

    async def test_every_edit_is_seen(self, place: Path) -> None:
        source = place / "source"
        small_tree(source)
        for edit in EDITS:
            (source / edit).write_bytes(edit.encode() * 100)
        settle(source, *source.rglob("*"))
        async with repository(place) as opened:
            await back_up(opened, source)
            for edit, make in EDITS.items():
                make(source / edit)
            progress = Recorder()
            made = await back_up(opened, source, progress=progress)
            below = os.fsencode(source) + b"/"
            seen = {
                path.removeprefix(below): status
                for path, status in progress.items.items()
                if status != "unmodified" and path.startswith(below)
            }
            assert seen == {os.fsencode(edit): "changed" for edit in EDITS if edit != "removed"} | {b"added": "new"}
            assert made.counts.read_bytes == sum((source / edit).lstat().st_size for edit in READ_ANEW)
            await comes_back(opened, made, source, place / "target", sparse=True)

    async def test_what_is_no_change_if_asked_so(self, place: Path) -> None:
        """Network file systems have inodes and ctimes that come and go."""
        source = place / "source"
        small_tree(source)
        settle(source, *source.rglob("*"))
        async with repository(place) as opened:
            await back_up(opened, source)
            EDITS["inode"](source / "d0" / "00")
            EDITS["ctime"](source / "d1" / "01")
            made = await back_up(opened, source, ignore_inode=True, ignore_ctime=True)
            assert made.counts.read_bytes == 0
            made = await back_up(opened, source)
            assert made.counts.read_bytes == 1000 + 1001


def _rename_over(path: Path) -> None:
    """The same content, size, times and mode in another file."""
    status, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.chmod(stat.S_IMODE(status.st_mode))
    os.utime(other, ns=(status.st_mtime_ns, status.st_mtime_ns))
    other.rename(path)


def _rewrite(path: Path) -> None:
    """Other content of the same size, and the mtime put back: only ctime tells."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _become_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("large")


EDITS: dict[str, Callable[[Path], object]] = {
    "size": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "mtime": lambda path: os.utime(path, ns=(0, 1)),
    "ctime": lambda path: path.chmod(stat.S_IMODE(path.stat().st_mode)),
    "inode": _rename_over,
    "mode": lambda path: path.chmod(0o4701),
    "same size": _rewrite,
    "truncated": lambda path: path.write_bytes(b""),
    "kind": _become_a_link,
    "attribute": lambda path: os.setxattr(path, "user.new", b"value"),
    "removed": lambda path: path.unlink(),
    "linked": lambda path: path.with_name("added").hardlink_to(path),
}
READ_ANEW = [edit for edit in EDITS if edit not in ("removed", "kind")] + ["added"]


@pytest.mark.anyio
@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a file system that never writes back by itself")
async def test_a_rewrite_that_leaves_no_trace_is_seen() -> None:
    """A file rewritten in the tick in which it was read has the same size and times: the racy rule is all there is.

    A page that is mapped and dirty already changes without any new time, however slow this machine is.
    """
    with scratch(parent=Path("/dev/shm")) as place:
        source = place / "source"
        source.mkdir()
        file = source / "file"
        file.write_bytes(bytes(4096))
        with file.open("r+b") as opened_file, mmap.mmap(opened_file.fileno(), 4096) as mapped:
            mapped[:4] = b"old!"
            async with repository(place) as opened:
                await back_up(opened, source)
                before = file.stat()
                mapped[:4] = b"new!"
                after = file.stat()
                assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
                made = await back_up(opened, source)
                assert made.counts.read_bytes == 4096
                await comes_back(opened, made, source, place / "target", sparse=True)


@pytest.mark.anyio
async def test_a_directory_of_many_entries(place: Path) -> None:
    """It takes several pages, of which an edit changes few."""
    source = place / "source"
    source.mkdir()
    for number in range(5000):
        os.close(os.open(source / f"{number * 7919 % 5000:05}", os.O_CREAT | os.O_WRONLY, 0o644))
    for number in range(0, 5000, 500):
        (source / f"{number:05}").write_bytes(b"%d" % number)
    settle(source, *source.rglob("*"))
    async with repository(place) as opened:
        first = await back_up(opened, source)
        assert first.counts.files == 5000
        assert first.snapshot.header.depth >= 1
        (source / "02500").write_bytes(b"edited")
        (source / "02500-and-one-more").touch()
        second = await back_up(opened, source)
        assert second.counts.files == 5001
        assert second.counts.read_bytes == 6
        # At most three pages, of 1024 entries at most.
        assert second.counts.added_bytes < first.counts.added_bytes * 3 / 4
        await comes_back(opened, second, source, place / "target", sparse=False)


@pytest.mark.anyio
async def test_files_around_every_boundary(place: Path) -> None:
    """Chunk sizes, batches and slabs: a byte less, a byte more; and content that only just differs."""
    source = place / "source"
    source.mkdir()
    content = Random(11).randbytes(8 * MIB + 1)
    for boundary in (0, 512 * KIB, MIB, 4 * MIB, 8 * MIB):
        for size in {max(0, boundary - 1), boundary, boundary + 1}:
            (source / f"{size:08}").write_bytes(content[:size])
            (source / f"{size:08}-zeros").write_bytes(bytes(size))
    async with repository(place) as opened:
        made = await back_up(opened, source)
        assert made.counts.added_bytes < 45 * MIB  # they begin alike
        await comes_back(opened, made, source, place / "target", sparse=False)


@pytest.mark.anyio
async def test_a_file_of_more_chunks_than_an_entry_holds(place: Path) -> None:
    """Its chunk list is a tree, of which an edit in the middle changes a branch."""
    source = place / "source"
    source.mkdir()
    noise = Random(13).randbytes(5 * MIB)
    # Each part is another: the noise turned by some bytes, so that it is cut at the same places but for its ends.
    with (source / "large").open("wb") as file:
        for number in range(24):
            file.write(number.to_bytes(8, "little") * 1000 + noise[number * 100 * KIB :] + noise[: number * 99 * KIB])
    size = (source / "large").stat().st_size
    with (source / "sparse").open("wb") as file:
        for number in range(100):
            file.seek(number * 500 * MIB)
            file.write(noise[number * 1000 :][: 300 * KIB])
        file.truncate(50_000 * MIB)
    async with repository(place) as opened:
        made = await back_up(opened, source)
        assert made.counts.size_bytes == size + 50_000 * MIB
        depths = {
            entry.name: entry.extra.depth if entry.extra else 0
            async for _, found in opened.entries(made.snapshot, os.fsencode(source)[1:], recursive=False)
            for entry in found
        }
        assert depths[b"large"] >= 1
        await comes_back(opened, made, source, place / "target", sparse=True)
        (source / "sparse").unlink()
        with (source / "large").open("r+b") as file:
            file.seek(size // 2)
            file.write(b"edited")
        edited = await back_up(opened, source)
        assert edited.counts.added_bytes < 9 * MIB
        await comes_back(opened, edited, source, place / "target", sparse=False)
