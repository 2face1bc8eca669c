"""The catalog's order, its cuts, and the trees built from them. See `catalog_reader` for the way back.

A catalog lists a snapshot's entries by (components of the directory's path, name): the listing of each directory is
contiguous, the root's comes first, and directories follow depth first. It is cut into *pages* where a keyed hash of
(directory, name) says so, so that an edit changes the page it falls into and no other; `PageRef`s are gathered into
nodes, nodes into nodes, by further bits of the same hash. The chunk list of a large file is a tree of the same kind,
cut by its chunk ids. Cuts depend on names and on what a scan sees, never on content: pages are cut before files are
read.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from blake3 import blake3
from xxhash import xxh3_64_intdigest

from coffret.engine.records import REF_BYTES, PageRef, encode, pack_ref
from coffret.engine.settings import (
    INLINE_REFS,
    LIST_AVG_REFS,
    LIST_MAX_REFS,
    NODE_AVG_ENTRIES,
    NODE_MAX_ENTRIES,
    PAGE_AVG_ENTRIES,
    PAGE_MAX_WEIGHT,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coffret.engine.records import Section

Key = tuple[bytes, bytes]

# A tree is never deeper, whatever its names; hostile ones that claim to be are refused.
MAX_DEPTH = 16
_PAGE_MASK, _PAGE_BITS = PAGE_AVG_ENTRIES - 1, (PAGE_AVG_ENTRIES - 1).bit_length()
_NODE_MASK, _NODE_BITS = NODE_AVG_ENTRIES - 1, (NODE_AVG_ENTRIES - 1).bit_length()
# As many levels as a hash of 64 bits can tell apart.
_MAX_LEVEL = 1 + (64 - _PAGE_BITS) // _NODE_BITS
_SECTION_WEIGHT = 16
# Sums, heads and the ref of a PageRef.
_PAGE_REF_WEIGHT = 2 * REF_BYTES
# Not before a list would be too long to be kept inline, so that it never consists of few refs.
_LIST_MIN_BYTES, _LIST_MAX_BYTES = INLINE_REFS * REF_BYTES, LIST_MAX_REFS * REF_BYTES


def directory_key(directory: bytes) -> bytes:
    """What directories sort by: their path with NUL, which no name holds, for "/" ("a/b" comes before "a.b")."""
    return directory.replace(b"/", b"\0")


def key_of(directory: bytes, name: bytes) -> Key:
    """What entries sort by: the same order as (tuple of the directory's components, name), cheaper to compare."""
    return directory.replace(b"/", b"\0"), name


def split_path(path: bytes) -> Key:
    """(directory, name) of a path without leading slash; the root's are empty."""
    directory, _, name = path.rpartition(b"/")
    return directory, name


def join_path(directory: bytes, name: bytes) -> bytes:
    """The path, without leading slash, of an entry."""
    return directory + b"/" + name if directory else name


def section_weight(directory: bytes) -> int:
    """What beginning a section (a directory in a page) adds to the page's weight: paths may be long."""
    return _SECTION_WEIGHT + len(directory)


def describe(sections: Sequence[Section], ref: bytes) -> PageRef:
    """The `PageRef` of a page that is stored as `ref`: its first key and its sums."""
    entries = files = size_bytes = 0
    for section in sections:
        sizes = [entry.size for entry in section.entries if stat.S_ISREG(entry.mode)]
        entries += len(section.entries)
        files += len(sizes)
        size_bytes += sum(sizes)
    first = sections[0]
    return PageRef(first.directory, first.entries[0].name, ref, entries, files, size_bytes)


class Cutter:
    """Says where pages begin, by a hash keyed with the chunker key: xxh3 of the name, seeded by the directory's.

    An attacker gains nothing from a cut; without the key, sizes of pages tell nothing of names.
    """

    __slots__ = ("_seed",)

    def __init__(self, chunker_key: bytes) -> None:
        self._seed = int.from_bytes(blake3(b"coffret catalog cuts", key=chunker_key).digest(8), "little")

    def seed(self, directory: bytes) -> int:
        """The seed for the names of one directory."""
        return int(xxh3_64_intdigest(directory, self._seed))

    def level(self, seed: int, name: bytes) -> int:
        """0, or 1 if a page begins at this name, or 1 + the number of levels of nodes that begin with that page.

        A page that has grown to its limit begins anew at level 1.
        """
        bits = xxh3_64_intdigest(name, seed)
        if bits & _PAGE_MASK:
            return 0
        bits >>= _PAGE_BITS
        level = 1
        while level < _MAX_LEVEL and not bits & _NODE_MASK:
            bits >>= _NODE_BITS
            level += 1
        return level


class _Node:
    """A node of the page index while it is gathered."""

    __slots__ = ("refs", "weight")

    def __init__(self) -> None:
        self.refs: list[PageRef] = []
        self.weight = 0


class TreeBuilder:
    """Joins page refs, in order, into the page index; holds one open node a level.

    `store` takes a node's payload and returns its packed refs; it is called before the node above is complete.
    """

    def __init__(self, store: Callable[[bytes], bytes]) -> None:
        self._store = store
        self._levels = [_Node()]
        self._last: Key | None = None

    def add(self, page: PageRef, level: int) -> None:
        """Append a page that begins with a cut of this level (the first page's is of no effect).

        :raises ValueError: if it does not come after the page before it: nobody could read such a catalog
        """
        key = key_of(page.directory, page.name)
        if self._last is not None and key <= self._last:
            raise ValueError(f"catalog pages out of order: {self._last!r}, {key!r}")
        self._last = key
        for height in range(level - 1):
            if height < len(self._levels) and self._levels[height].refs:
                self._close(height)
        self._append(0, page)

    def finish(self) -> tuple[bytes, int]:
        """Return (packed refs of the root, depth): depth 0 is a single page, n that the root is n levels above them.

        :raises ValueError: if there is no page; a catalog has at least the root directory's entry
        """
        if not self._levels[0].refs:
            raise ValueError("a catalog without a page")
        height = 0
        while height + 1 < len(self._levels) or len(self._levels[height].refs) > 1:
            if self._levels[height].refs:
                self._close(height)
            height += 1
        return self._levels[height].refs[0].ref, height

    def _append(self, height: int, page: PageRef) -> None:
        if height == len(self._levels):
            self._levels.append(_Node())
        node = self._levels[height]
        weight = _PAGE_REF_WEIGHT + len(page.directory) + len(page.name) + len(page.ref)
        # Two refs fit always, or a tree of very long paths would have no end.
        full = len(node.refs) >= NODE_MAX_ENTRIES or node.weight + weight > PAGE_MAX_WEIGHT
        if full and len(node.refs) > 1:
            self._close(height)
            node = self._levels[height]
        node.refs.append(page)
        node.weight += weight

    def _close(self, height: int) -> None:
        refs = self._levels[height].refs
        self._levels[height] = _Node()
        first = refs[0]
        entries = files = size_bytes = 0
        for page in refs:
            entries += page.entries
            files += page.files
            size_bytes += page.size_bytes
        ref = self._store(encode(refs))
        self._append(height + 1, PageRef(first.directory, first.name, ref, entries, files, size_bytes))


class RefList:
    """The chunk list of one file, as a stream: up to `INLINE_REFS` in the entry, else lists of refs in chunks.

    A list ends behind an id whose low bits are zero, but not before it has `INLINE_REFS`, since a file may be one chunk
    repeated. `store` takes a list's payload and returns its packed ref; lists are cut by their own ids in turn. Holds
    one open list a level, whatever the file's size.
    """

    def __init__(self, store: Callable[[bytes], bytes]) -> None:
        self._store = store
        self._levels = [bytearray()]

    def add(self, chunk_id: bytes, length: int) -> None:
        """Append a chunk of `length` bytes."""
        self._append(0, pack_ref(chunk_id, length))

    def finish(self) -> tuple[bytes, int]:
        """Return (packed refs for `Entry.content`, how many levels of lists lie below them)."""
        height = 0
        while height + 1 < len(self._levels) or len(self._levels[height]) > _LIST_MIN_BYTES:
            self._close(height)
            height += 1
        return bytes(self._levels[height]), height

    def _append(self, height: int, ref: bytes) -> None:
        if height == len(self._levels):
            self._levels.append(bytearray())
        refs = self._levels[height]
        # Decided when the next ref comes, so that what fits inline is never stored as a list too.
        if len(refs) >= _LIST_MAX_BYTES or (len(refs) >= _LIST_MIN_BYTES and _ends_list(refs)):
            self._close(height)
        self._levels[height] += ref

    def _close(self, height: int) -> None:
        payload = bytes(self._levels[height])
        self._levels[height].clear()
        self._append(height + 1, self._store(payload))


def _ends_list(refs: bytearray) -> bool:
    """Whether the last id says that a list ends behind it."""
    at = len(refs) - REF_BYTES
    return not int.from_bytes(refs[at : at + 4], "little") & (LIST_AVG_REFS - 1)
