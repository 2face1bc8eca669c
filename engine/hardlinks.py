"""Hard links of a restore: the first of a group is written, the others are linked to it at the end."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from typing import IO, TYPE_CHECKING

import msgspec
from blake3 import blake3

if TYPE_CHECKING:
    from coffret.engine.places import Places
    from coffret.engine.records import Entry


# (device, inode, size, mtime in ns, hash of the content)
Group = tuple[int, int, int, int, bytes]


class HardLinks:
    """Groups seen so far, and the links to be made, which wait on disk: there may be millions.

    A group is forgotten when all its links were seen.
    """

    def __init__(self) -> None:
        self._groups: dict[Group, tuple[bytes, bytes, int, int]] = {}
        self._spool: IO[bytes] | None = None

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
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed by make or close
        record = msgspec.msgpack.encode((*found, directory, entry.name))
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

    def make(self, places: Places, replace: bool) -> list[tuple[bytes, str]]:
        """Make the links; return (path, reason) of those that could not be made."""
        faults: list[tuple[bytes, str]] = []
        if self._spool is None:
            return faults
        with self._spool as spool:
            spool.seek(0)
            while head := spool.read(4):
                record = msgspec.msgpack.decode(
                    spool.read(int.from_bytes(head, "little")), type=tuple[bytes, bytes, int, bytes, bytes]
                )
                try:
                    _link(places, *record, replace=replace)
                except OSError as error:
                    path = record[3] + b"/" + record[4] if record[3] else record[4]
                    faults.append((path, error.strerror or str(error)))
        return faults

    def close(self) -> None:
        """Forget the links that wait; nothing else is called after it."""
        if self._spool is not None:
            self._spool.close()


def _group(entry: Entry) -> Group:
    """What the links of a file have in common.

    The inode is not enough. Entries of an unchanged file are taken over from snapshot to snapshot, while devices get
    other numbers when a machine starts anew; and a file may have been written to between the reading of two links.
    """
    return entry.device, entry.inode, entry.size, entry.mtime_ns, blake3(entry.content).digest(16)


def _link(
    places: Places,
    first_directory: bytes,
    first_name: bytes,
    before: int,
    directory: bytes,
    name: bytes,
    *,
    replace: bool,
) -> None:
    first = _inode(places, first_directory, first_name)
    if first in (before, 0):
        raise OSError(errno.ENOENT, "the file that it is a link to could not be restored")
    if first == _inode(places, directory, name):
        return
    source = os.dup(places.enter(first_directory))
    try:
        folder = places.enter(directory)
        try:
            os.link(first_name, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            if not replace:
                raise
            os.unlink(name, dir_fd=folder)
            os.link(first_name, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
    finally:
        os.close(source)


def _inode(places: Places, directory: bytes, name: bytes) -> int:
    """The inode of what has a name in the target, 0 if there is nothing."""
    try:
        return os.stat(name, dir_fd=places.enter(directory), follow_symlinks=False).st_ino
    except OSError:
        return 0
