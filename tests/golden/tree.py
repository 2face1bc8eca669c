"""What the golden repositories hold, as data: the trees of their snapshots, and how long each part is."""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, field, replace

from blake3 import blake3

ROOT = b"home/golden"
_TIME_NS = 1_700_000_000_123_456_789
_FILE, _DIRECTORY = stat.S_IFREG | 0o640, stat.S_IFDIR | 0o755
# Enough empty files that the catalog has several pages, and a node above them.
MANY = 350


@dataclass(frozen=True)
class Node:
    """One entry. `content` is what is stored of a file: of a sparse one its `extents` (offset, length)."""

    path: bytes
    mode: int = _FILE
    content: bytes = b""
    size: int = 0
    extents: tuple[tuple[int, int], ...] = ()
    target: bytes = b""
    rdev: int = 0
    nlink: int = 1
    inode: int = 0
    mtime_ns: int = _TIME_NS
    xattrs: tuple[tuple[bytes, bytes], ...] = field(default=())

    @property
    def packed_extents(self) -> bytes:
        return b"".join(struct.pack("<QQ", *extent) for extent in self.extents)


def file(path: bytes, content: bytes, **more: object) -> Node:
    return replace(Node(path, content=content, size=len(content)), **more)  # type: ignore[arg-type]


def lines(first: int, last: int) -> bytes:
    """Text that compresses well and is cut into many chunks."""
    return b"".join(b"This is line %06d of the golden file.\n" % number for number in range(first, last))


def noise(seed: bytes, length: int) -> bytes:
    return blake3(seed).digest(length=length)


# What an interrupted backup had stored already, and what only a removed snapshot held.
ADOPTED, ABANDONED = noise(b"adopted", 300), noise(b"abandoned", 300)

FIRST = [
    Node(b"", _DIRECTORY),
    Node(b"home", _DIRECTORY),
    Node(ROOT, stat.S_IFDIR | 0o1777, xattrs=((b"user.empty", b""), (b"user.golden", b"\0\xff"))),
    file(ROOT + b"/empty", b""),
    file(ROOT + b"/hello.txt", b"Hello, world!\n", mode=stat.S_IFREG | 0o4755),
    file(ROOT + b"/large xattr", b"x", xattrs=((b"user.large", noise(b"xattr", 600)),)),
    file(ROOT + b"/lines.txt", lines(0, 120)),
    file(ROOT + b"/noise", noise(b"noise", 700)),
    file(ROOT + b"/one", b"the same file\n", nlink=2, inode=1000),
    file(ROOT + b"/two", b"the same file\n", nlink=2, inode=1000),
    Node(ROOT + b"/hole", size=1 << 20, extents=((0, 0),)),
    Node(ROOT + b"/sparse", content=b"a" * 4096 + b"b" * 100, size=300_000, extents=((65536, 4096), (262144, 100))),
    Node(
        ROOT + b"/very sparse",
        content=b"".join(b"%04d" % number * 1024 for number in range(34)),
        size=35 * 8192,
        extents=tuple((8192 * number, 4096) for number in range(34)),
    ),
    Node(ROOT + b"/pipe", stat.S_IFIFO | 0o600),
    Node(ROOT + b"/socket", stat.S_IFSOCK | 0o755),
    Node(ROOT + b"/null", stat.S_IFCHR | 0o666, rdev=0x103),
    Node(ROOT + b"/link", stat.S_IFLNK | 0o777, target=b"hello.txt"),
    Node(ROOT + b"/nowhere", stat.S_IFLNK | 0o777, target=b"../\xff/absent"),
    file(ROOT + b"/caf\xe9\n", b"a name that is not UTF-8\n", mtime_ns=-1_000_000_001),
    file(ROOT + b"/" + b"n" * 255, b"a name of 255 bytes\n"),
    Node(ROOT + b"/a", _DIRECTORY),
    Node(ROOT + b"/a/b", _DIRECTORY),
    file(ROOT + b"/a/b/deep", b"deep\n"),
    Node(ROOT + b"/a.b", _DIRECTORY),
    file(ROOT + b"/a.b/sorts after a/b", b"\n"),
    Node(ROOT + b"/many", _DIRECTORY),
    *(Node(ROOT + b"/many/%03d" % number) for number in range(MANY)),
]
_CHANGED = {
    b"hello.txt": file(ROOT + b"/hello.txt", b"Hello again!\n", mode=stat.S_IFREG | 0o755, mtime_ns=_TIME_NS + 1),
    b"lines.txt": file(ROOT + b"/lines.txt", lines(0, 60) + b"inserted\n" + lines(60, 120), mtime_ns=_TIME_NS + 2),
}
SECOND = [
    *(_CHANGED.get(node.path.removeprefix(ROOT + b"/"), node) for node in FIRST if node.path != ROOT + b"/noise"),
    file(ROOT + b"/adopted", ADOPTED),
]
REMOVED = [*FIRST[:3], file(ROOT + b"/abandoned", ABANDONED)]
