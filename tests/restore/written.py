"""What the tests of writing share: a target with a writer, metadata to ask for, and what came of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from coffret.engine.restore_writer import Mark, Writer

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


OWNERS = [os.geteuid(), os.geteuid() + 1] if os.geteuid() == 0 else [os.geteuid()]


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
