"""How a worker writes small files and directories: the compiled writer beside the careful one."""

from __future__ import annotations

import os
import stat
import threading
from contextlib import closing, suppress
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.harness import NOBODY, needs_root, scratch
from tests.restore.written import MIB, OWNERS, Target, meta, seen

from coffret.engine import metadata
from coffret.engine._write import DIRECT_BYTES
from coffret.engine.restore_writer import KEPT, LOST, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZES = st.one_of(
    st.integers(0, 10_000),
    st.sampled_from([DIRECT_BYTES - 1, DIRECT_BYTES, DIRECT_BYTES + 1, DIRECT_BYTES + 4096, MIB - 1, MIB, MIB + 1]),
    st.integers(DIRECT_BYTES, 3 * DIRECT_BYTES),
)


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch() as path:
        yield path


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
