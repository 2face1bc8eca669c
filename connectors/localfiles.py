"""What `local` asks of the operating system: durable writes, exclusive names, steady scans, and errors put in the tree.

Blocking, for threads. Paths are relative to `root`, the descriptor of the repository's folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from coffret.connectors.errors import (
    AlreadyExists,
    ConnectorError,
    NotFound,
    NotStorage,
    PermissionRefused,
    StorageFull,
    TransientError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from coffret.connectors.base import Buffer

DIRECT_FROM_BYTES = 1 << 20
_BLOCK_BYTES = 4096
_MAX_PARTS = 1024  # IOV_MAX
_RENAME_NOREPLACE = 1
_TEMPORARY = re.compile(r"[0-9a-f]{32}")
# A killed process leaves what it was writing. No put takes as long as this; if one did, it would fail, not do harm.
_ABANDONED_AFTER_S = 24 * 3600.0
_SCANS = 4
# File systems stamp times by the kernel's tick, at most 10 ms long.
_TICK_NS = 10_000_000
# Names that nobody flushes go to the disk by themselves, on Linux in half a minute: in a folder that has not changed
# for so long they are there.
_WRITTEN_BACK_NS = 120 * 10**9

_KINDS: dict[int, type[ConnectorError]] = {
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StorageFull),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), PermissionRefused),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ELOOP), NotStorage),
    # Short of descriptors or memory for a moment, or a network mount that may come back.
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY), TransientError),
    **dict.fromkeys((errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN), TransientError),
}


@contextmanager
def mapped(path: str) -> Iterator[None]:
    """Turn any OSError into the ConnectorError that fits, naming `path` and the reason."""
    try:
        yield
    except OSError as error:
        kind = _KINDS.get(error.errno or 0, ConnectorError)
        raise kind(f"{path}: {error.strerror or error}") from error


def write(fd: int, body: Sequence[Buffer]) -> int:
    """Append the concatenation of `body` to a new file; return how many bytes that were. `settle` makes it durable.

    Of what is written in several calls all but the last must be of whole blocks, to go past the page cache.
    """
    views = [memoryview(part).cast("B") for part in body if len(part)]
    size_bytes = sum(map(len, views))
    if len(views) == 1 and size_bytes >= DIRECT_FROM_BYTES:
        views[0] = views[0][_write_direct(fd, views[0]) :]
    _write_cached(fd, views)
    return size_bytes


def settle(fd: int, size_bytes: int) -> None:
    """Wait until the content of a new file, so many bytes, is on the disk."""
    os.fdatasync(fd)
    if size_bytes >= DIRECT_FROM_BYTES:
        # Where direct writes are refused, let the cache forget what nobody is about to read.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_direct(fd: int, view: memoryview) -> int:
    """Write whole blocks past the page cache as far as the file system allows; return how many bytes that were.

    Whether it does depends on the file system, the mount and the buffer's address, and only trying tells: a refusal is
    EINVAL, and leaves what was written before.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    whole, at = len(view) // _BLOCK_BYTES * _BLOCK_BYTES, 0
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        while at < whole:
            at += os.write(fd, view[at:whole])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return at


def _write_cached(fd: int, views: list[memoryview]) -> None:
    first = 0
    while first < len(views):
        written = os.writev(fd, views[first : first + _MAX_PARTS])
        while first < len(views) and written >= len(views[first]):
            written -= len(views[first])
            first += 1
        if written:
            views[first] = views[first][written:]


def read_into(fd: int, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` from `offset`; return how many bytes there were, fewer only at the end of the file."""
    at = 0
    while at < len(buffer) and (count := os.preadv(fd, [buffer[at:]], offset + at)):
        at += count
    return at


def exists(name: str, root: int) -> bool:
    """Whether anything has this name."""
    try:
        os.stat(name, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def give_name(source: str, target: str, root: int, if_absent: bool) -> None:
    """Name a file `target`, in one step for whoever looks; it may keep its old name too.

    :raises FileExistsError: if `if_absent` and the name is taken; of any number of callers one succeeds
    """
    if not if_absent:
        os.rename(source, target, src_dir_fd=root, dst_dir_fd=root)
        return
    try:
        os.link(source, target, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
    except OSError as error:
        # FAT, exFAT and some network and FUSE mounts have no links, but can refuse to replace.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        _rename_exclusively(source, target, root)


def _rename_exclusively(source: str, target: str, root: int) -> None:
    import ctypes  # 6 ms, and hardly ever needed

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(root, os.fsencode(source), root, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def make_folders(folder: str, root: int) -> None:
    """Make a folder and those above it, durably; they may exist."""
    parts = folder.split("/")
    for depth in range(1, len(parts) + 1):
        with suppress(FileExistsError):
            os.mkdir("/".join(parts[:depth]), 0o700, dir_fd=root)
        sync_folder("/".join(parts[: depth - 1]), root)


def sync_folder(folder: str | Path, root: int | None = None) -> None:
    """Make the names in a folder durable; "" is the root, and without one `folder` is a path of its own."""
    fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
    try:
        _flush(fd)
    finally:
        os.close(fd)


def _flush(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network mounts know no fsync of folders, and need none; nor does what is mounted read-only.
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise


def is_young(fd: int) -> bool:
    """Whether a folder has names that may not be on the disk yet, if who gave them died before he flushed it."""
    return os.fstat(fd).st_mtime_ns > time.time_ns() - _WRITTEN_BACK_NS


def sync_above(path: Path) -> None:
    """Make a folder's names durable, and its own, and those of all above it."""
    for folder in (path, *path.parents):
        with suppress(PermissionError):  # who may not look into it has made nothing there
            sync_folder(folder)


def scan(folder: str, root: int, *, durable: bool = False) -> Iterator[os.DirEntry[str]]:
    """Iterate over a folder; nothing if it is none. Each name that is there all the time comes exactly once.

    `durable`: what comes survives a power loss, also where the process that made it died before it saw to that.

    One pass is not enough for that: on tmpfs and btrfs a file that is replaced moves to another place in the folder,
    and a pass over more than a thousand files can miss it (seen on tmpfs). So a folder that changed is read again.
    """
    try:
        fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        seen: set[str] = set()
        for _ in range(_SCANS):
            began_ns, changed_ns = time.time_ns(), os.fstat(fd).st_mtime_ns
            with os.scandir(fd) as entries:
                fresh = [entry for entry in entries if entry.name not in seen]
            if durable and is_young(fd):
                _flush(fd)
            for entry in fresh:
                seen.add(entry.name)
                yield entry
            if os.fstat(fd).st_mtime_ns == changed_ns < began_ns - _TICK_NS:
                return
    finally:
        os.close(fd)


def sweep(root: int, now_s: float) -> None:
    """Remove what killed processes left in `tmp/`; `now_s` by the file system's clock."""
    for entry in scan("tmp", root):
        with suppress(OSError):
            if _TEMPORARY.fullmatch(entry.name) and entry.stat().st_mtime < now_s - _ABANDONED_AFTER_S:
                os.unlink(f"tmp/{entry.name}", dir_fd=root)
