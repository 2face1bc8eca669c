"""How a worker reads files: those that lie about their size, that have holes nobody tells of, that change meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.harness import Recorder, repository

from coffret.engine import chunkworker
from coffret.engine._read import SmallReader, file_system_type, open_real
from coffret.engine.chunkworker import changed, data_extents, open_path, open_unlinked

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough for what is tested here."""
    return "asyncio"


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[int]:
    """A file of 3 MiB that is open, with data in the second."""
    with (tmp_path / "sparse").open("wb+") as file:
        file.seek(1 << 20)
        file.write(b"x" * (1 << 20))
        file.truncate(3 << 20)
        file.flush()
        yield file.fileno()


class TestExtents:
    def test_data_between_holes(self, sparse: int) -> None:
        assert data_extents(sparse, 3 << 20) in ([(1 << 20, 1 << 20)], [(0, 3 << 20)])

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
    def test_not_supported_is_no_hole(self, sparse: int, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        monkeypatch.setattr(os, "lseek", refusing(code, os.SEEK_DATA, os.SEEK_HOLE))
        assert data_extents(sparse, 3 << 20) == [(0, 3 << 20)]

    @pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
    def test_what_fails_is_told(self, sparse: int, monkeypatch: pytest.MonkeyPatch, whence: int) -> None:
        monkeypatch.setattr(os, "lseek", refusing(errno.EIO, whence))
        with pytest.raises(OSError, match="refused"):
            data_extents(sparse, 3 << 20)

    def test_only_a_hole_is_left(self, sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "lseek", refusing(errno.ENXIO, os.SEEK_DATA))
        assert data_extents(sparse, 3 << 20) == []

    def test_one_that_is_cut_off_meanwhile_keeps_its_place(self, sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reading finds less than there should be, and that is told: it is not dropped."""
        begin = os.lseek(sparse, 0, os.SEEK_DATA)
        monkeypatch.setattr(os, "lseek", refusing(errno.ENXIO, os.SEEK_HOLE))
        assert data_extents(sparse, 3 << 20) == [(begin, (3 << 20) - begin)]


def refusing(code: int, *refused: int) -> Any:
    """lseek(2) that fails for some of its ways."""
    lseek = os.lseek

    def seek(fd: int, offset: int, whence: int) -> int:
        if whence in refused:
            raise OSError(code, "refused")
        return lseek(fd, offset, whence)

    return seek


def test_what_counts_as_a_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    os.utime(path, (0, 0))
    before = path.stat()
    assert changed(before, path.stat()) == ""
    os.link(path, tmp_path / "another")  # its ctime is another, and so is its number of links
    assert changed(before, path.stat()) == ""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(b"edited")
        os.utime(path, (0, 0))
    assert changed(before, path.stat()) == "changed while it was read"


class TestSizes:
    async def test_a_file_that_does_not_tell_its_size(self, tmp_path: Path) -> None:
        """In /proc files are of size 0, in /sys of a page's; both are read to their end, and that is no fault."""
        candidates = (Path("/proc/version"), Path("/sys/kernel/mm/transparent_hugepage/enabled"))
        named = [path for path in candidates if path.exists()]
        if not named:
            pytest.skip("neither /proc nor /sys here")
        expected = sum(len(path.read_bytes()) for path in named)
        progress = Recorder()
        async with repository(tmp_path) as opened:
            made = await opened.backup([bytes(path) for path in named], None, progress)
        assert progress.faults == {}
        assert made.counts.read_bytes == expected > 0

    def test_an_empty_file_that_is_begun_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The byte beyond the end is asked for even if there is none before it."""
        slab = memoryview(bytearray(1 << 16))
        worker = object.__new__(chunkworker.Worker)
        path, fstat = tmp_path / "empty", os.fstat
        path.touch()

        def begun(fd: int) -> os.stat_result:
            status = fstat(fd)
            path.write_bytes(b"begun")
            return status

        monkeypatch.setattr(os, "fstat", begun)
        assert worker._small(bytes(path), slab, 7, 0) == (None, 7), "it is to be read as a stream"

    def test_pseudo_files_are_left_to_the_careful_reading(self) -> None:
        reader = SmallReader(memoryview(bytearray(1 << 16)), 1)
        assert reader.read(b"/proc/version", 0) == -1
        assert file_system_type(b"/proc/version") in chunkworker.PSEUDO
        assert file_system_type(b"/no/such/file") == 0


class TestOpening:
    def test_no_component_may_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "file").write_bytes(b"content")
        (tmp_path / "link").symlink_to("real")
        (tmp_path / "real" / "alias").symlink_to("file")
        os.close(open_real(bytes(tmp_path / "real" / "file"), os.O_RDONLY))
        reader = SmallReader(memoryview(bytearray(1 << 10)), 3)
        assert reader.read(bytes(tmp_path / "real" / "file"), 0) == 7
        for name in ("link/file", "real/alias"):
            with pytest.raises(OSError) as raised:
                open_real(bytes(tmp_path / name), os.O_RDONLY)
            assert raised.value.errno == errno.ELOOP
            assert reader.read(bytes(tmp_path / name), 0) == -1

    @pytest.mark.parametrize("linked", [False, True])
    def test_paths_beyond_path_max(self, tmp_path: Path, linked: bool) -> None:
        part, path, swapped = "d" * 200, str(tmp_path), False
        folder = os.open(tmp_path, os.O_RDONLY)
        while len(path) < 9000:
            os.mkdir(part, dir_fd=folder)
            deeper = os.open(part, os.O_RDONLY, dir_fd=folder)
            if linked and not swapped and len(path) > 3000:
                swapped = True
                os.rename(part, "aside", src_dir_fd=folder, dst_dir_fd=folder)
                os.symlink("aside", part, dir_fd=folder)
            os.close(folder)
            folder, path = deeper, f"{path}/{part}"
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        os.close(folder)
        target = os.fsencode(f"{path}/file")
        os.close(open_path(target, os.O_RDONLY))
        if linked:
            with pytest.raises(OSError) as raised:
                open_unlinked(target, os.O_RDONLY)
            assert raised.value.errno in (errno.ELOOP, errno.ENOTDIR)
        else:
            os.close(open_unlinked(target, os.O_RDONLY))
