"""Small random trees for hypothesis: as values that shrink and print, and made on disk."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from tests.hostile_tree import NAMES, TIMES_NS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class File:
    """A file of `size` bytes: data at (offset, length), holes elsewhere. The same seed and length is the same data."""

    size: int = 0
    data: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    mode: int = 0o644
    mtime_ns: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Symlink:
    """A symbolic link."""

    target: bytes
    mtime_ns: int = 0


@dataclass(frozen=True)
class Special:
    """A FIFO or a socket: `kind` is its file type."""

    kind: int
    mode: int = 0o600
    mtime_ns: int = 0


@dataclass(frozen=True)
class Link:
    """Another name of one of the entries made before it that is no directory; an empty file if there is none."""

    which: int


@dataclass(frozen=True)
class Directory:
    """A directory and what is in it."""

    children: dict[bytes, Spec]
    mode: int = 0o755
    mtime_ns: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)


Spec = File | Symlink | Special | Link | Directory


def trees(*, root_user: bool = False, max_leaves: int = 12) -> st.SearchStrategy[Directory]:
    """Directories of any kinds that a user may make and read; with `root_user` also what only root can read."""
    times = st.sampled_from(sorted(TIMES_NS.values())) | st.integers(-(2 * 10**18), 13 * 10**18)
    xattrs = st.dictionaries(st.sampled_from(["user.a", "user.bc", "user.\u00e4"]), st.binary(max_size=40), max_size=2)
    file_modes = [0o644, 0o600, 0o755, 0o444, 0o4755, 0o2755, 0o1644, *([0, 0o200] if root_user else [])]
    directory_modes = [0o755, 0o700, 0o1777, 0o2775, 0o555, *([0, 0o300] if root_user else [])]
    leaves = st.one_of(
        st.builds(_file, _layouts(), st.integers(0, 3), st.sampled_from(file_modes), times, xattrs),
        st.builds(Symlink, st.binary(min_size=1, max_size=30).map(lambda target: target.replace(b"\0", b"/")), times),
        st.builds(Special, st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK]), st.sampled_from([0o600, 0o666]), times),
        st.builds(Link, st.integers(0, 20)),
    )

    def directories(children: st.SearchStrategy[Spec]) -> st.SearchStrategy[Directory]:
        entries = st.dictionaries(_names, children, max_size=6)
        return st.builds(Directory, entries, st.sampled_from(directory_modes), times, xattrs)

    return directories(st.recursive(leaves, directories, max_leaves=max_leaves))


_names = st.one_of(
    st.sampled_from([b"a", b"b", b"a.b", b"a-b", b"ab", b"a\x01", b"A"]),
    st.sampled_from(NAMES),
    st.binary(min_size=1, max_size=6).filter(lambda name: not set(name) & {0, 0x2F} and name not in (b".", b"..")),
)


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The size of a file and where its data lies: all of it, as a rule."""
    size = draw(st.sampled_from([0, 1, 100, 4096, 70_000, 600_000, 1_500_000]) | st.integers(0, 10_000))
    if not size or draw(st.integers(0, 3)):
        return size, ((0, size),)
    begins = draw(st.lists(st.integers(0, size - 1), max_size=3))
    return size, tuple((begin, min(draw(st.integers(1, 100_000)), size - begin)) for begin in begins)


def _file(
    layout: tuple[int, tuple[tuple[int, int], ...]], seed: int, mode: int, mtime_ns: int, xattrs: dict[str, bytes]
) -> File:
    return File(*layout, seed, mode, mtime_ns, xattrs)


def build(spec: Directory, path: Path) -> None:
    """Make a tree at `path`, which must not exist yet."""
    _build(spec, os.fsencode(path), [])


def _build(spec: Spec, path: bytes, made: list[bytes]) -> None:
    if isinstance(spec, Link):
        if made:
            os.link(made[spec.which % len(made)], path, follow_symlinks=False)
            return
        spec = File()
    match spec:
        case Directory():
            os.mkdir(path, 0o700)
            for name, child in sorted(spec.children.items()):
                _build(child, os.path.join(path, name), made)
        case File():
            _build_file(spec, path)
        case Symlink():
            os.symlink(spec.target, path)
        case Special():
            os.mknod(path, spec.kind | 0o600)
    if isinstance(spec, File | Directory):
        for attribute, value in spec.xattrs.items():
            os.setxattr(path, attribute, value)
    if not isinstance(spec, Symlink):
        os.chmod(path, spec.mode)
    os.utime(path, ns=(spec.mtime_ns, spec.mtime_ns), follow_symlinks=False)
    if not isinstance(spec, Directory):
        made.append(path)


def _build_file(spec: File, path: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, spec.size)
        for offset, length in spec.data:
            os.pwrite(fd, Random(spec.seed).randbytes(length), offset)
    finally:
        os.close(fd)


def entries(spec: Directory, path: bytes = b"") -> Iterator[tuple[bytes, Spec]]:
    """All entries of a tree, with their paths; its top is b""."""
    yield path, spec
    for name, child in spec.children.items():
        below = path + b"/" + name if path else name
        if isinstance(child, Directory):
            yield from entries(child, below)
        else:
            yield below, child
