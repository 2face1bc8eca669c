"""Make catalog entries from what a file system says."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable
from functools import lru_cache

from coffret.engine import settings
from coffret.engine.records import Entry, Extra, encode

# Stores a payload as chunks and returns their packed refs.
Store = Callable[[bytes], bytes]


@lru_cache(maxsize=4096)
def user_name(uid: int) -> str:
    """Name of a user, or "" where there is none."""
    try:
        return _text(pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return ""


@lru_cache(maxsize=4096)
def group_name(gid: int) -> str:
    """Name of a group, or "" where there is none."""
    try:
        return _text(grp.getgrgid(gid).gr_name)
    except (KeyError, OverflowError):
        return ""


def _text(name: str) -> str:
    """A name as it can be stored: what is not UTF-8 in it is replaced."""
    return name.encode("utf-8", "replace").decode()


def make_extra(
    store: Store,
    *,
    target: bytes = b"",
    rdev: int = 0,
    nlink: int = 1,
    depth: int = 0,
    xattrs: list[tuple[bytes, bytes]] | None = None,
    extents: bytes = b"",
) -> Extra | None:
    """What an entry has beyond the usual, or None; what is too large for the page goes through `store`."""
    if not (target or rdev or depth or xattrs or extents) and nlink <= 1:
        return None
    extra = Extra(target, rdev, nlink, depth)
    if xattrs:
        if sum(len(name) + len(value) for name, value in xattrs) <= settings.INLINE_XATTR_BYTES:
            extra.xattrs = xattrs
        else:
            extra.xattrs_ref = store(encode(xattrs))
    if len(extents) <= settings.INLINE_EXTENTS * 16:
        extra.extents = extents
    else:
        extra.extents_ref = store(extents)
    return extra


def make_entry(
    name: bytes, fields: tuple[int, ...], read_ns: int, content: bytes = b"", extra: Extra | None = None
) -> Entry:
    """An entry from `chunkworker.STAT_FIELDS`."""
    mode, uid, gid, size, mtime_ns, ctime_ns, inode, device, _ = fields
    return Entry(
        name,
        mode,
        uid,
        gid,
        user_name(uid),
        group_name(gid),
        size,
        mtime_ns,
        ctime_ns,
        inode,
        device,
        max(mtime_ns, ctime_ns) > read_ns - settings.RACY_NS,
        content,
        extra,
    )
