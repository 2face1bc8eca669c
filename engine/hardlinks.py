"""Hard links of a restore: the first of a group is written, the others are linked to it at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec
from blake3 import blake3

from coffret.engine.records import Entry  # noqa: TC001 - msgspec looks at it at run time
from coffret.engine.restore_jobs import temporary_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coffret.engine.places import Places


# (device, inode, size, mtime in ns, hash of the content)
Group = tuple[int, int, int, int, bytes]


class _Waiting(msgspec.Struct, array_like=True):
    """A link to be made: where the first of its group is, and the inode that was there before; and where it belongs."""

    first_directory: bytes
    first_name: bytes
    before: int
    directory: bytes
    entry: Entry


_decode = msgspec.msgpack.Decoder(_Waiting).decode


class Outcome(NamedTuple):
    """A link: where it belongs, and why it could not be made; `apart`: its content can be restored there.

    There is no reason if it was made, or if that of the first of its group was told already.
    """

    directory: bytes
    entry: Entry
    reason: str
    apart: bool


class HardLinks:
    """Groups seen so far, and the links to be made, which wait on disk: there may be millions.

    A group is forgotten when all its links were seen.
    """

    def __init__(self) -> None:
        self._groups: dict[Group, tuple[bytes, bytes, int, int]] = {}
        self._spool: IO[bytes] | None = None
        self._making = False

    def seen(self, directory: bytes, entry: Entry, places: Places | None) -> bool:
        """Whether another link of this entry's group came before; then it is noted, and nothing is to be written.

        `places`, if there may be another file already where the first of a group goes: that one must not be taken for
        the first, should it stay there because the first can't be restored.
        """
        found = self._take(entry)
        if found is None:
            assert entry.extra is not None
            before = _inode(places, directory, entry.name) if places and stat.S_ISREG(entry.mode) else 0
            self._groups[_group(entry)] = (directory, entry.name, before, entry.extra.nlink - 1)
            return False
        if self._spool is None:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        record = msgspec.msgpack.encode(_Waiting(*found, directory, entry))
        self._spool.write(len(record).to_bytes(4, "little") + record)
        return True

    def _take(self, entry: Entry) -> tuple[bytes, bytes, int] | None:
        """The first of an entry's group, and the inode that was in its place; None if this is the first."""
        group = _group(entry)
        found = self._groups.get(group)
        if found is None:
            return None
        directory, name, before, left = found
        if left <= 1:
            del self._groups[group]
        else:
            self._groups[group] = (directory, name, before, left - 1)
        return directory, name, before

    def make(self, places: Places, *, replace: bool, at_most: int) -> list[Outcome]:
        """Make the next links that wait, `at_most` so many; nothing is returned when all are made."""
        if self._spool is None:
            return []
        if not self._making:
            self._making = True
            self._spool.seek(0)
        return list(self._next(places, replace, at_most))

    def _next(self, places: Places, replace: bool, at_most: int) -> Iterator[Outcome]:
        assert self._spool is not None
        while at_most and (head := self._spool.read(4)):
            waiting = _decode(self._spool.read(int.from_bytes(head, "little")))
            at_most -= 1
            try:
                _link(places, waiting, replace=replace)
            except OSError as error:
                reason = "" if error.errno == errno.ENOENT else error.strerror or str(error)
                yield Outcome(waiting.directory, waiting.entry, reason, error.errno in _APART)
            else:
                yield Outcome(waiting.directory, waiting.entry, "", False)

    def close(self) -> None:
        """Forget the links that wait; nothing else is called after it."""
        if self._spool is not None:
            self._spool.close()


# The file system takes no links, or no more of this one, or there is nothing to link to: the content can stand alone.
_APART = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.ENOENT)


def _group(entry: Entry) -> Group:
    """What the links of a file have in common.

    The inode is not enough. Entries of an unchanged file are taken over from snapshot to snapshot, while devices get
    other numbers when a machine starts anew; and a file may have been written to between the reading of two links.
    """
    return entry.device, entry.inode, entry.size, entry.mtime_ns, blake3(entry.content).digest(16)


def _link(places: Places, waiting: _Waiting, *, replace: bool) -> None:
    first = _inode(places, waiting.first_directory, waiting.first_name)
    if first in (waiting.before, 0):
        raise OSError(errno.ENOENT, "the file that it is a link to could not be restored")
    if first == _inode(places, waiting.directory, waiting.entry.name):
        return
    name = waiting.entry.name
    source = os.dup(places.enter(waiting.first_directory))
    try:
        folder = places.enter(waiting.directory)
        made = temporary_name() if replace else name
        os.link(waiting.first_name, made, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        if replace:
            try:
                os.rename(made, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(made, dir_fd=folder)
                raise
    finally:
        os.close(source)


def _inode(places: Places, directory: bytes, name: bytes) -> int:
    """The inode of what has a name in the target, 0 if there is nothing."""
    try:
        return os.stat(name, dir_fd=places.enter(directory, make=False), follow_symlinks=False).st_ino
    except OSError:
        return 0
