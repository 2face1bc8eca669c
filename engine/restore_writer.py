"""What a worker of the open pool writes in a restore: files, pieces of large ones, other nodes, metadata.

Each of these jobs returns faults (path below the target, reason, what it means): LOST, nothing was written; KEPT, it is
there, though not in every respect as it should be; or the number of the block that is damaged, so that another copy can
be tried. What was begun under a name and fails is removed; what is at work is marked in shared memory, so that the
parent can remove it, and nothing else, after a worker was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from typing import TYPE_CHECKING, Any

from coffret.engine._write import SmallWriter
from coffret.engine.errors import Damaged
from coffret.engine.metadata import apply, refresh
from coffret.engine.places import Places

if TYPE_CHECKING:
    from collections.abc import Callable

    from coffret.engine.metadata import Meta

    Part = tuple[int, int, int, bytes]
    Fault = tuple[bytes, str, int]
    # Gives the verified bytes of a part.
    Opened = Callable[[Part], memoryview]

KEPT, LOST = -2, -1
ALIGNMENT = 4096
# What is written past the page cache is at least so long (bytes).
_DIRECT_BYTES = 1 << 20
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# A name may have been given to something else meanwhile: a FIFO must not hold us up.
_AGAIN = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class DamagedPart(Damaged):
    """A part can't be had from the block (by its number in the job) that it was looked for in."""

    def __init__(self, message: str, block: int) -> None:
        super().__init__(message)
        self.block = block


class Mark:
    """What a worker is at, in shared memory: the job, which of its entries, and whether it has been created."""

    def __init__(self, words: memoryview, number: int) -> None:
        self.words, self.number = words, number

    def begin(self, job: int, entry: int) -> None:
        """An entry's name is about to be taken."""
        self.words[self.number] = job << 32 | entry << 2 | 1

    def created(self) -> None:
        """It was taken, by what is not whole yet."""
        self.words[self.number] |= 2

    def end(self) -> None:
        """Nothing is at work that would have to be removed."""
        self.words[self.number] = 0


def read_marks(words: memoryview) -> list[tuple[int, int, bool]]:
    """What workers were at: (job, entry, whether it was created)."""
    return [(word >> 32, (word & 0xFFFFFFFF) >> 2, bool(word & 2)) for word in words if word]


