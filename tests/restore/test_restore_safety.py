"""Restore into hostile or unhelpful targets: races, planted names, refusals of the system, interruptions, ACLs."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
from contextlib import closing
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from tests.harness import NOBODY, Program, Recorder, needs_root, repository
from tests.restore.case import ALL, MIB, case
from tests.trees import describe, differences

from coffret.engine import metadata, restore_jobs
from coffret.engine.errors import TargetError
from coffret.engine.mirror import Location
from coffret.engine.openworker import Blocks
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.ops.restore import RestoreOptions
from coffret.engine.pipeline import Limits
from coffret.engine.places import Places
from coffret.engine.restore_files import FileWriter
from coffret.engine.restore_jobs import LargeFile, Window
from coffret.engine.restore_target import open_target
from coffret.engine.restore_writer import KEPT, LOST, Mark, Writer, read_marks, reserve

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.engine.progress import Item

# An ACL as the kernel keeps it: u::rwx, u:1234:rwx, g::r-x, m::rwx, o::r-x.
_ENTRIES = ((1, 7, 0xFFFFFFFF), (2, 7, 1234), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF))
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in _ENTRIES)


class Target:
    """A directory, and what a worker writes to it with."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path, self.root = path, os.open(path, os.O_RDONLY)
        self.words = memoryview(bytearray(8)).cast("Q")
        self.writer = Writer(
            self.root, Mark(self.words, 0), owner=True, sparse=False, wary=False, unlock=False, buffer_bytes=MIB
        )

    def close(self) -> None:
        """Let go of it."""
        os.close(self.root)


def meta(mode: int, size_bytes: int = 0) -> tuple[Any, ...]:
    """Metadata of an entry of this process's user."""
    return mode, os.geteuid(), os.getegid(), size_bytes, 5, []


