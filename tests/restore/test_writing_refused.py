"""How a worker writes small files: what is left to the careful writer, and what the system may refuse."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.harness import NOBODY, needs_root, scratch
from tests.restore.written import ACL, Target, meta, seen, without_fowner

from coffret.engine import metadata
from coffret.engine._write import DIRECT_BYTES
from coffret.engine.restore_writer import KEPT, LOST, DamagedPart, read_marks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch() as path:
        yield path


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