class Writer:
    """Writes below one directory, `root`. `owner`, `sparse`: whether to restore owners, and holes."""

    def __init__(
        self, root: int, mark: Mark, *, owner: bool, sparse: bool, wary: bool, unlock: bool, buffer_bytes: int
    ) -> None:
        self._places = Places(root, wary=wary, unlock=unlock)
        self._mark, self._owner, self._sparse, self._wary = mark, owner, sparse, wary
        self._buffer = mmap.mmap(-1, buffer_bytes)
        self._direct = True
        self._small = SmallWriter(self._buffer, mark.words, mark.number, owner=owner)

    def files(self, job: int, opened: Opened, groups: list[tuple[bytes, list[Any]]]) -> list[Fault]:
        """Whole files: groups = [(directory, [(name, temporary, meta, parts, extents)])]."""
        faults: list[Fault] = []
        number = 0
        for directory, files in groups:
            faults += self._small.group(self, opened, job, number, directory, files)
            number += len(files)
        return faults

    # What `SmallWriter` asks for: see `_write.UnusualWriter` ----------------------------------------------------------

    def enter(self, directory: bytes) -> int:
        """A descriptor of a directory, by its path below the root.

        :raises OSError: if it can't be entered or made
        """
        return self._places.enter(directory)

    @property
    def inherits(self) -> bool:
        """Whether what is made in the directory entered last gets an ACL that is not its own."""
        return self._places.inherits

    def unusual(
        self, folder: int, name: bytes, temporary: bytes, meta: Meta, data: list[memoryview], extents: bytes
    ) -> list[str]:
        """Write a file with holes, with attributes, or where ACLs are handed down; return notes on what is not set."""
        made = temporary or name
        fd = os.open(made, _CREATE, 0o600, dir_fd=folder)
        self._mark.created()
        notes: list[str] = []
        try:
            try:
                if extents:
                    notes += reserve(fd, meta[3], sparse=self._sparse, holes=True)
                    write_extents(fd, data, extents)
                else:
                    for part in data:
                        write_fully(fd, part)
                notes += self.dress(fd, meta)
            finally:
                os.close(fd)
            if temporary:
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(made, dir_fd=folder)
            raise
        return notes

    def dress(self, fd: int, meta: Meta) -> list[str]:
        """Set the metadata of an open file, as far as the system lets it be set."""
        return apply(fd, meta, owner=self._owner, strip=self._places.inherits)

    def kept(self, directory: bytes, name: bytes, notes: list[str]) -> list[Fault]:
        """Faults of a file that is there."""
        path = directory + b"/" + name if directory else name
        return [(path, note, KEPT) for note in notes]

    def lost(self, directory: bytes, name: bytes, error: Exception) -> Fault:
        """The fault of a file that is not there."""
        path = directory + b"/" + name if directory else name
        return path, reason_of(error), error.block if isinstance(error, DamagedPart) else LOST

    # Large files ------------------------------------------------------------------------------------------------------

    def piece(
        self,
        opened: Opened,
        place: tuple[bytes, bytes, int, int, int],
        writes: list[tuple[int, int, int, list[Part]]],
    ) -> list[Fault]:
        """A part of a large file: writes = [(file offset, length, bytes of the first part to skip, parts)]."""
        try:
            fd = self._again(*place)
            try:
                for offset, length, skip, parts in writes:
                    self._write_run(fd, offset, length, skip, [opened(part) for part in parts])
            finally:
                os.close(fd)
        except DamagedPart as error:
            return [(b"", str(error), error.block)]
        except OSError as error:
            return [(b"", reason_of(error), LOST)]
        return []

    def _again(self, directory: bytes, name: bytes, *identity: int) -> int:
        """Open a file that is being written in pieces, and nothing else that may have its name.

        :raises OSError: if it is not there any more
        """
        fd = os.open(name, _AGAIN, dir_fd=self._places.enter(directory))
        if is_same(os.fstat(fd), identity):
            return fd
        os.close(fd)
        raise OSError(errno.ESTALE, "something else was put in its place")

    def _write_run(self, fd: int, offset: int, length: int, skip: int, parts: list[memoryview]) -> None:
        """Write contiguous bytes: aligned pages directly, past the page cache; the edges through it."""
        lead = offset % ALIGNMENT
        view = memoryview(self._buffer)
        at = lead
        for part in parts:
            piece = part[skip:]
            skip = 0
            piece = piece[: lead + length - at]
            view[at : at + len(piece)] = piece
            at += len(piece)
        begin = offset - lead
        first = ALIGNMENT if lead else 0
        last = at - at % ALIGNMENT
        if not self._direct or last - first < _DIRECT_BYTES:
            write_at(fd, view[lead:at], offset)
            return
        if lead:
            write_at(fd, view[lead:first], offset)
        if last < at:
            write_at(fd, view[last:at], begin + last)
        self._write_direct(fd, view[first:last], begin + first)

    def _write_direct(self, fd: int, data: memoryview, offset: int) -> None:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            write_at(fd, data, offset)
        except OSError:  # some file systems refuse it when it is asked for, some at the write
            self._direct = False
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            write_at(fd, data, offset)
        else:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)

    def finish(
        self, directory: bytes, name: bytes, temporary: bytes, identity: tuple[int, int, int], meta: Meta
    ) -> list[Fault]:
        """A large file is written: set its metadata and give it its name; without a name it failed, and goes."""
        path = directory + b"/" + name if directory else name
        try:
            folder = self._places.enter(directory)
            if not name:
                os.unlink(temporary, dir_fd=folder)
                return []
            fd = self._again(directory, temporary, *identity)
            try:
                notes = self.dress(fd, meta)
            finally:
                os.close(fd)
            try:
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
        except OSError as error:
            return [(path, reason_of(error), LOST)]
        return [(path, note, KEPT) for note in notes]

    def nodes(self, job: int, nodes: list[tuple[bytes, bytes, bytes, Meta, bytes, int]]) -> list[Fault]:
        """What is neither a file nor a directory: (directory, name, temporary, meta, target, rdev)."""
        faults: list[Fault] = []
        for number, (directory, name, temporary, meta, target, rdev) in enumerate(nodes):
            path = directory + b"/" + name if directory else name
            try:
                folder = self._places.enter(directory)
                self._mark.begin(job, number)
                notes = self._make_node(folder, name, temporary, meta, target, rdev)
                faults += [(path, note, KEPT) for note in notes]
            except OSError as error:
                faults.append((path, reason_of(error), LOST))
            self._mark.end()
        return faults

    def _make_node(self, folder: int, name: bytes, temporary: bytes, meta: Meta, target: bytes, rdev: int) -> list[str]:
        made = temporary or name
        if stat.S_ISLNK(meta[0]):
            os.symlink(target, made, dir_fd=folder)
        else:
            os.mknod(made, stat.S_IFMT(meta[0]) | 0o600, rdev, dir_fd=folder)
        self._mark.created()
        try:
            notes = self._dress(folder, made, meta)
            if temporary:
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(made, dir_fd=folder)
            raise
        return notes

    def _dress(self, folder: int, name: bytes, meta: Meta) -> list[str]:
        """Set the metadata of what was just made. By a descriptor: the name may be another's already.

        :raises OSError: if it is
        """
        handle = os.open(name, _HANDLE, dir_fd=folder)
        try:
            status = os.fstat(handle)
            if stat.S_IFMT(status.st_mode) != stat.S_IFMT(meta[0]) or status.st_nlink != 1:
                raise OSError(errno.ESTALE, "something else was put in its place")
            return apply(b"/proc/self/fd/%d" % handle, meta, owner=self._owner, strip=self._places.inherits)
        finally:
            os.close(handle)

    def refresh(self, entries: list[tuple[bytes, bytes, Meta]]) -> list[Fault]:
        """Set the metadata of what stays because it has the content already: (directory, name, meta)."""
        faults: list[Fault] = []
        for directory, name, meta in entries:
            path = directory + b"/" + name if directory else name
            try:
                handle = os.open(name, _HANDLE, dir_fd=self._places.enter(directory))
                try:
                    status = os.fstat(handle)
                    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(meta[0]):
                        raise OSError(errno.ESTALE, "something else was put in its place")
                    notes = refresh(b"/proc/self/fd/%d" % handle, status, meta, owner=self._owner)
                finally:
                    os.close(handle)
                faults += [(path, note, KEPT) for note in notes]
            except OSError as error:
                faults.append((path, reason_of(error), LOST))
        return faults

    def directories(self, directories: list[tuple[bytes, Meta]]) -> list[Fault]:
        """Set the metadata of directories, in order: (path, meta); those that are missing are made."""
        faults: list[Fault] = []
        for path, meta in directories:
            try:
                fd = self._places.enter(path)
                strip = self._wary or not path
                if strip or not self._small.usual_metadata(fd, meta):
                    notes = apply(fd, meta, owner=self._owner, strip=strip)
                    faults += [(path, note, KEPT) for note in notes]
            except OSError as error:
                faults.append((path, reason_of(error), LOST))
        return faults


