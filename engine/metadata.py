"""Set what a restored entry has beside its content: owner, attributes, mode and times.

Whatever can't be set is told, and the rest is set all the same: a file system without owners or modes, or a process
without a capability, is no reason to throw verified content away. What an entry is then left with allows nobody more
than what it should have.
"""

from __future__ import annotations

import os
import stat
from typing import Any

ACL_ACCESS, ACL_DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
# What is left of a mode: without the owner that was asked for; where none is asked for and it is somebody else's.
_PRIVATE, _UNOWNED = 0o1700, 0o1777
_GROUP = 0o070

# (mode, uid, gid, size, mtime in ns, xattrs)
Meta = tuple[Any, ...]


def apply(where: int | bytes, meta: Meta, *, owner: bool, strip: bool = False) -> list[str]:
    """Set the metadata of what `where` is: a descriptor, or a path that is followed; return what could not be set.

    `strip`: remove the attributes that it has and the entry has not, as inherited ACLs are.

    In this order: changing the owner clears capabilities and set-id bits, an ACL may clear the latter too, and who is
    not root can't give attributes to what is read-only. The mode's group bits are the mask of the ACL: where that is
    not set, the group gets none.
    """
    mode, uid, gid, _, mtime_ns, xattrs = meta
    notes: list[str] = []
    allowed = allowed_mode(meta, owner=owner)
    if owner:
        try:
            os.chown(where, uid, gid)
        except OSError as error:
            if not _owned_by(where, uid, gid):
                notes.append(f"owner not set: {error.strerror}")
                allowed &= _PRIVATE
    if strip:
        notes += _strip(where, xattrs)
    for name, value in xattrs:
        try:
            os.setxattr(where, name, value)
        except OSError as error:
            if name == ACL_ACCESS.encode():
                allowed &= ~_GROUP
            if owner or not name.startswith((b"security.", b"trusted.")):
                notes.append(f"attribute {os.fsdecode(name)} not set: {error.strerror}")
    if not stat.S_ISLNK(mode):
        try:
            os.chmod(where, allowed)
        except OSError as error:
            notes.append(f"mode not set: {error.strerror}")
    try:
        os.utime(where, ns=(mtime_ns, mtime_ns))
    except OSError as error:
        notes.append(f"time not set: {error.strerror}")
    return notes


def refresh(where: bytes, status: os.stat_result, meta: Meta, *, owner: bool) -> list[str]:
    """The same for what is there already, if anything differs; what is as it should be is not touched."""
    mode, uid, gid, _, _, xattrs = meta
    differs = (owner and (status.st_uid, status.st_gid) != (uid, gid)) or (
        not stat.S_ISLNK(mode) and stat.S_IMODE(status.st_mode) != allowed_mode(meta, owner=owner)
    )
    if not differs and _attributes(where) == dict(xattrs):
        return []
    return apply(where, meta, owner=owner, strip=True)


def allowed_mode(meta: Meta, *, owner: bool) -> int:
    """The permissions to set. Where the owner is not restored, no set-id bit of somebody else's may come back."""
    mode, uid, gid = meta[:3]
    allowed = stat.S_IMODE(mode)
    return allowed if owner or (uid, gid) == (os.geteuid(), os.getegid()) else allowed & _UNOWNED


def without_xattrs(meta: Meta) -> Meta:
    """Metadata of an entry whose attributes are lost: as its ACL may be one of them, the group gets nothing."""
    mode, uid, gid, size_bytes, mtime_ns, _ = meta
    return mode & ~_GROUP, uid, gid, size_bytes, mtime_ns, []


def inherits(fd: int) -> bool:
    """Whether what is made in a directory gets an ACL from it."""
    return ACL_DEFAULT in _names(fd)


def drop_acls(fd: int) -> None:
    """Take away what a directory that was just made has got from the one it is in."""
    for name in (ACL_DEFAULT, ACL_ACCESS):
        try:
            os.removexattr(fd, name)
        except OSError:
            continue  # it has none, or `apply` will say


def _strip(where: int | bytes, xattrs: list[tuple[bytes, bytes]]) -> list[str]:
    kept = {name for name, _ in xattrs}
    notes = []
    for name in _names(where):
        if os.fsencode(name) in kept or not _ours(name):
            continue
        try:
            os.removexattr(where, name)
        except OSError as error:
            notes.append(f"attribute {name} not removed: {error.strerror}")
    return notes


def _attributes(where: bytes) -> dict[bytes, bytes]:
    found = {}
    for name in _names(where):
        if _ours(name):
            try:
                found[os.fsencode(name)] = os.getxattr(where, name)
            except OSError:
                continue
    return found


def _names(where: int | bytes) -> list[str]:
    try:
        return os.listxattr(where)
    except OSError:  # the file system has none
        return []


def _ours(name: str) -> bool:
    """Whether an attribute belongs to the file; labels and signatures are the system's affair."""
    return not name.startswith("security.") or name == "security.capability"


def _owned_by(where: int | bytes, uid: int, gid: int) -> bool:
    status = os.stat(where)
    return (status.st_uid, status.st_gid) == (uid, gid)
