"""The compiled loops of scan, read and mirror, against the standard library."""

from __future__ import annotations

import os
import socket
import struct
import threading
from array import array
from bisect import bisect_left
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coffret.engine._read import FIELDS_FORMAT, SmallReader
from coffret.engine._rows import ROW_BYTES, bucket_starts, rows_of, sort_rows
from coffret.engine._scan import Directory, ReadAhead
from coffret.engine.mirror_run import ROW
from coffret.engine.records import UNNAMED, Block, pack_ref

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIB = 1 << 10
NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & {0, 0x2F} and name not in (b".", b".."))


def listed(path: Path) -> Directory:
    found = Directory()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found.read(fd)
    finally:
        os.close(fd)
    return found


class TestDirectory:
    @given(st.sets(NAMES, max_size=40))
    def test_names_come_in_order(self, tmp_path_factory: pytest.TempPathFactory, names: set[bytes]) -> None:
        folder = tmp_path_factory.mktemp("names")
        for name in names:
            os.close(os.open(os.fsencode(folder) + b"/" + name, os.O_CREAT | os.O_WRONLY, 0o600))
        found = listed(folder)
        assert found.list_names() == sorted(names)
        assert len(found) == len(names)

    def test_a_large_one_with_the_longest_names(self, tmp_path: Path) -> None:
        """More than the kernel tells in one call, names of all lengths."""
        names = {b"%0*d" % (1 + n % 255, n) for n in range(3000)}
        for name in names:
            os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT | os.O_WRONLY, 0o600))
        assert listed(tmp_path).list_names() == sorted(names)

    def test_what_is_put_takes_the_place_of_what_was_there(self, tmp_path: Path) -> None:
        (tmp_path / "b").touch()
        found = listed(tmp_path)
        status = os.stat(tmp_path)
        for name in (b"c", b"a", b"b", b"c"):
            found.put(name, status)
        assert found.list_names() == [b"a", b"b", b"c"]

    def test_what_is_no_directory_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        with pytest.raises(NotADirectoryError):
            Directory().read(fd)
        os.close(fd)


@contextmanager
def served(served: bool = True) -> Iterator[ReadAhead]:
    """A stack of directories with the thread that reads ahead, or without; the thread ends with it."""
    ahead = ReadAhead()
    thread = threading.Thread(target=ahead.serve)
    if served:
        thread.start()
    try:
        yield ahead
    finally:
        ahead.close()
        if served:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("with_thread", [True, False])
class TestReadAhead:
    @given(st.data())
    def test_a_walk_sees_the_whole_tree(
        self, tmp_path_factory: pytest.TempPathFactory, with_thread: bool, data: st.DataObject
    ) -> None:
        root = tmp_path_factory.mktemp("tree")
        folders = [root]
        for number in range(data.draw(st.integers(0, 60))):
            folder = data.draw(st.sampled_from(folders)) / f"{number}"
            folder.mkdir()
            folders.append(folder)
        seen, paths = set(), [os.fsencode(root)]
        with served(with_thread) as ahead:
            ahead.push([Directory(paths[0])])
            while ahead:
                path, names = paths.pop(), ahead.pop().list_names()
                assert names == sorted(os.listdir(path))
                seen.add(path)
                below = [path + b"/" + name for name in names]
                ahead.push([Directory(each) for each in below])
                paths += reversed(below)
        assert seen == {os.fsencode(folder) for folder in folders}

    def test_the_first_pushed_comes_next(self, tmp_path: Path, with_thread: bool) -> None:
        for name in "abcdefgh":
            (tmp_path / name / f"in {name}").mkdir(parents=True)
        with served(with_thread) as ahead:
            ahead.push([Directory(os.fsencode(tmp_path / name)) for name in "gh"])
            ahead.push([Directory(os.fsencode(tmp_path / name)) for name in "abcdef"])
            assert [ahead.pop().list_names() for _ in range(8)] == [[b"in %c" % name] for name in b"abcdefgh"]
            with pytest.raises(IndexError):
                ahead.pop()

    def test_one_that_can_not_be_read_is_an_error_of_its_own(self, tmp_path: Path, with_thread: bool) -> None:
        (tmp_path / "link").symlink_to("/")
        (tmp_path / "file").touch()
        expected = {"gone": FileNotFoundError, "link": OSError, "file": NotADirectoryError, "link/tmp": OSError}
        with served(with_thread) as ahead:
            ahead.push([Directory(os.fsencode(tmp_path / name)) for name in (*expected, ".")])
            for error in expected.values():
                with pytest.raises(error):
                    ahead.pop()
            assert ahead.pop().list_names() == [b"file", b"link"]

    def test_large_ones_and_what_is_put_into_them(self, tmp_path: Path, with_thread: bool) -> None:
        """More than is held at a time, and one that holds more than is read ahead."""
        counts = [3000] * 7 + [9000] + [10] * 70
        paths = [tmp_path / f"{number:02}" for number in range(len(counts))]
        for path, count in zip(paths, counts, strict=True):
            path.mkdir()
            for number in range(count):
                os.symlink("x", path / f"{number}")
        with served(with_thread) as ahead:
            ahead.push([Directory(os.fsencode(path)) for path in paths])
            for count in counts:
                found = ahead.pop()
                assert len(found) == count
                found.put(b"~", os.stat(tmp_path))
                found.put(b"5", os.stat(tmp_path))
                assert found.list_names() == [*sorted([b"%d" % number for number in range(count)]), b"~"]

    def test_closed_it_still_gives_what_is_asked_for(self, tmp_path: Path, with_thread: bool) -> None:
        with served(with_thread) as ahead:
            ahead.close()
            ahead.push([Directory(os.fsencode(tmp_path)) for _ in range(20)])
            assert ahead.pop().list_names() == []


