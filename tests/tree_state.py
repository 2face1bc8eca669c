"""Everything about a directory tree that a backup must bring back, read and compared; and the removal of any tree.

All walking is by directory descriptors, one at a time, so that neither the length of a path nor the depth of a tree
matters.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HASH_BLOCK_BYTES = 64 << 10
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class Found(NamedTuple):
    """A step of `walk`: `name` in the directory open as `fd` (until the next step); `path` is below the walk's root."""

    fd: int
    name: bytes
    path: bytes
    status: os.stat_result

    @property
    def short_path(self) -> bytes:
        """A path for calls that take no descriptor, short however deep the entry lies."""
        return b"/proc/self/fd/%d/%s" % (self.fd, self.name)


def walk(root: Path, *, unlock: bool = False) -> Iterator[Found]:
    """Visit `root` (whose path is b"") and all below it, what is in a directory before the directory itself.

    `unlock` makes each directory accessible to its owner first, and leaves it so.
    """
    fd = os.open(root.absolute().parent, _DIRECTORY)
    pending = [[os.fsencode(root.name)]]
    trail: list[tuple[bytes, bytes, os.stat_result]] = []
    try:
        while pending:
            if pending[-1]:
                name = pending[-1].pop()
                path = name if len(trail) == 1 else b"%s/%s" % (trail[-1][1], name) if trail else b""
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):
                    yield Found(fd, name, path, status)
                    continue
                if unlock:
                    os.chmod(name, 0o700, dir_fd=fd)
                fd = _move(fd, name)
                trail.append((name, path, status))
                pending.append(sorted(map(os.fsencode, os.listdir(fd)), reverse=True))
            else:
                pending.pop()
                if trail:
                    fd = _move(fd, b"..")
                    yield Found(fd, *trail.pop())
    finally:
        os.close(fd)


def _move(fd: int, name: bytes) -> int:
    """Open a directory in the place of the one that is left."""
    other = os.open(name, _DIRECTORY, dir_fd=fd)
    os.close(fd)
    return other


def remove_tree(root: Path) -> None:
    """Remove a tree whatever its depth, its names and the modes of its directories; one that is absent is no error."""
    if not os.path.lexists(root):
        return
    for found in walk(root, unlock=True):
        if stat.S_ISDIR(found.status.st_mode):
            os.rmdir(found.name, dir_fd=found.fd)
        else:
            os.unlink(found.name, dir_fd=found.fd)


@dataclass(frozen=True)
class Node:
    """What is to be restored of one entry.

    `size` is that of files and link targets; `links` holds all paths of a file with several in this tree, else nothing.
    `content` is a hash of the logical content, the same whether zeros are stored or holes; None where it is no file or
    can't be read. `extents`: where the file system keeps data, as (offset, length).
    """

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    xattrs: Mapping[str, bytes]
    target: bytes = b""
    rdev: int = 0
    links: frozenset[bytes] = frozenset()
    content: bytes | None = None
    extents: tuple[tuple[int, int], ...] = ()


def describe(root: Path) -> dict[bytes, Node]:
    """All entries of a tree by their paths below `root`; `root` itself is b""."""
    nodes: dict[bytes, Node] = {}
    groups: defaultdict[tuple[int, int], list[bytes]] = defaultdict(list)
    for found in walk(root):
        nodes[found.path] = _node(found)
        if found.status.st_nlink > 1 and not stat.S_ISDIR(found.status.st_mode):
            groups[found.status.st_dev, found.status.st_ino].append(found.path)
    for paths in groups.values():
        if len(paths) > 1:
            for path in paths:
                nodes[path] = replace(nodes[path], links=frozenset(paths))
    return dict(sorted(nodes.items(), key=lambda item: item[0].split(b"/")))


def _node(found: Found) -> Node:
    status = found.status
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    names = os.listxattr(found.short_path, follow_symlinks=False)
    node = Node(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind in ("file", "symlink") else 0,
        mtime_ns=status.st_mtime_ns,
        xattrs={name: os.getxattr(found.short_path, name, follow_symlinks=False) for name in names},
    )
    if kind == "symlink":
        return replace(node, target=os.readlink(found.name, dir_fd=found.fd))
    if kind.endswith("device"):
        return replace(node, rdev=status.st_rdev)
    if kind == "file":
        try:
            fd = os.open(found.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=found.fd)
        except PermissionError:
            return node
        try:
            extents = _extents(fd, status.st_size)
            return replace(node, extents=extents, content=_content(fd, extents))
        finally:
            os.close(fd)
    return node


def _extents(fd: int, size: int) -> tuple[tuple[int, int], ...]:
    extents, end = [], 0
    while end < size:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # nothing but a hole up to the end
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        extents.append((begin, end - begin))
    return tuple(extents)


def _content(fd: int, extents: tuple[tuple[int, int], ...]) -> bytes:
    """Hash of the blocks that are not zero, and their places: a gigabyte of hole costs nothing."""
    hasher, zeros, at = blake3(), bytes(_HASH_BLOCK_BYTES), 0
    for begin, length in extents:
        at = max(at, begin - begin % _HASH_BLOCK_BYTES)
        while at < begin + length:
            block = os.pread(fd, _HASH_BLOCK_BYTES, at)
            if block != zeros[: len(block)]:
                hasher.update(at.to_bytes(8, "little") + block.rstrip(b"\0"))
            at += _HASH_BLOCK_BYTES
    return hasher.digest()


def differences(
    expected: Mapping[bytes, Node], actual: Mapping[bytes, Node], *, ignore: Collection[str] = ()
) -> list[str]:
    """What two descriptions differ in, one line each; `ignore` names fields of Node that need not be the same."""
    lines = []
    names = [field.name for field in fields(Node) if field.name not in ignore]
    for path in sorted(expected.keys() | actual.keys(), key=lambda path: path.split(b"/")):
        if path not in actual:
            lines.append(f"{_shown(path)}: the {expected[path].kind} is missing")
        elif path not in expected:
            lines.append(f"{_shown(path)}: a {actual[path].kind} that should not be there")
        else:
            for name in names:
                wanted, got = getattr(expected[path], name), getattr(actual[path], name)
                if wanted != got:
                    lines.append(f"{_shown(path)}: {name} is {_readable(name, got)}, not {_readable(name, wanted)}")
    return lines


def _shown(path: bytes) -> str:
    return repr(path) if len(path) < 200 else f"{path[:80]!r}…{path[-80:]!r}"


def _readable(name: str, value: Any) -> str:
    if name == "mode":
        return f"{value:04o}"
    if name == "content" and value is not None:
        return str(value.hex()[:16])
    if name == "links":
        return str(sorted(value) or "none")
    text = repr(value)
    return text if len(text) < 400 else f"{text[:400]}…"
