"""The directory that a restore writes to: opened once, and looked at before anything is written."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import msgspec

from coffret.engine.errors import TargetError
from coffret.engine.metadata import drop_acls, inherits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.places import Places
    from coffret.engine.records import Entry

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What a new file system holds of its own accord.
_NOTHING = {b"lost+found"}
ELSEWHERE = "choose another --to DIR"


class Target(msgspec.Struct):
    """An open directory. `occupied`: the names in it; `made_mode`: if it was made for this, the mode it is to have;
    `wary`: what is in it, or it itself, may hand down ACLs."""

    path: bytes
    fd: int
    occupied: frozenset[bytes]
    made_mode: int | None
    wary: bool

    def close(self, *, unused: bool) -> None:
        """Let go of it; if it was made and nothing came into it, it goes again."""
        os.close(self.fd)
        if unused and self.made_mode is not None:
            try:
                os.rmdir(self.path)
            except OSError:
                return

    def publish(self) -> None:
        """Give a directory that was made the mode it would have had at once."""
        if self.made_mode is not None:
            os.fchmod(self.fd, self.made_mode)


def open_target(path: bytes, *, replace: bool) -> Target:
    """Open the target, making it, private, if it is missing. `replace`: what it holds may be replaced.

    :raises TargetError: if it can't be used
    """
    try:
        made = _make(path)
        fd = os.open(path, _FLAGS | (os.O_NOFOLLOW if made else 0))
        try:
            status = os.fstat(fd)
            if made:
                os.fchmod(fd, 0o700)
                drop_acls(fd)
            elif not _writable(fd, path, ours=replace and status.st_uid == os.geteuid()):
                raise TargetError(f"{os.fsdecode(path)} can't be written to", remedy=ELSEWHERE)
            occupied = frozenset(map(os.fsencode, os.listdir(fd))) - _NOTHING
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise TargetError(f"{os.fsdecode(path)}: {error.strerror}", remedy=ELSEWHERE) from None
    return Target(path, fd, occupied, stat.S_IMODE(status.st_mode) if made else None, replace or inherits(fd))


def existing(places: Places, directory: bytes, entries: Sequence[Entry], *, alike: bool) -> dict[bytes, str]:
    """Of these entries those that are there: their names, and "", or what is wrong with that (another type).

    `alike`: only those that look the same by type, size, time, and what a link or a device means.
    """
    found: dict[bytes, str] = {}
    try:
        folder = places.enter(directory, make=False)
    except OSError:  # it is not there; or who writes there will say so, for each file
        return found
    for entry in entries:
        try:
            status = os.stat(entry.name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            continue
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
            if not alike:
                found[entry.name] = "kept, though what is there is of another type"
        elif not alike or _alike(folder, entry, status):
            found[entry.name] = ""
    return found


def _alike(folder: int, entry: Entry, status: os.stat_result) -> bool:
    if status.st_mtime_ns != entry.mtime_ns:
        return False
    if stat.S_ISREG(entry.mode):
        return status.st_size == entry.size
    if stat.S_ISLNK(entry.mode):
        target = entry.extra.target if entry.extra is not None else b""
        return os.readlink(entry.name, dir_fd=folder) == target
    if stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
        return status.st_rdev == (entry.extra.rdev if entry.extra is not None else 0)
    return True


def _make(path: bytes) -> bool:
    """Make the target, and what leads to it; False if it is there."""
    if above := os.path.dirname(path.rstrip(b"/")):
        os.makedirs(above, exist_ok=True)
    try:
        os.mkdir(path)
    except FileExistsError:
        return False
    return True


def _writable(fd: int, path: bytes, *, ours: bool) -> bool:
    """Whether the target can be written to, or, if it is `ours`, made writable."""
    if os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        return True
    return ours and not os.fstatvfs(fd).f_flag & os.ST_RDONLY
