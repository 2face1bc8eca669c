"""How a worker writes small files: the compiled writer beside the careful one, and what the system may refuse."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import stat
import threading
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.harness import NOBODY, needs_root, scratch

from coffret.engine import metadata
from coffret.engine._write import DIRECT_BYTES
from coffret.engine.restore_writer import KEPT, LOST, DamagedPart, Mark, Writer, read_marks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
# An ACL as the kernel keeps it: u::rwx, u:1234:rwx, g::r-x, m::rwx, o::r-x.
_ENTRIES = ((1, 7, 0xFFFFFFFF), (2, 7, 1234), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF))
ACL = b"\2\0\0\0" + b"".join(
    tag.to_bytes(2, "little") + allowed.to_bytes(2, "little") + who.to_bytes(4, "little")
    for tag, allowed, who in _ENTRIES
)


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch() as path:
        yield path


class Target:
    """A directory, and a writer that writes to it. `job` counts."""

    def __init__(self, path: Path, *, owner: bool = True, wary: bool = False) -> None:
        path.mkdir()
        self.path, self.root = path, os.open(path, os.O_RDONLY)
        self.words = memoryview(mmap.mmap(-1, 16)).cast("Q")
        self.unusual: list[bytes] = []
        self.writer = Writer(
            self.root, Mark(self.words, 1), owner=owner, sparse=False, wary=wary, unlock=False, buffer_bytes=MIB
        )
        real = self.writer.unusual

        def unusual(folder: int, name: bytes, *rest: Any) -> list[str]:
            self.unusual.append(name)
            assert self.words[1] & 3 == 1
            return real(folder, name, *rest)

        self.writer.unusual = unusual  # type: ignore[method-assign, assignment]

    def write(
        self, *names: bytes, data: bytes = b"content", cuts: tuple[int, ...] = (), extents: bytes = b"", **how: Any
    ) -> list[tuple[bytes, str, int]]:
        """Write files of the same content, cut into parts, and metadata."""
        temporary = how.pop("temporary", b"")
        directory = how.pop("directory", b"")
        edges = [0, *sorted(cuts), len(data)]
        parts = [(0, begin, end - begin, b"") for begin, end in pairwise(edges)]
        asked = meta(size_bytes=len(data), **how)
        files = [(name, temporary, asked, parts, extents) for name in names]
        faults = self.writer.files(5, lambda part: memoryview(data)[part[1] :][: part[2]], [(directory, files)])
        assert list(self.words) == [0, 0]
        return faults

    def close(self) -> None:
        """Let go of it."""
        os.close(self.root)


def meta(
    mode: int = 0o644,
    uid: int | None = None,
    gid: int | None = None,
    size_bytes: int = 0,
    mtime_ns: int = 5,
    xattrs: tuple[tuple[bytes, bytes], ...] = (),
) -> tuple[Any, ...]:
    """Metadata of a regular file of this process's user."""
    uid, gid = os.geteuid() if uid is None else uid, os.getegid() if gid is None else gid
    return stat.S_IFREG | mode, uid, gid, size_bytes, mtime_ns, list(xattrs)


def seen(path: Path) -> tuple[Any, ...]:
    """What there is to compare of a file."""
    status = path.stat()
    return path.read_bytes(), status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_nlink