class TestSmallReader:
    def test_usual_files_lie_back_to_back(self, tmp_path: Path) -> None:
        slab = memoryview(bytearray(1 << 20))
        contents = {f"{size}": os.urandom(size) for size in (0, 1, 4096, 100_000, 128 * KIB, 128 * KIB + 1, 300_000)}
        reader, at = SmallReader(slab, len(contents)), 0
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            assert reader.read(os.fsencode(tmp_path / name), at) == len(content)
            assert reader.fd == -1
            assert slab[at : at + len(content)] == content
            at += len(content)
        for name, found in zip(contents, struct.iter_unpack(FIELDS_FORMAT, reader.stats()), strict=True):
            status = os.stat(tmp_path / name)
            assert found == (
                *(status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns, status.st_ctime_ns),
                *(status.st_ino, status.st_dev, status.st_nlink),
            )

    def test_all_that_is_unusual_is_left(self, tmp_path: Path) -> None:
        reader = SmallReader(memoryview(bytearray(64 * KIB)), 3)
        (tmp_path / "usual").write_bytes(b"1")
        (tmp_path / "link").symlink_to("usual")
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "large").write_bytes(bytes(64 * KIB))
        with (tmp_path / "sparse").open("wb") as file:
            file.truncate(32 * KIB)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.fsencode(tmp_path / "socket"))
        for name in ("link", "folder", "pipe", "large", "sparse", "socket", "missing"):
            assert reader.read(os.fsencode(tmp_path / name), 0) == -1, name
        usual = os.fsencode(tmp_path / "usual")
        assert reader.read(usual, 64 * KIB) == -1  # no room: not even for the byte that tells a file that has grown
        assert reader.read(usual, 64 * KIB - 1) == -1
        assert reader.read(usual, 1 << 40) == -1
        assert reader.stats() == b""
        assert [reader.read(usual, 0) for _ in range(5)] == [1, 1, 1, -1, -1]

    def test_a_file_with_attributes_stays_open(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"content")
        with suppress(OSError):
            os.setxattr(path, "user.name", b"value")
        if not os.listxattr(path):
            pytest.skip("no extended attributes here")
        reader = SmallReader(memoryview(bytearray(KIB)), 1)
        assert reader.read(os.fsencode(path), 0) == 7
        assert os.getxattr(reader.fd, "user.name") == b"value"
        os.close(reader.fd)

    def test_it_needs_memory_it_can_write(self) -> None:
        with pytest.raises(BufferError):
            SmallReader(memoryview(bytes(10)), 1)


IDS = st.binary(min_size=32, max_size=32) | st.sampled_from([bytes(32), b"\xff" * 32, b"\x00\x10" + bytes(30)])
NUMBERS = st.integers(0, (1 << 32) - 1)


class TestRows:
    @given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, st.integers(0, 255), st.lists(IDS, max_size=4))), NUMBERS)
    def test_of_blocks(self, given_blocks: list[tuple[int, int, int, int, list[bytes]]], section: int) -> None:
        blocks, expected = [], []
        for offset, stored, raw, codec, ids in given_blocks:
            lengths = [(7 * n + raw) % (1 << 30) for n in range(len(ids))]
            refs = b"".join(map(pack_ref, ids, lengths))
            blocks.append(Block(offset, stored, raw, codec, refs))
            for n, chunk_id in enumerate(ids):
                if chunk_id != UNNAMED:
                    expected.append(
                        ROW.pack(chunk_id, section, offset, stored, raw, sum(lengths[:n]), lengths[n], codec)
                    )
        assert rows_of(blocks, section, UNNAMED) == b"".join(expected)

    @given(st.lists(IDS, max_size=200), st.integers(0, 12), st.data())
    def test_in_order_and_by_bucket(self, ids: list[bytes], bits: int, data: st.DataObject) -> None:
        rows = [ROW.pack(chunk_id, n % 3, 0, 0, 0, 0, 0, 0) for n, chunk_id in enumerate(ids)]
        assert sort_rows(b"".join(rows)) == b"".join(sorted(rows))
        begin = data.draw(st.integers(0, (1 << bits) - 1))
        end = data.draw(st.integers(begin, 1 << bits))
        within = sorted(row for row in rows if begin <= int.from_bytes(row[:4], "big") >> (32 - bits) < end)
        starts = array("I", bucket_starts(b"".join(within), begin, end, 32 - bits, 64))
        edges = [(bucket << (32 - bits)).to_bytes(4, "big") for bucket in range(begin, end)]
        assert starts.tolist() == [64 + bisect_left(within, edge) for edge in edges]

    def test_one_length(self) -> None:
        assert ROW.size == ROW_BYTES

    def test_numbers_that_can_not_be(self) -> None:
        ref = pack_ref(b"\x01" * 32, 5)
        with pytest.raises(ValueError, match="cut short"):
            rows_of([Block(0, 0, 0, 0, ref[:-1])], 0, UNNAMED)
        with pytest.raises(ValueError, match="another length"):
            rows_of([], 0, b"")
        with pytest.raises(ValueError, match="cut short"):
            sort_rows(bytes(ROW.size + 1))
        for numbers in ((1 << 32, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1 << 32, 0), (0, 0, 0, 256)):
            with pytest.raises(OverflowError):
                rows_of([Block(*numbers, ref)], 0, UNNAMED)
        with pytest.raises(OverflowError):
            rows_of([Block(0, 0, 0, 0, ref)], 1 << 32, UNNAMED)
        with pytest.raises(OverflowError, match="beyond any block"):
            rows_of([Block(0, 0, 0, 0, 2 * pack_ref(b"\x01" * 32, (1 << 32) - 1) + ref)], 0, UNNAMED)
