"""What a worker makes of files that change, can't be read, or are none."""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from coffret.engine import chunkworker
from coffret.engine._read import SmallReader
from coffret.engine.chunkworker import Worker
from coffret.engine.frames import put_frame, take_frames
from coffret.engine.records import refs_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

MIB = 1 << 20


class TestWorker:
    """A worker of the pool in a thread of this process, so that a small file can be changed under its eyes."""

    def test_a_small_file_changes_while_it_is_read(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        changes: dict[str, Callable[[Path], object]] = {
            "stays": lambda path: None,
            "grows": lambda path: os.truncate(path, path.stat().st_size + 4),
            "shrinks": lambda path: os.truncate(path, 1000),
            "is emptied": lambda path: os.truncate(path, 0),
            "vanishes": lambda path: path.unlink(),
            "outgrows": lambda path: os.truncate(path, 40 * MIB),
        }
        contents = {name: Random(name).randbytes(327_680) for name in changes}
        for name, content in contents.items():
            (place / name).write_bytes(content)
            with (place / f"{name}, sparse").open("wb") as file:
                file.seek(2 * MIB)
                file.write(content)
                file.truncate(3 * MIB)
        real_preadv, seen = os.preadv, set()

        def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            """Change each file before the first byte is read."""
            if (inode := os.fstat(fd).st_ino) not in seen:
                seen.add(inode)
                path = Path(os.readlink(f"/proc/self/fd/{fd}"))
                changes[path.name.partition(",")[0]](path)
            return real_preadv(fd, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", preadv)
        # What the compiled reader meets half changed it leaves to this, as it leaves all that is unusual.
        monkeypatch.setattr(chunkworker, "SmallReader", NothingUsual)
        paths = [os.fsencode(place / name) for each in changes for name in (each, f"{each}, sparse")]
        with worker(slab_bytes=16 * MIB) as ask:
            _, _, slab, (_, stats, contents_there, _, results) = ask("batch", paths)
        assert stats == b""
        assert contents_there == [None] * len(paths)
        by_name = {os.fsdecode(os.path.basename(path)): results[index] for index, path in enumerate(paths)}
        noted = {name for name, result in by_name.items() if result[-1]}
        assert {by_name[name][-1] for name in noted} == {"changed while it was read"}
        unharmed = {"stays", "vanishes"}
        assert noted == {name for name in by_name if name.partition(",")[0] not in unharmed}
        lengths = {"shrinks": 1000, "is emptied": 0}
        offset = 0
        for name, (fields, _, refs, extents, _, _) in by_name.items():
            how, _, sparse = name.partition(",")
            data = bytes(slab[offset : offset + refs_length(refs)])
            offset += len(data)
            if sparse:
                assert fields[3] == 3 * MIB
                assert extents, "no extents would mean a file without holes"
                assert data == (b"" if how in lengths else contents[how])
            else:
                assert fields[3] == len(data) == lengths.get(how, 327_680)
                assert data == contents[how][: len(data)]
                assert extents == b""

    def test_files_that_fail_cost_no_slab(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk with bad sectors: a worker that lost a slab with each would wait for one forever."""
        (place / "large").write_bytes(bytes(20 * MIB))
        real_preadv, bad = os.preadv, True

        def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if bad and len(buffers[0]) > MIB:
                raise OSError(errno.EIO, "Input/output error")
            return real_preadv(fd, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", preadv)
        path = os.fsencode(place / "large")
        with worker(slab_bytes=16 * MIB) as ask:
            for _ in range(3):
                assert ask("file", path) == ("file", 1, "Input/output error")
            bad = False
            assert ask("file", path)[0] == "piece"


class NothingUsual(SmallReader):
    """Leaves every file to the worker's careful reading."""

    def read(self, path: bytes, at: int) -> int:
        return -1


@contextmanager
def worker(*, slab_bytes: int) -> Iterator[Callable[..., tuple[Any, ...]]]:
    """A function that sends a worker one job and returns its answer, with the slab's bytes instead of its number."""
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("slabs")
    os.ftruncate(memory, slab_bytes)

    def run() -> None:
        with suppress(EOFError), theirs:
            Worker(theirs.fileno(), memory, 0, 1, slab_bytes).run()

    def ask(kind: str, argument: object) -> tuple[Any, ...]:
        put_frame(ours.fileno(), (kind, 1, argument))
        received, answers = bytearray(), list[Any]()
        while not answers:
            data = ours.recv(1 << 16)
            assert data, "the worker is dead"
            received += data
            answers = list(take_frames(received))
        answer, job, *rest = answers[0]
        if answer != "file":
            rest[0] = os.pread(memory, slab_bytes, rest[0] * slab_bytes)
        return answer, job, *rest

    thread = threading.Thread(target=run)
    with ours:
        thread.start()
        put_frame(ours.fileno(), ("keys", bytes(32), ("fastcdc-gear64", MIB // 2, MIB, 4 * MIB), bytes(32), [0]))
        yield ask
    thread.join()
    os.close(memory)
