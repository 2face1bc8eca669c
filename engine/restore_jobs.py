"""What a restore sends to a worker: a window of small files, or a piece of a large one, with the blocks they need."""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from coffret.engine.restore_writer import is_same, reserve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.mirror import Location
    from coffret.engine.places import Places
    from coffret.engine.records import Entry

Chunk = tuple[bytes, int, "Location | None"]
# Of a window's files: as many as keep a worker busy for some ten milliseconds, since a block that two windows need is
# opened twice; and not so many that a worker holds much memory.
_MAX_FILES, _MAX_RAW_BYTES = 1024, 16 << 20
# A worker holds all blocks of a window open, and of these it may need little.
_MAX_BLOCK_BYTES = 64 << 20


def is_whole(entry: Entry, chunks: Sequence[Chunk]) -> bool:
    """Whether all of a file's chunks were found, and are as long together as a file without holes is."""
    total = 0
    for _, length, found in chunks:
        if found is None or found.length != length:
            return False
        total += length
    return total == entry.size


def file_meta(entry: Entry, xattrs: Sequence[tuple[bytes, bytes]]) -> tuple[Any, ...]:
    """What a worker sets on what it made: (mode, uid, gid, size, mtime_ns, xattrs)."""
    return entry.mode, entry.uid, entry.gid, entry.size, entry.mtime_ns, list(xattrs)


def temporary_name() -> bytes:
    """A name for a file that is not whole yet."""
    return b".coffret-" + secrets.token_hex(8).encode()


