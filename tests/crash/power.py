"""A disk that loses power: what was flushed is there, and of the rest whatever the disk likes.

Of a file, what it held when it was flushed last; if it never was, nothing, a part, zeros, or all. Of a name in a
folder, what it stood for when the folder was flushed last, or anything since. So of two names in one folder the later
may be there and not the earlier, a file that was moved may have both names or neither, what was removed may be back.
No file system does worse, and most do much better.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Event = tuple[Any, ...]
    # Of a name that has stood for so many things since its folder was flushed, which one it has: 0 is the first.
    Pick = Callable[[str, int], int]


@dataclass(eq=False)
class File:
    """A file on the disk: what it held when it was flushed, None before, and what it will hold then."""

    flushed: bytes | None = None
    meant: bytes = b""
    mtime_s: float | None = None


class Folder:
    """A folder on the disk."""


FOLDER = Folder()
Node = File | Folder | None


@dataclass
class Disk:
    """The names there are, each with all that it has stood for since it was last certain."""

    names: dict[str, list[Node]] = field(default_factory=dict)
    inodes: dict[int, File] = field(default_factory=dict)

    @classmethod
    def holding(cls, *roots: Path) -> Disk:
        """A disk on which what lies at these places is certain."""
        disk = cls()
        for path in (path for root in roots if root.exists() for path in (root, *root.rglob("*"))):
            node: Node = FOLDER
            if not path.is_dir():
                data = path.read_bytes()
                node = File(data, data, path.stat().st_mtime)
            disk.names[str(path)] = [node]
        return disk

    def happen(self, events: Sequence[Event]) -> Iterator[None]:
        """Let events happen, one at a time."""
        meant = list(_meant(events))
        for (what, *details), content in zip(events, meant, strict=True):
            getattr(self, f"_{what}")(*details, **({"meant": content} if what == "make" else {}))
            yield

    def _make(self, path: str, inode: int, meant: bytes) -> None:
        self.inodes[inode] = File(meant=meant)
        self._set(path, self.inodes[inode])

    def _data(self, inode: int, content: str) -> None:
        if inode in self.inodes:
            self.inodes[inode].flushed = base64.b64decode(content)

    def _folder(self, path: str) -> None:
        self._set(path, FOLDER)

    def _link(self, source: str, target: str) -> None:
        self._set(target, self.names[source][-1])

    def _move(self, source: str, target: str) -> None:
        self._link(source, target)
        self._set(source, None)

    def _remove(self, path: str) -> None:
        self._set(path, None)

    def _names(self, folder: str) -> None:
        for path, nodes in self.names.items():
            if os.path.dirname(path) == folder:
                del nodes[:-1]

    def _set(self, path: str, node: Node) -> None:
        self.names.setdefault(path, [None]).append(node)

    def lose_power(self, pick: Pick, chance: random.Random | None) -> Tree:
        """What may be left. Without `chance` nothing of a file that was not flushed; else something, or all."""
        tree: Tree = {}
        for path in sorted(self.names):
            nodes = self.names[path]
            node = nodes[pick(path, len(nodes))]
            above = os.path.dirname(path)
            if node is None or (above in self.names and above not in tree):
                continue
            if isinstance(node, Folder):
                tree[path] = None, None
            elif node.flushed is not None:
                tree[path] = node.flushed, node.mtime_s
            else:
                tree[path] = _some_of(node.meant, chance), None
        return tree


# By path: what a file holds, None for a folder; and its time, None for now.
Tree = dict[str, tuple[bytes | None, float | None]]


def read_events(log: Path) -> list[Event]:
    """What was recorded."""
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def lay_out(tree: Tree) -> None:
    """Make the files and folders of a tree."""
    for path, (data, mtime_s) in tree.items():
        if data is None:
            Path(path).mkdir(0o700, parents=True)
        else:
            Path(path).write_bytes(data)
            if mtime_s is not None:
                os.utime(path, (mtime_s, mtime_s))


def extremes(repository: str) -> Iterable[Pick]:
    """Nothing of what is not certain, or all; and all here, and nothing there."""
    yield lambda path, count: 0
    yield lambda path, count: count - 1
    yield lambda path, count: count - 1 if path.startswith(repository) else 0
    yield lambda path, count: 0 if path.startswith(repository) else count - 1


def _meant(events: Sequence[Event]) -> Iterator[bytes]:
    """For each file that is made: what it holds when it is flushed first."""
    for at, event in enumerate(events):
        content = b""
        if event[0] == "make":
            for what, inode, *rest in events[at + 1 :]:
                if what == "data" and inode == event[2]:
                    content = base64.b64decode(rest[0])
                    break
        yield content


def _some_of(data: bytes, chance: random.Random | None) -> bytes:
    if chance is None:
        return b""
    return chance.choice([b"", data, data[: chance.randrange(len(data) + 1)], bytes(len(data))])
