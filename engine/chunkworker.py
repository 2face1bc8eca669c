"""A worker of the chunk pool: opens, reads, cuts and hashes files into slabs of shared memory.

`python -m coffret.engine.chunkworker SOCKET MEMORY NUMBER SLABS SLAB_BYTES`, started by `chunkpool`. It imports
next to nothing, so that it is there soon and small: with `typing`, `contextlib` and `signal` it would take half as
long again. Messages on the socket are frames of marshal: both ends are the same interpreter. The first frame, of keys
and parameters, never stands on a command line.

    to the worker     ("keys", id_key, chunker, chunker_key, slabs)   ("batch", job, paths)   ("file", job, path)
                      ("free", slab)
    from the worker   ("batch", job, slab, results)   ("piece", job, slab, offset, refs)   ("file", job, result)
                      ("error", reason)

A file's result is an error text, or (stat, read_ns, refs, extents, xattrs, note): `stat` as STAT_FIELDS, `refs` packed,
`extents` packed if sparse, `note` a fault that did not stop it. A batch's are (read_ns, stats, contents, xattrs,
unusual): of usual files packed `stats` one behind the other, and a list of packed refs; of those that have any, xattrs
by position; the results of all others by position, those files' refs being None; a result that is None is for the
parent to ask for anew. Nothing waits for a slab while it holds one: the tail of a large file is kept in private memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from time import time_ns

from blake3 import blake3

from coffret.engine._read import FIELDS_FORMAT, SmallReader, file_system_type, open_real
from coffret.engine.chunker import Chunker
from coffret.engine.frames import put_frame, take_frames
from coffret.engine.workermain import run_worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STAT_FIELDS = ("mode", "uid", "gid", "size", "mtime_ns", "ctime_ns", "inode", "device", "nlink")
PATH_MAX = 4096
_PACK_REF = struct.Struct("<32sI").pack
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_QUIETLY = _OPEN | os.O_NOATIME
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_PROBES = 16
# What a file may hold whose size is not known before it is read.
_UNBOUNDED = 1 << 62
_CHANGED = "changed while it was read"
# What the kernel copies in one system call, with next to no time between the first byte and the last.
_AT_ONCE_BYTES = 128 << 10
# File systems that hold no data of their own, by the magic numbers of statfs(2): proc, sysfs, cgroup, cgroup2,
# debugfs, tracefs, securityfs, devpts, pstore, bpf, configfs, efivarfs, binfmt_misc, mqueue, fusectl, selinuxfs,
# nsfs, rpc_pipefs.
PSEUDO = frozenset(
    (
        *(0x9FA0, 0x62656572, 0x27E0EB, 0x63677270, 0x64626720, 0x74726163, 0x73636673, 0x1CD1, 0x6165676C),
        *(0xCAFE4A11, 0x62656570, 0xDE5E81E4, 0x42494E4D, 0x19800202, 0x65735543, 0xF97CFF8C, 0x6E736673, 0x67596969),
    )
)
# The extents of a file that is one hole: an extent of no length, since no extents at all mean a file without holes.
NO_DATA = bytes(16)

Xattrs = list[tuple[bytes, bytes]]
Result = tuple[tuple[int, ...], int, bytes, bytes, Xattrs, str]
BatchResult = tuple[int, bytes, list[bytes | None], dict[int, Xattrs], dict[int, str | Result | None]]
#: Iterates over the STAT_FIELDS of a batch's usual files.
iter_stats = struct.Struct(FIELDS_FORMAT).iter_unpack


def open_path(path: bytes, flags: int) -> int:
    """Open an absolute path of any length that links may lead along; beyond PATH_MAX by directory descriptors.

    :raises OSError: as os.open
    """
    return _open_stepwise(path, lambda part, folder: os.open(part, flags, dir_fd=folder), _follow)


def open_unlinked(path: bytes, flags: int) -> int:
    """The same for a path none of whose components may be a link.

    :raises OSError: as os.open, ELOOP for a link
    """
    if len(path) < PATH_MAX:
        return open_real(path, flags)
    return _open_stepwise(path, lambda part, folder: open_real(part, flags, folder), _do_not_follow)


def _follow(part: bytes, folder: int) -> int:
    return os.open(part, _STEP, dir_fd=folder)


def _do_not_follow(part: bytes, folder: int) -> int:
    return open_real(part, _STEP, folder)


def _open_stepwise(path: bytes, last: Callable[[bytes, int], int], step: Callable[[bytes, int], int]) -> int:
    folder, rest = os.open(b"/", _STEP), path.strip(b"/") or b"."
    try:
        while len(rest) >= PATH_MAX:
            at = rest.rindex(b"/", 0, PATH_MAX - 1)
            head, rest = rest[:at], rest[at + 1 :]
            deeper = step(head, folder)
            os.close(folder)
            folder = deeper
        return last(rest, folder)
    finally:
        os.close(folder)


def open_source(path: bytes) -> int:
    """Open a file to be read, without touching its access time where that is allowed (to its owner and root)."""
    try:
        return open_unlinked(path, _OPEN_QUIETLY)
    except PermissionError:
        return open_unlinked(path, _OPEN)


def read_xattrs(target: int | bytes, *, follow: bool = True) -> list[tuple[bytes, bytes]]:
    """All extended attributes, ACLs and capabilities included, sorted by name; empty where there are none at all."""
    try:
        names = os.listxattr(target) if follow else os.listxattr(target, follow_symlinks=False)
    except OSError:
        return []
    found: list[tuple[bytes, bytes]] = []
    if not names:
        return found
    for name in sorted(names):
        try:
            found.append((os.fsencode(name), os.getxattr(target, name, follow_symlinks=follow)))
        except OSError:  # removed meanwhile, or not readable by this user
            continue
    return found


def data_extents(fd: int, size: int) -> list[tuple[int, int]]:
    """(offset, length) of what is not a hole, by SEEK_DATA and SEEK_HOLE; all of the file if they are not supported.

    :raises OSError: if they fail
    """
    found, at = [], 0
    try:
        while at < size:
            begin = _seek(fd, at, os.SEEK_DATA)
            if begin is None:  # only a hole is left
                break
            end = _seek(fd, begin, os.SEEK_HOLE)
            at = size if end is None else min(end, size)  # None: it was cut off meanwhile, as reading will show
            if begin < at:
                found.append((begin, at - begin))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return [(0, size)]
        raise
    return found


def _seek(fd: int, offset: int, whence: int) -> int | None:
    """lseek(2); None if there is nothing of the kind from the offset on."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