class Window:
    """The blocks that fit in one slab, and the files made of them.

    `files`: how many, of `size_bytes` together. `groups`: [(directory, [(name, temporary, meta, parts, extents)])]; a
    part is (block, inner, length, chunk id).
    """

    def __init__(self, slab_bytes: int) -> None:
        self.blocks: list[Location] = []
        self.groups: list[tuple[bytes, list[Any]]] = []
        self.raw_bytes = 0
        self._slab_bytes = slab_bytes
        self._numbers: dict[tuple[bytes, int], int] = {}
        self._stored_bytes = self._block_bytes = 0
        self.files = self.size_bytes = 0

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether another file of these chunks, or a file at all, fits."""
        if self.files >= _MAX_FILES or self.raw_bytes >= _MAX_RAW_BYTES:
            return False
        room, open_room = self._slab_bytes - self._stored_bytes, _MAX_BLOCK_BYTES - self._block_bytes
        blocks = [found for _, _, found in chunks if found is not None]
        if sum([f.stored_bytes for f in blocks]) <= room and sum([f.raw_bytes for f in blocks]) <= open_room:
            return True
        more = {(found.pack, found.offset): found for found in blocks}
        new = [found for key, found in more.items() if key not in self._numbers]
        return sum([f.stored_bytes for f in new]) <= room and sum([f.raw_bytes for f in new]) <= open_room

    def part(self, chunk_id: bytes, length: int, location: Location) -> tuple[int, int, int, bytes]:
        """A chunk as a worker finds it; its block joins the window."""
        key = (location.pack, location.offset)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.blocks)
            self.blocks.append(location)
            self._stored_bytes += location.stored_bytes
            self._block_bytes += location.raw_bytes
        self.raw_bytes += length
        return number, location.inner, length, chunk_id

    def take(
        self,
        directory: bytes,
        name: bytes,
        meta: tuple[Any, ...],
        chunks: Sequence[Chunk],
        extents: bytes,
        *,
        temporary: bool,
    ) -> bool:
        """Add a whole file; False if it does not fit, or had better begin another window."""
        if self.files >= _MAX_FILES or self.raw_bytes >= _MAX_RAW_BYTES:
            return False
        parts, raw_bytes = [], 0
        for chunk_id, length, found in chunks:
            if found is None or (number := self._numbers.get((found.pack, found.offset))) is None:
                # A block that is new here: one that is nearly full had better end with the block before.
                if self.files >= _MAX_FILES * 7 // 8 or self.raw_bytes >= _MAX_RAW_BYTES * 7 // 8:
                    return False
                if not self.fits(chunks):
                    return False
                parts = [self.part(chunk_id, length, found) for chunk_id, length, found in chunks if found is not None]
                raw_bytes = 0
                break
            parts.append((number, found.inner, length, chunk_id))
            raw_bytes += length
        self.raw_bytes += raw_bytes
        if not self.groups or self.groups[-1][0] != directory:
            self.groups.append((directory, []))
        self.groups[-1][1].append((name, temporary_name() if temporary else b"", meta, parts, extents))
        self.files += 1
        self.size_bytes += meta[3]
        return True

    def made(self, number: int) -> tuple[bytes, bytes]:
        """Where the n-th file is made: (directory, the name it has meanwhile)."""
        directory, (name, temporary, *_) = self._at(number)
        return directory, temporary or name

    def path(self, number: int) -> bytes:
        """Where the n-th file belongs, below the target."""
        directory, file = self._at(number)
        name: bytes = file[0]
        return directory + b"/" + name if directory else name

    def _at(self, number: int) -> tuple[bytes, Any]:
        for directory, files in self.groups:
            if number < len(files):
                return directory, files[number]
            number -= len(files)
        raise IndexError(number)


class LargeFile:
    """A file written in pieces under a temporary name: where each chunk of its stream goes, and what is under way."""

    def __init__(self, directory: bytes, name: bytes, meta: tuple[Any, ...], extents: bytes) -> None:
        self.directory, self.name, self.meta = directory, name, meta
        self.temporary = temporary_name()
        # What it is known by (device, inode, owner), since its name may be given to something else.
        self.identity = (0, 0, 0)
        self.unfinished, self.complete, self.reason = 0, False, ""
        self._sparse = bool(extents)
        self._extents: deque[tuple[int, int]] = deque(struct.iter_unpack("<QQ", extents) if extents else [(0, meta[3])])
        self._writes: list[list[Any]] = []

    def create(self, places: Places, sparse: bool) -> list[str]:
        """Make the file, with its final size; return what there is to say about it.

        :raises OSError: if it can't be
        """
        folder = places.enter(self.directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.temporary, flags, 0o600, dir_fd=folder)
        try:
            status = os.fstat(fd)
            self.identity = status.st_dev, status.st_ino, status.st_uid
            return reserve(fd, self.meta[3], sparse=sparse, holes=self._sparse)
        except OSError:
            os.unlink(self.temporary, dir_fd=folder)
            raise
        finally:
            os.close(fd)

    def remove(self, places: Places) -> None:
        """Remove it, if it is there and still unfinished."""
        with contextlib.suppress(OSError):
            folder = places.enter(self.directory)
            status = os.stat(self.temporary, dir_fd=folder, follow_symlinks=False)
            if is_same(status, self.identity):
                os.unlink(self.temporary, dir_fd=folder)

    def add(self, window: Window, chunk_id: bytes, length: int, location: Location) -> None:
        """The next chunk of the stream: it continues the last write, or, where a hole comes between, begins another."""
        part, skip = window.part(chunk_id, length, location), 0
        while length and self._extents:
            offset, room = self._extents[0]
            count = min(length, room)
            last = self._writes[-1] if self._writes else None
            if last is not None and last[0] + last[1] == offset and skip == 0:
                last[1] += count
                last[3].append(part)
            elif count:
                self._writes.append([offset, count, skip, [part]])
            length, skip = length - count, skip + count
            if count == room:
                self._extents.popleft()
            else:
                self._extents[0] = (offset + count, room - count)

    def take(self) -> list[tuple[int, int, int, list[Any]]]:
        """The writes of the piece that is complete: (file offset, length, bytes to skip, parts)."""
        writes, self._writes = self._writes, []
        return [(offset, length, skip, parts) for offset, length, skip, parts in writes]