@contextmanager
def without_fowner() -> Iterator[None]:
    """Be a root that may give files away, but not touch what is somebody else's: without CAP_FOWNER, in this thread."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    get, put = {"x86_64": (125, 126), "aarch64": (90, 91)}[os.uname().machine]
    assert libc.syscall(get, header, before) == 0
    for at, word in enumerate(before):
        less[at] = word & ~(1 << 3) if at == 0 else word
    assert libc.syscall(put, header, less) == 0
    try:
        yield
    finally:
        assert libc.syscall(put, header, before) == 0


SIZES = st.one_of(
    st.integers(0, 10_000),
    st.sampled_from([DIRECT_BYTES - 1, DIRECT_BYTES, DIRECT_BYTES + 1, DIRECT_BYTES + 4096, MIB - 1, MIB, MIB + 1]),
    st.integers(DIRECT_BYTES, 3 * DIRECT_BYTES),
)
OWNERS = [os.geteuid(), os.geteuid() + 1] if os.geteuid() == 0 else [os.geteuid()]


class TestUsual:
    @given(
        size=SIZES,
        cuts=st.lists(st.integers(0, MIB), max_size=3),
        mode=st.integers(0, 0o7777),
        uid=st.sampled_from(OWNERS),
        gid=st.sampled_from([os.getegid(), os.getegid() + 1] if os.geteuid() == 0 else [os.getegid()]),
        mtime_ns=st.integers(-(1 << 60), 1 << 62),
        owner=st.booleans(),
        umask=st.sampled_from([0, 0o22, 0o77, 0o777]),
        temporary=st.booleans(),
    )
    def test_it_is_as_the_careful_way_makes_it(
        self, size: int, cuts: list[int], umask: int, owner: bool, temporary: bool, **how: Any
    ) -> None:
        data = Random(size).randbytes(size)
        before = os.umask(umask)
        try:
            with scratch() as place, closing(Target(place / "target", owner=owner)) as target:
                name = b".temporary" if temporary else b""
                inside = tuple(min(cut, size) for cut in cuts)
                assert target.write(b"file", data=data, cuts=inside, temporary=name, **how) == []
                # Set-id files of others get their owner when their content is whole.
                foreign = owner and how["mode"] & 0o6000 and (how["uid"], how["gid"]) != (os.geteuid(), os.getegid())
                assert target.unusual == ([b"file"] if foreign else [])
                careful = meta(size_bytes=size, **how)
                assert Writer.unusual(target.writer, target.root, b"other", b"", careful, [memoryview(data)], b"") == []
                assert seen(target.path / "file") == seen(target.path / "other")
                assert (target.path / "file").read_bytes() == data
                assert sorted(os.listdir(target.path)) == ["file", "other"]
        finally:
            os.umask(before)

    def test_no_more_descriptors_and_nothing_else(self, place: Path) -> None:
        with closing(Target(place / "target")) as target:
            before = os.listdir("/proc/self/fd")
            names = [b"%d" % number for number in range(50)]
            assert target.write(*names, data=bytes(DIRECT_BYTES + 7)) == []
            assert target.write(*names)[0][2] == LOST
            assert os.listdir("/proc/self/fd") == before
            assert sorted(map(os.fsencode, os.listdir(target.path))) == sorted(names)

    def test_directories_are_made_on_the_way(self, place: Path) -> None:
        with closing(Target(place / "target")) as target:
            assert target.write(b"file", directory=b"a/b") == []
            assert seen(target.path / "a" / "b" / "file")[0] == b"content"
            (target.path / "link").symlink_to("a")
            [(path, _, kind)] = target.write(b"file", directory=b"link")
            assert (path, kind) == (b"link/file", LOST)

    @needs_root
    @needs_root
    @pytest.mark.parametrize("mode", [0o640, 0o664, 0o660, 0o600])
    def test_the_group_of_the_directory_may_not_read_it_meanwhile(self, place: Path, mode: int) -> None:
        """The new file has that group until it gets its own: what others may not do, it may not do until then."""
        with closing(Target(place / "target")) as target:
            os.chown(target.path, -1, 50)
            os.chmod(target.path, 0o2775)
            while_open: list[int] = []

            def opened(part: tuple[int, int, int, bytes]) -> memoryview:
                return memoryview(b"x" * DIRECT_BYTES)

            made = threading.Event()

            def watch() -> None:
                while not made.is_set():
                    with suppress(FileNotFoundError):
                        status = (target.path / "file").stat()
                        if status.st_gid == 50:
                            while_open.append(status.st_mode & 0o070)

            thread = threading.Thread(target=watch)
            thread.start()
            files = [(b"file", b"", meta(mode, size_bytes=DIRECT_BYTES), [(0, 0, DIRECT_BYTES, b"")], b"")]
            for _ in range(100):
                assert target.writer.files(5, opened, [(b"", files)]) == []
                (target.path / "file").unlink()
            made.set()
            thread.join()
            assert not set(while_open) - {(mode & 0o007) << 3 & mode}

    def test_directories_that_hand_down_their_group(self, place: Path) -> None:
        """A directory gives its group to what is made in it; the file gets its own."""
        with closing(Target(place / "target")) as target:
            (target.path / "shared").mkdir()
            os.chown(target.path / "shared", 0, NOBODY)
            (target.path / "shared").chmod(0o2777)
            for uid in (0, NOBODY + 1):
                assert target.write(b"file%d" % uid, directory=b"shared", uid=uid, gid=0, mode=0o2640) == []
                status = (target.path / "shared" / f"file{uid}").stat()
                assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (uid, 0, 0o2640)

    def test_a_disk_that_is_slow_sorts_writes_itself(self, place: Path) -> None:
        """What the clock says is not to be had here; that it can be left off is."""
        with closing(Target(place / "target")) as target:
            assert target.writer._small.direct
            target.writer._small.direct = False
            data = Random(3).randbytes(DIRECT_BYTES + 99)
            assert target.write(b"file", data=data) == []
            assert (target.path / "file").read_bytes() == data


class TestDirectories:
    @pytest.mark.parametrize("owner", [True, False])
    @pytest.mark.parametrize("uid", OWNERS)
    @pytest.mark.parametrize("mode", [0, 0o500, 0o755, 0o2775, 0o1777, 0o7777])
    def test_metadata(self, place: Path, mode: int, uid: int, owner: bool) -> None:
        """As the careful way sets it, also where that is what sets it."""
        with closing(Target(place / "target", owner=owner)) as target:
            usual: tuple[Any, ...] = (stat.S_IFDIR | mode, uid, os.getegid(), 0, -7_000_000_001, [])
            special = (*usual[:5], [(b"user.own", b"value")])
            assert target.writer.directories([(b"a/b", usual), (b"a/c", special), (b"a", usual)]) == []
            for path in (target.path / "a", target.path / "a" / "b", target.path / "a" / "c"):
                status = path.stat()
                assert status.st_uid == (uid if owner else os.geteuid())
                assert stat.S_IMODE(status.st_mode) == metadata.allowed_mode(usual, owner=owner)
                assert status.st_mtime_ns == usual[4]
            assert os.listxattr(target.path / "a" / "c") == ["user.own"]

    def test_one_that_is_in_the_way(self, place: Path) -> None:
        with closing(Target(place / "target")) as target:
            (target.path / "a").write_bytes(b"file")
            [(path, _, lost)] = target.writer.directories([(b"a", (stat.S_IFDIR | 0o755, 0, 0, 0, 0, []))])
            assert (path, lost) == (b"a", LOST)

    @needs_root
    def test_owners_that_are_refused(self, place: Path) -> None:
        place.chmod(0o777)
        os.seteuid(NOBODY)
        try:
            with closing(Target(place / "target")) as target:
                asked: tuple[Any, ...] = (stat.S_IFDIR | 0o2755, 0, 0, 0, 5, [])
                [(path, reason, kept)] = target.writer.directories([(b"a", asked)])
                assert (path, kept) == (b"a", KEPT)
                assert "owner not set" in reason
                status = (target.path / "a").stat()
                assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o700, 5)
        finally:
            os.seteuid(0)


class TestUnusual:
    """What the compiled writer leaves to the careful one."""

    @pytest.mark.parametrize(
        "how",
        [
            {"xattrs": ((b"user.own", b"value"),)},
            {"extents": (0).to_bytes(8, "little") + (7).to_bytes(8, "little")},
            {"mtime_ns": 1 << 63},
        ],
    )
    def test_files(self, place: Path, how: dict[str, Any]) -> None:
        with closing(Target(place / "target")) as target:
            target.write(b"file", b"next", **how)
            assert target.unusual == [b"file", b"next"]
            assert (target.path / "file").read_bytes() == b"content"

    def test_directories_that_hand_down_acls(self, place: Path) -> None:
        with closing(Target(place / "target", wary=True)) as target:
            for name in ("plain", "inheriting"):
                (target.path / name).mkdir()
            try:
                os.setxattr(target.path / "inheriting", metadata.ACL_DEFAULT, ACL)
            except OSError as error:
                pytest.skip(f"no ACLs here: {error.strerror}")
            for directory in (b"plain", b"inheriting", b"plain"):
                assert target.write(b"file%d" % len(target.unusual), directory=directory) == []
            assert target.unusual == [b"file0"]
            assert metadata.ACL_ACCESS not in os.listxattr(target.path / "inheriting" / "file0")


class TestRefused:
    @pytest.mark.parametrize("temporary", [b"", b".temporary"])
    def test_names_that_are_taken(self, place: Path, temporary: bytes) -> None:
        victim = place / "victim"
        victim.write_bytes(b"untouched")
        with closing(Target(place / "target")) as target:
            taken = temporary or b"name"
            where = target.path / os.fsdecode(taken)
            for kind in ("link", "dangling", "fifo", "file", "directory"):
                if kind in ("link", "dangling"):
                    where.symlink_to(victim if kind == "link" else place / "nowhere")
                elif kind == "fifo":
                    os.mkfifo(where)
                elif kind == "file":
                    where.write_bytes(b"untouched")
                else:
                    where.mkdir()
                before = where.lstat()
                [(path, reason, lost)] = target.write(b"name", temporary=temporary)
                assert (path, reason, lost) == (b"name", os.strerror(errno.EEXIST), LOST)
                assert where.lstat() == before
                where.rmdir() if kind == "directory" else where.unlink()
        assert victim.read_bytes() == b"untouched"
        assert not os.path.lexists(place / "nowhere")

    def test_a_name_that_can_not_be_given(self, place: Path) -> None:
        with closing(Target(place / "target")) as target:
            (target.path / "name").mkdir()
            [(_, reason, lost)] = target.write(b"name", temporary=b".temporary")
            assert (reason, lost) == (os.strerror(errno.EISDIR), LOST)
            assert os.listdir(target.path) == ["name"]

    @pytest.mark.parametrize("size_bytes", [20_000, DIRECT_BYTES * 2, DIRECT_BYTES * 2 + 5])
    @pytest.mark.parametrize("limit_bytes", [0, 4096, 10_000])
    def test_content_that_has_no_room(self, place: Path, size_bytes: int, limit_bytes: int) -> None:
        """A limit of file sizes fails as a full disk does: in the middle of a write, and with nothing left of it."""
        with closing(Target(place / "target")) as target:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
            try:
                faults = target.write(b"file", b"next", data=bytes(size_bytes), cuts=(5,))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            reason = os.strerror(errno.EFBIG)
            assert faults == [(b"file", reason, LOST), (b"next", reason, LOST)]
            assert os.listdir(target.path) == []
            assert target.write(b"file", data=bytes(size_bytes)) == []

    def test_a_part_that_is_damaged_costs_its_file(self, place: Path) -> None:
        with closing(Target(place / "target")) as target:

            def opened(part: tuple[int, int, int, bytes]) -> memoryview:
                if part[0]:
                    raise DamagedPart("it is damaged", part[0])
                return memoryview(b"good")

            parts = [(number, 0, 4, b"") for number in (0, 3)]
            files = [(b"%d" % n, b"", meta(), parts[: n % 2 + 1], b"") for n in range(4)]
            faults = target.writer.files(1, opened, [(b"", files)])
            assert faults == [(b"1", "it is damaged", 3), (b"3", "it is damaged", 3)]
            assert sorted(os.listdir(target.path)) == ["0", "2"]

    def test_metadata_of_the_wrong_kind(self, place: Path) -> None:
        with closing(Target(place / "target")) as target:
            files: list[Any] = [(b"bad", b"", (0o644, "nobody", 0, 0, 0, []), [], b""), (b"good", b"", meta(), [], b"")]
            [(path, _, lost)] = target.writer.files(1, lambda _: memoryview(b""), [(b"", files)])
            assert (path, lost) == (b"bad", LOST)
            assert os.listdir(target.path) == ["good"]

    @needs_root
    def test_owners(self, place: Path) -> None:
        """Without its owner nobody else may read a file or become anything by it."""
        place.chmod(0o777)
        os.seteuid(NOBODY)
        try:
            with closing(Target(place / "target")) as target:
                faults = target.write(b"file", b"next", mode=0o6755, uid=0)
                assert [(path, kind) for path, _, kind in faults] == [(b"file", KEPT), (b"next", KEPT)]
                assert "owner not set" in faults[0][1]
                assert seen(target.path / "file")[:3] == (b"content", stat.S_IFREG | 0o700, NOBODY)
                assert seen(target.path / "file")[4] == 5
        finally:
            os.seteuid(0)

    @needs_root
    def test_access(self, place: Path) -> None:
        place.chmod(0o777)
        os.seteuid(NOBODY)
        try:
            with closing(Target(place / "target")) as target:
                (target.path / "locked").mkdir(0o500)
                [(path, reason, lost), _] = target.write(b"file", b"next", directory=b"locked")
                assert (path, reason, lost) == (b"locked/file", os.strerror(errno.EACCES), LOST)
        finally:
            os.seteuid(0)

    @needs_root
    def test_a_process_that_ends_in_the_middle(self, place: Path) -> None:
        """What it was making is marked, and can be told from what was finished and what has not been begun."""
        with closing(Target(place / "target")) as target:
            os.chown(target.path, NOBODY, NOBODY)
            child = os.fork()
            if not child:
                os.seteuid(NOBODY)
                target.writer.dress = lambda *_: os._exit(0)  # type: ignore[method-assign]
                files: list[Any] = [
                    (b"%d" % n, b".%d" % n, meta(uid=0 if n == 2 else NOBODY), [], b"") for n in range(4)
                ]
                target.writer.files(7, lambda _: memoryview(b""), [(b"", files)])
                os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
            assert read_marks(target.words) == [(7, 2, True)]
            assert sorted(os.listdir(target.path)) == [".2", "0", "1"]

    @needs_root
    @pytest.mark.parametrize("temporary", [b"", b".temporary"])
    def test_modes_and_times(self, place: Path, temporary: bytes) -> None:
        """What can't be set is told; what was being made is marked as made meanwhile."""
        with closing(Target(place / "target")) as target:
            marks: list[int] = []
            dress = target.writer.dress

            def watched(fd: int, asked: tuple[Any, ...]) -> list[str]:
                marks.append(target.words[1])
                return dress(fd, asked)

            target.writer.dress = watched  # type: ignore[method-assign, assignment]
            faults: list[tuple[bytes, str, int]] = []

            def run() -> None:
                with without_fowner():
                    faults.extend(target.write(b"file", b"next", mode=0o755, uid=NOBODY, temporary=temporary))

            thread = threading.Thread(target=run)  # capabilities are a thread's own
            thread.start()
            thread.join()
            told = [(name, f"{what} not set: {os.strerror(errno.EPERM)}", KEPT)
                    for name in (b"file", b"next") for what in ("mode", "time")]  # fmt: skip
            assert faults == told
            assert marks == [5 << 32 | number << 2 | 3 for number in range(2)]
            assert seen(target.path / "file")[:3] == (b"content", stat.S_IFREG | 0o600, NOBODY)
            assert sorted(os.listdir(target.path)) == ["file", "next"]

    @needs_root
    def test_what_can_not_even_be_tried_leaves_nothing(self, place: Path) -> None:
        with closing(Target(place / "target")) as target:

            def failing(*_: Any) -> list[str]:
                raise MemoryError

            target.writer.dress = failing  # type: ignore[method-assign, assignment]
            os.chown(place, 0, 0)
            place.chmod(0o777)
            os.chown(target.path, NOBODY, NOBODY)
            os.seteuid(NOBODY)
            try:
                [(path, _, lost)] = target.write(b"file", uid=0)
            finally:
                os.seteuid(0)
            assert (path, lost) == (b"file", LOST)
            assert os.listdir(target.path) == []