class Worker:
    """The state of one worker process: its socket, its slabs, and the frames read and not dealt with yet."""

    def __init__(self, socket: int, memory: int, number: int, slabs: int, slab_bytes: int) -> None:
        self._socket, self._slab_bytes = socket, slab_bytes
        self._view = memoryview(mmap.mmap(memory, slabs * slab_bytes))
        self._free: list[int] = []
        self._jobs: list[tuple[Any, ...]] = []
        self._input = bytearray()

    def run(self) -> None:
        """Serve until the socket ends."""
        while True:
            while not self._jobs:
                self._receive()
            message = self._jobs.pop(0)
            if message[0] == "keys":
                self._id_key, chunker, chunker_key, slabs = message[1:]
                name, minimum, average, maximum = chunker
                self._free = list(slabs)
                self._chunker = Chunker(name, minimum, average, maximum, chunker_key)
                self._whole_bytes = minimum
            elif message[0] == "batch":
                self._batch(message[1], message[2])
            else:
                self._file(message[1], message[2])

    def _receive(self) -> None:
        data = os.read(self._socket, 1 << 18)
        if not data:
            raise EOFError
        self._input += data
        for message in take_frames(self._input):
            if message[0] == "free":
                self._free.append(message[1])
            else:
                self._jobs.append(message)

    def _send(self, message: tuple[Any, ...]) -> None:
        put_frame(self._socket, message)

    def _slab(self) -> tuple[int, memoryview]:
        while not self._free:
            self._receive()
        # The one used last: its memory is touched already, and a small run never touches the others.
        number = self._free.pop()
        at = number * self._slab_bytes
        return number, self._view[at : at + self._slab_bytes]

    def _batch(self, job: int, paths: list[bytes]) -> None:
        """Read many files into one slab, back to back; one that no longer fits is for the parent to ask for anew."""
        number, view = self._slab()
        reader = SmallReader(view, len(paths))
        contents: list[bytes | None] = []
        xattrs: dict[int, Xattrs] = {}
        unusual: dict[int, str | Result | None] = {}
        at, read_ns = 0, time_ns()
        for index, path in enumerate(paths):
            size = reader.read(path, at) if len(path) < PATH_MAX else -1
            if size < 0:
                contents.append(None)
                try:
                    unusual[index], at = self._small(path, view, at, read_ns)
                except OSError as error:
                    unusual[index] = error.strerror or str(error)
                continue
            contents.append(self._refs(view[at : at + size]))
            at += size
            if reader.fd >= 0:
                xattrs[index] = read_xattrs(reader.fd)
                os.close(reader.fd)
        self._send(("batch", job, number, (read_ns, reader.stats(), contents, xattrs, unusual)))

    def _small(self, path: bytes, view: memoryview, at: int, read_ns: int) -> tuple[str | Result | None, int]:
        """Read a small file that is unusual to `view[at:]`: (result, where the next one goes)."""
        fd = open_source(path)
        try:
            before = os.fstat(fd)
            mode, size = before.st_mode, before.st_size
            if mode & 0o170000 != 0o100000:
                return "is no regular file any more", at
            if at + size + 1 > len(view):
                return None, at
            if before.st_blocks * 512 < size and (found := data_extents(fd, size)) != [(0, size)]:
                return self._sparse(fd, before, found, view, at, read_ns)
            # One byte more than expected tells a file that has grown.
            got, at_once = read_cached(fd, view[at : at + size + 1])
            if got and not size:  # it does not say how long it is, or has just been begun
                return None, at
            note = ""
            if got > size or (got < size and not pseudo(fd)):
                note = _CHANGED
            elif not at_once or size > _AT_ONCE_BYTES:
                # What one read took from memory needs no second look: a later change shows in the times, and one in
                # the same tick makes the file racy.
                note = changed(before, os.fstat(fd))
            got = min(got, size)
            data = view[at : at + got]
            return (fields(before, got), read_ns, self._refs(data), b"", read_xattrs(fd), note), at + got
        finally:
            os.close(fd)

    def _sparse(
        self, fd: int, before: os.stat_result, found: list[tuple[int, int]], view: memoryview, at: int, read_ns: int
    ) -> tuple[Result, int]:
        expected, got = sum(length for _, length in found), 0
        for offset, length in found:
            got += read_fully(fd, view[at + got : at + got + length], offset)
        note = changed(before, os.fstat(fd)) if got == expected else _CHANGED
        extents = pack_extents(found if got == expected else clip(found, got)) or NO_DATA
        data, xattrs = view[at : at + got], read_xattrs(fd)
        return (fields(before, before.st_size), read_ns, self._refs(data), extents, xattrs, note), at + got

    def _refs(self, data: memoryview) -> bytes:
        if len(data) <= self._whole_bytes:
            return _PACK_REF(blake3(data, key=self._id_key).digest(), len(data)) if data else b""
        refs, at = [], 0
        for length in self._chunker.cut(data, final=True):
            refs.append(_PACK_REF(blake3(data[at : at + length], key=self._id_key).digest(), length))
            at += length
        return b"".join(refs)

    def _file(self, job: int, path: bytes) -> None:
        try:
            fd = open_source(path)
        except OSError as error:
            self._send(("file", job, error.strerror or str(error)))
            return
        try:
            read_ns = time_ns()
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                self._send(("file", job, "is no regular file any more"))
                return
            size = before.st_size
            # What is empty by its size and not by its content, as in /proc, is read to its end.
            segments, extents = [(0, size or _UNBOUNDED)], b""
            if before.st_blocks * 512 < size and (found := data_extents(fd, size)) != segments:
                segments, extents = found, pack_extents(found) or NO_DATA
            got = self._stream(job, fd, segments, size)
            expected = sum(length for _, length in segments) if size else got
            whole = got == expected or (not extents and pseudo(fd))
            note = changed(before, os.fstat(fd)) if whole else _CHANGED
            stored = fields(before, size if extents else got)
            if got < expected and extents:
                # What is missing at the end was cut off: keep only the extents that were read.
                extents = pack_extents(clip(segments, got)) or NO_DATA
            self._send(("file", job, (stored, read_ns, b"", extents, read_xattrs(fd), note)))
        except OSError as error:
            self._send(("file", job, error.strerror or str(error)))
        finally:
            os.close(fd)

    def _stream(self, job: int, fd: int, segments: list[tuple[int, int]], size: int) -> int:
        """Read segments as one stream, slab by slab, and send its chunks; return the bytes read."""
        evict = not mostly_cached(fd, size)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        pending = list(reversed(segments))
        carry, total, final = b"", 0, not pending
        while not final:
            number, view = self._slab()
            end = len(carry)
            view[:end] = carry
            while end < len(view) and pending:
                offset, length = pending.pop()
                want = min(length, len(view) - end)
                try:
                    got = read_fully(fd, view[end : end + want], offset)
                except OSError:
                    self._free.append(number)
                    raise
                if evict:
                    os.posix_fadvise(fd, offset, got, os.POSIX_FADV_DONTNEED)
                end, total = end + got, total + got
                if got < want:
                    pending.clear()
                elif want < length:
                    pending.append((offset + want, length - want))
            final = not pending
            at, refs = 0, []
            for length in self._chunker.cut(view[:end], final=final):
                refs.append(_PACK_REF(blake3(view[at : at + length], key=self._id_key).digest(), length))
                at += length
            carry = bytes(view[at:end])
            self._send(("piece", job, number, 0, b"".join(refs)))
        return total