def is_same(status: os.stat_result, identity: tuple[int, ...]) -> bool:
    """Whether this is the file that was made, with (device, inode, owner), and has one name only."""
    found = (status.st_dev, status.st_ino, status.st_uid)
    return found == identity and status.st_nlink == 1 and stat.S_ISREG(status.st_mode)


def reason_of(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if isinstance(error, Damaged) else f"{type(error).__name__}: {error}"


def write_fully(fd: int, data: memoryview) -> None:
    """Write all bytes at the file's position."""
    while data:
        data = data[os.write(fd, data) :]


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def reserve(fd: int, size_bytes: int, *, sparse: bool, holes: bool) -> list[str]:
    """Give an empty file its size; one with `holes`, unless they are wanted (`sparse`), with all its blocks.

    If there is no room to fill them, they stay; that is what is returned, as a note.

    :raises OSError: if it can't be so large
    """
    os.ftruncate(fd, size_bytes)
    if sparse or not holes or not size_bytes:
        return []
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size_bytes)
        return [f"its holes are kept, since filling them failed ({error.strerror}); --sparse asks for that"]
    return []


def write_extents(fd: int, data: list[memoryview], extents: bytes) -> None:
    """Write a chunk stream to where a sparse file has data."""
    pending = list(data)
    for offset, length in struct.iter_unpack("<QQ", extents):
        while length and pending:
            piece = pending[0][:length]
            write_at(fd, piece, offset)
            offset, length = offset + len(piece), length - len(piece)
            pending[0] = pending[0][len(piece) :]
            if not pending[0]:
                pending.pop(0)