class TestPlanted:
    """Something else has taken the name of what was just made."""

    def test_a_large_file(self, place: Path) -> None:
        victim = place / "victim"
        victim.write_bytes(b"untouched")
        with closing(Target(place / "target")) as target:
            large = LargeFile(b"", b"name", meta(stat.S_IFREG | 0o644, 4), b"")
            places = Places(target.root)
            large.create(places, sparse=False)
            where = (b"", large.temporary, *large.identity)
            write = [(0, 4, 0, [(0, 0, 4, b"")])]
            assert target.writer.piece(lambda _: memoryview(b"data"), where, write) == []
            planted = target.path / os.fsdecode(large.temporary)
            for kind in ("fifo", "hard link", "link"):
                planted.unlink()
                if kind == "fifo":
                    os.mkfifo(planted)
                elif kind == "link":
                    planted.symlink_to(victim)
                else:
                    planted.hardlink_to(victim)
                assert target.writer.piece(lambda _: memoryview(b"evil"), where, write)[0][2] == LOST
                assert target.writer.finish(b"", b"name", large.temporary, large.identity, large.meta)[0][2] == LOST
                assert not (target.path / "name").exists()
                large.remove(places)  # nor is what is not ours removed
                assert os.path.lexists(planted)
            assert victim.read_bytes() == b"untouched"

    @pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
    def test_a_node(self, place: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
        """Whoever may write to the directory puts a link in the place of a FIFO before its mode is set."""
        victim = place / "victim"
        victim.write_bytes(b"")
        victim.chmod(0o600)
        real = os.mknod
        for plant in (os.symlink, os.link):

            def mknod(path: bytes, *rest: Any, plant: Any = plant, **where: Any) -> None:
                real(path, *rest, **where)
                os.unlink(path, **where)
                plant(
                    victim, path, **({"src_dir_fd": None, "dst_dir_fd": where["dir_fd"]} if plant is os.link else where)
                )

            monkeypatch.setattr(os, "mknod", mknod)
            with closing(Target(place / plant.__name__)) as target:
                faults = target.writer.nodes(1, [(b"", b"node", b"", meta(kind | 0o666), b"", 0)])
                assert [(path, lost) for path, _, lost in faults] == [(b"node", LOST)]
        assert stat.S_IMODE(victim.stat().st_mode) == 0o600

    def test_what_is_replaced_stays_if_the_new_can_not_be_made(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EPERM, "not allowed")

        monkeypatch.setattr(os, "mknod", refused)
        with closing(Target(place / "target")) as target:
            (target.path / "node").write_bytes(b"kept")
            faults = target.writer.nodes(1, [(b"", b"node", b".temporary", meta(stat.S_IFCHR | 0o600), b"", 5)])
            assert faults == [(b"node", "not allowed", LOST)]
            assert (target.path / "node").read_bytes() == b"kept"
            assert os.listdir(target.path) == ["node"]


class TestRefused:
    """What the system refuses to set costs nothing but that."""

    @pytest.mark.parametrize("call", ["chown", "chmod", "utime"])
    def test_metadata(self, place: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        def refused(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EPERM, "not allowed")

        asked: tuple[Any, ...]
        with closing(Target(place / "target")) as target, monkeypatch.context() as patch:
            patch.setattr(os, call, refused)
            # With an attribute, it is not the compiled writer's (see test_writing).
            asked = (stat.S_IFREG | 0o6755, os.geteuid() + 1, os.getegid() + 1, 4, 5, [(b"user.own", b"value")])
            group = (b"", [(b"file", b"", asked, [(0, 0, 4, b"")], b"")])
            faults = target.writer.files(1, lambda _: memoryview(b"data"), [group])
            assert [(path, kind) for path, _, kind in faults] == [(b"file", KEPT)]
            assert (target.path / "file").read_bytes() == b"data"
            # Without its owner nobody else may read or become anything by it.
            expected = {"chown": 0o700, "chmod": 0o600, "utime": 0o6755}[call]
            assert stat.S_IMODE((target.path / "file").stat().st_mode) == expected

    def test_an_acl(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The mode's group bits are the mask of the ACL: without it the group would get what it says."""

        def refused(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(os, "setxattr", refused)
        (place / "file").touch()
        asked = (*meta(stat.S_IFREG | 0o674)[:5], [(metadata.ACL_ACCESS.encode(), ACL)])
        assert len(metadata.apply(os.fsencode(place / "file"), asked, owner=True)) == 1
        assert stat.S_IMODE((place / "file").stat().st_mode) == 0o604

    def test_no_room_for_holes(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with (place / "file").open("wb") as file:
            [note] = reserve(file.fileno(), 1 << 30, sparse=False, holes=True)
            assert "--sparse" in note
            assert reserve(file.fileno(), 1 << 20, sparse=False, holes=False) == []
            assert os.fstat(file.fileno()).st_size == 1 << 20

    def test_a_job_that_fails_in_a_way_nobody_foresaw(self, place: Path) -> None:
        with closing(Target(place / "target")) as target:
            group: tuple[bytes, list[Any]] = (
                b"",
                [(b"bad", b"", ("no", "metadata"), [], b""), (b"good", b"", meta(stat.S_IFREG | 0o600), [], b"")],
            )
            [(path, _, kind)] = target.writer.files(1, lambda _: memoryview(b""), [group])
            assert (path, kind) == (b"bad", LOST)
            assert os.listdir(target.path) == ["good"]
            assert list(target.words) == [0]

    @pytest.mark.anyio
    @pytest.mark.parametrize("number", [errno.EMLINK, errno.EPERM, errno.EXDEV])
    async def test_hard_links(self, place: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        def refused(*_: Any, **__: Any) -> None:
            raise OSError(number, "no more links")

        async with case(place) as c:
            assert await c.restore() == {}
            assert c.progress.files == c.snapshot.header.counts.files
            assert c.progress.size_bytes == c.snapshot.header.counts.size_bytes
            shutil.rmtree(c.target)
            with monkeypatch.context() as patch:
                patch.setattr(os, "link", refused)
                faults = await c.restore()
            [path] = faults
            assert path in ("e", "a/b/linked") and "file of its own" in faults[path]
            assert c.restored() == ALL
            assert (c.target / "e").read_bytes() == (c.target / "a" / "b" / "linked").read_bytes()
            assert (c.target / "e").stat().st_nlink == 1

    @pytest.mark.anyio
    async def test_a_link_to_a_name_that_is_blocked(self, place: Path) -> None:
        async with case(place) as c:
            (c.target / "a" / "b" / "linked" / "kept").mkdir(parents=True)  # the first of its group
            faults = await c.restore(overwrite="always")
            assert faults.keys() == {"a/b/linked"}
            assert (c.target / "e").read_bytes() == (c.source / "e").read_bytes()


class TestInterrupted:
    pytestmark = pytest.mark.anyio

    @pytest.mark.parametrize("policy", ["refuse", "always"])
    async def test_what_was_finished_stays(self, place: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
        """Also a file that its user has written to meanwhile; and nothing is left that is not whole."""
        monkeypatch.setattr(restore_jobs, "_MAX_FILES", 4)
        source, target = place / "source", place / "target"
        source.mkdir()
        random = Random(5)
        for number in range(120):
            (source / f"{number:03}").write_bytes(random.randbytes(100_000))
        edited: list[str] = []

        class Stop(Exception):
            pass

        def stop(item: Item) -> None:
            name = os.fsdecode(item.path).rpartition("/")[2]
            with (target / name).open("ab") as file:
                file.write(b"edited")
            edited.append(name)
            if len(edited) == 20:
                raise Stop

        async with repository(place) as opened:
            made = await opened.backup([os.fsencode(source)], BackupOptions(limits=Limits(workers=1)))
            progress = Recorder()
            progress.on_item = stop
            with pytest.raises(BaseException) as caught:
                await opened.restore(
                    made.snapshot, os.fsencode(target), options=RestoreOptions(overwrite=policy), progress=progress
                )
            assert caught.group_contains(Stop) if isinstance(caught.value, BaseExceptionGroup) else caught.type is Stop
        assert len(edited) == 20
        for path in target.iterdir():
            assert path.read_bytes() == (source / path.name).read_bytes() + b"edited" * (path.name in edited)
        assert {path.name for path in target.iterdir()} >= set(edited)

    async def test_only_what_was_at_work_is_removed(self, place: Path) -> None:
        """A worker that is killed leaves one file at most: the one it has marked."""
        target = place / "target"
        target.mkdir()
        window = Window(MIB)
        for name in (b"done", b"begun", b"after"):
            assert window.take(b"", name, meta(stat.S_IFREG | 0o644), [], b"", temporary=False)
            (target / os.fsdecode(name)).write_bytes(b"content")
        words = memoryview(bytearray(16)).cast("Q")
        mark = Mark(words, 1)
        mark.begin(7, 1)
        assert read_marks(words) == [(7, 1, False)]
        root = os.open(target, os.O_RDONLY)
        files = object.__new__(FileWriter)
        files._places = Places(root)
        # Not created by this restore yet: what has content there is somebody else's.
        files.remove(*window.made(1), created=False)
        assert (target / "begun").exists()
        mark.created()
        assert read_marks(words) == [(7, 1, True)]
        files.remove(*window.made(1), created=True)
        assert sorted(os.listdir(target)) == ["after", "done"]
        mark.end()
        assert read_marks(words) == []
        os.close(root)

    async def test_nothing_is_remembered_of_what_is_done(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        left: list[int] = []
        settle = FileWriter.settle

        async def settled(self: FileWriter) -> None:
            await settle(self)
            left.append(len(self._windows) + len(self._large) + len(self._tried))

        monkeypatch.setattr(FileWriter, "settle", settled)
        async with case(place) as c:
            assert await c.restore() == {}
        assert left and not any(left)


class TestAccess:
    """Who may read what was restored."""

    pytestmark = pytest.mark.anyio

    @pytest.mark.parametrize("policy", ["refuse", "always"])
    async def test_inherited_acls(self, place: Path, policy: str) -> None:
        async with case(place) as c:
            c.target.mkdir()
            try:
                os.setxattr(c.target, metadata.ACL_DEFAULT, ACL)
            except OSError as error:
                pytest.skip(f"no ACLs here: {error.strerror}")
            if policy == "always":
                (c.target / "a").mkdir()  # inherits it
                os.setxattr(c.target / "a", "user.own", b"not in the snapshot")
            assert await c.restore(overwrite=policy) == {}
            c.same()
            for path in (c.target, *c.target.rglob("*")):
                assert [n for n in os.listxattr(path, follow_symlinks=False) if not n.startswith("security.")] == []

    async def test_the_target_is_private_until_the_end(self, place: Path) -> None:
        async with case(place) as c:
            c.source.chmod(0o755)
            await c.back_up()
            modes: set[int] = set()
            progress = Recorder()
            progress.on_item = lambda item: (
                modes.add(stat.S_IMODE(c.target.stat().st_mode)) if item.size_bytes else None
            )
            await c.opened.restore(c.snapshot, os.fsencode(c.target), progress=progress)
            assert modes == {0o700}
            assert stat.S_IMODE(c.target.stat().st_mode) == 0o755
            # Where the target has no metadata of its own it gets what it would have had.
            shutil.rmtree(c.target)
            (place / "plain").mkdir()
            await c.back_up(c.source / "a", c.source / "e")
            assert await c.restore() == {}
            assert c.target.stat().st_mode == (place / "plain").stat().st_mode


def test_a_target_that_is_reached_through_a_link(place: Path) -> None:
    """Parents of links are where the links lead, for whoever writes."""
    program = Program(place)
    program("create", "--no-encryption")
    (place / "source").mkdir()
    (place / "source" / "file").write_bytes(b"content")
    (place / "source" / "large").write_bytes(bytes(5 * MIB))
    program.backup("source")
    (place / "deep" / "inner").mkdir(parents=True)
    (place / "link").symlink_to("deep/inner")
    program("restore", "--to", "link/../out", "latest")
    assert differences(describe(place / "source"), describe(place / "deep" / "out")) == []
    assert not (place / "out").exists()


@needs_root
def test_other_users(place: Path) -> None:
    """A target that can't be written to is one error; one's own read-only directories are no hindrance."""
    home = place / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    place.chmod(0o755)
    program = Program(home, uid=NOBODY)
    program("create", "--no-encryption")
    (home / "source" / "locked").mkdir(parents=True)
    (home / "source" / "locked" / "file").write_bytes(b"content")
    for path in (home / "source", home / "source" / "locked", home / "source" / "locked" / "file"):
        os.chown(path, NOBODY, NOBODY)
    (home / "source" / "locked").chmod(0o500)
    program.backup("source")
    (home / "closed").mkdir()
    outcome = program("restore", "--to", "closed", "latest", code=1)
    assert "closed can't be written to" in outcome.stderr
    program("restore", "--to", "target", "latest")
    (home / "target" / "locked" / "file").write_bytes(b"older")
    program("restore", "--to", "target", "--overwrite", "always", "latest")
    assert differences(describe(home / "source"), describe(home / "target")) == []


@needs_root
def test_directories_that_are_locked(place: Path) -> None:
    """The same without a program of another user's, which can't be run everywhere."""
    place.chmod(0o755)
    for name, uid in (("ours", NOBODY), ("theirs", 0)):
        (place / name / "inner").mkdir(parents=True)
        for path in (place / name, place / name / "inner"):
            os.chown(path, uid, uid)
            path.chmod(0o500 if uid else 0o755)
    (place / "ours" / "inner").chmod(0)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(TargetError, match="can't be written to"):
            open_target(os.fsencode(place / "theirs"), replace=True)
        with pytest.raises(TargetError, match="can't be written to"):
            open_target(os.fsencode(place / "ours"), replace=False)
        target = open_target(os.fsencode(place / "ours"), replace=True)
        with pytest.raises(PermissionError):
            Places(target.fd, wary=True).enter(b"inner")
        places = Places(target.fd, wary=True, unlock=True)
        os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=places.enter(b"inner")))
        os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=places.enter(b"")))
        places.close()
        target.close(unused=False)
    finally:
        os.seteuid(0)


def test_what_was_verified_is_not_verified_again() -> None:
    """A fragmented sparse file asks for one chunk as often as it has extents."""
    from blake3 import blake3

    key = bytes(32)

    class Worker:
        id_key = key
        opened = 0

        def open(self, _view: memoryview, _block: Any) -> memoryview:
            self.opened += 1
            return memoryview(b"content")

    worker = Worker()
    blocks = Blocks(worker, memoryview(b""), [(b"", 0, 0, 0, 0, 0)])  # type: ignore[arg-type]
    part = (0, 0, 7, blake3(b"content", key=key).digest())
    assert blocks.part(part) is blocks.part(part)
    assert worker.opened == 1


def test_a_window_opens_so_much_and_no_more() -> None:
    """Blocks of zeros are small as stored, and a worker opens all that its window needs."""
    window = Window(8 * MIB)
    count = 0
    while True:
        chunk = [(b"", 10, Location(bytes(32), 0, b"", count * 1000, 1000, 8 * MIB, 1, 0, 10))]
        if not window.take(b"", b"%d" % count, meta(stat.S_IFREG | 0o644, 10), chunk, b"", temporary=False):
            break
        count += 1
    assert count * 8 * MIB == 64 * MIB