def fields(status: os.stat_result, size: int) -> tuple[int, ...]:
    """The parts of a stat that an entry records, in the order of STAT_FIELDS, with the size that was read."""
    return (
        status.st_mode,
        status.st_uid,
        status.st_gid,
        size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
        status.st_nlink,
    )


def changed(before: os.stat_result, after: os.stat_result) -> str:
    """What to report when a file was written to while it was read; empty if it was not.

    By its ctime too, unless another change explains that: who writes and puts the mtime back can't put back this.
    """
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        return _CHANGED
    others = (before.st_mode, before.st_uid, before.st_gid, before.st_nlink)
    explained = others != (after.st_mode, after.st_uid, after.st_gid, after.st_nlink)
    return "" if explained or before.st_ctime_ns == after.st_ctime_ns else _CHANGED


def pseudo(fd: int) -> bool:
    """Whether a file's content is made as it is read: then its size tells nothing."""
    return file_system_type(b"/proc/self/fd/%d" % fd) in PSEUDO


def pack_extents(extents: list[tuple[int, int]]) -> bytes:
    """Extents as they are stored: pairs of little-endian u64."""
    return b"".join([struct.pack("<QQ", *extent) for extent in extents])


def clip(segments: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The first `length` bytes of segments."""
    kept = []
    for offset, size in segments:
        if length <= 0:
            break
        kept.append((offset, min(size, length)))
        length -= size
    return kept


def read_fully(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset`, up to the end of the file; return the bytes read."""
    got = 0
    while got < len(view):
        count = os.preadv(fd, [view[got:]], offset + got)
        if count == 0:
            break
        got += count
    return got


def read_cached(fd: int, view: memoryview) -> tuple[int, bool]:
    """Read a small file from its start, up to a byte more than it should have: (bytes, whether one read took them).

    What had to come from the disk does not stay in the page cache: a backup must not push a server's working set out
    of memory.
    """
    try:
        got = os.preadv(fd, [view], 0, os.RWF_NOWAIT)
    except OSError:  # EAGAIN: not cached; EOPNOTSUPP: the file system can't tell
        got = 0
    if got >= max(1, len(view) - 1):
        return got, True
    got += read_fully(fd, view[got:], got)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return got, False


def mostly_cached(fd: int, size: int) -> bool:
    """Whether most of a large file lies in the page cache, judged by a byte at each of 16 places."""
    probe, found = bytearray(1), 0
    for i in range(_PROBES):
        try:
            found += os.preadv(fd, [probe], size * i // _PROBES, os.RWF_NOWAIT)
        except OSError:  # EAGAIN: not cached
            continue
    return found > _PROBES // 2


if __name__ == "__main__":
    run_worker(Worker)
