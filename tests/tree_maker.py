"""Making directory trees piece by piece: whatever the file system refuses is noted, not fatal."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING

from tests.tree_state import walk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What a file system or a container may refuse.
_REFUSALS = {errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENOSPC, errno.E2BIG, errno.EINVAL, errno.ENAMETOOLONG}


class TreeMaker:
    """Makes entries below `root`, which it creates. Paths are bytes below `root`.

    `refused` names the kinds that could not be made here; `chosen_times_ns` the times of entries that are not to get
    one by chance.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, Random(seed)
        self.refused: set[str] = set()
        self.chosen_times_ns: dict[bytes, int] = {}
        root.mkdir()

    def at(self, path: bytes) -> bytes:
        """Where `path` lies; the directories on the way are made."""
        whole = os.path.join(os.fsencode(self.root), path)
        os.makedirs(os.path.dirname(whole), exist_ok=True)
        return whole

    def file(self, path: bytes, content: bytes = b"") -> bytes:
        """Make a file; returns its whole path, like the other methods."""
        whole = self.at(path)
        with open(whole, "xb") as file:  # noqa: PTH123 (bytes)
            file.write(content)
        return whole

    def directory(self, path: bytes) -> bytes:
        """Make a directory."""
        whole = self.at(path)
        os.mkdir(whole)
        return whole

    @contextmanager
    def trying(self, kind: str) -> Iterator[None]:
        """Try to make what may be refused."""
        try:
            yield
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self.refused.add(kind)

    def hard_link(self, first: bytes, *others: bytes) -> None:
        """Give the file at the whole path `first` further names."""
        for path in others:
            with self.trying("hard links"):
                os.link(first, self.at(path), follow_symlinks=False)

    def attribute(self, path: bytes, name: str, value: bytes) -> None:
        """Set an extended attribute of the entry at a whole path."""
        with self.trying(f"{name.partition('.')[0]} xattrs"):
            os.setxattr(path, name, value, follow_symlinks=False)

    def sparse_file(self, path: bytes, size: int, *data: tuple[int, int]) -> None:
        """Make a file of `size` bytes with random data at (offset, length) and holes elsewhere."""
        fd = os.open(self.file(path), os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
            for offset, length in data:
                os.pwrite(fd, self.random.randbytes(length), offset)
        finally:
            os.close(fd)

    def text(self, size: int) -> bytes:
        """Lines of words of a small vocabulary: as compressible as prose."""
        words = [self.random.randbytes(self.random.randint(1, 5)).hex().encode() for _ in range(3000)]
        weights = [1 / (rank + 1) for rank in range(len(words))]
        chosen = self.random.choices(words, weights, k=size // 4)
        return b"\n".join(b" ".join(chosen[at : at + 12]) for at in range(0, len(chosen), 12))[:size]

    def chain(self, top: bytes, names: list[bytes]) -> None:
        """Make directories in one another, however long the path gets, and at their end a file and links."""
        fd = os.open(self.directory(top), os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in names:
                os.mkdir(name, dir_fd=fd)
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            file = os.open("file", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640, dir_fd=fd)
            try:
                os.write(file, b"at the end of " + top)
            finally:
                os.close(file)
            os.symlink(b"file", "link", dir_fd=fd)
            os.mkfifo("fifo", dir_fd=fd)
            with self.trying("hard links"):
                os.link(self.at(b"links/first"), "linked", dst_dir_fd=fd)
            with self.trying("user xattrs"):
                os.setxattr(b"/proc/self/fd/%d/file" % fd, "user.deep", top)
        finally:
            os.close(fd)

    def set_times(self) -> None:
        """Give each entry its time, directories after what is in them: an odd number of nanoseconds for each."""
        for found in walk(self.root):
            mtime_ns = self.chosen_times_ns.get(found.path)
            if mtime_ns is None:
                mtime_ns = self.random.randrange(10**18, 2 * 10**18)
            os.utime(found.name, ns=(mtime_ns, mtime_ns), dir_fd=found.fd, follow_symlinks=False)
