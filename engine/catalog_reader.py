"""Read a snapshot's catalog: find a path, list a directory, walk a subtree, follow a backup through its parent.

Everything is checked as it is read (see `catalog_walk`): what these return can be trusted not to leave the tree it
belongs to, nor to go on for ever. The loader sees the ref of every page, node, list and attribute that is read, so it
can also tell which chunks a catalog itself consists of.
"""

from __future__ import annotations

import stat
import struct
from bisect import bisect_left
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from coffret.engine.catalog import directory_key, split_path
from coffret.engine.catalog_walk import LoadedPage, PageWalk, payload_length
from coffret.engine.errors import Damaged
from coffret.engine.records import REF_BYTES, Extra, decode_xattrs, refs_length

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from coffret.engine.catalog import Key
    from coffret.engine.records import Entry, PageRef, Section

    Load = Callable[[Sequence[bytes]], Awaitable[list[bytes]]]
    BlockingLoad = Callable[[Sequence[bytes]], list[bytes]]

_LISTS_AHEAD = 16
# Sixteen million extents; what is far smaller is kept in the entry.
_MAX_ATTRIBUTE_BYTES = 256 << 20
_EXTENT = struct.Struct("<QQ")
# A file that is one hole has one extent of no length: no extents at all mean a file without holes.
_NO_DATA = bytes(_EXTENT.size)
_NO_EXTRA = Extra()
_name = attrgetter("name")


class Attributes(NamedTuple):
    """What an entry may keep in chunks of its own: xattrs by name, and data extents as packed (offset, length)."""

    xattrs: list[tuple[bytes, bytes]]
    extents: bytes


class Catalog:
    """The catalog of one snapshot. `load` turns packed refs into verified payloads, several at a time.

    Paths have no leading slash; the root's is b"". Memory is bounded by some dozens of pages. Every method raises
    Damaged if what it reads is not well-formed.
    """

    def __init__(self, root: bytes, depth: int, load: Load) -> None:
        self._root, self._depth, self._load = root, depth, load

    async def pages(
        self, start: Key | None = None, stop: Key | None = None, *, reverse: bool = False
    ) -> AsyncIterator[tuple[PageRef, list[Section]]]:
        """Iterate over the pages that hold keys (`catalog.key_of`) in [start, stop), as they are stored."""
        walk = PageWalk(self._root, self._depth, start or (b"", b""), stop, reverse=reverse)
        while True:
            while refs := walk.wanted():
                walk.feed(await self._load(refs))
            page = walk.take()
            if page is None:
                return
            yield page.ref, page.sections

    async def find(self, path: bytes) -> Entry | None:
        """The entry of a path, in as many requests as the catalog is deep."""
        if path.startswith(b"/"):
            return None
        directory, name = split_path(path)
        key = directory_key(directory)
        async for section in self._sections((key, name), (key, name + b"\0")):
            at = bisect_left(section.entries, name, key=_name)
            if at < len(section.entries) and section.entries[at].name == name:
                return section.entries[at]
        return None

    async def listing(self, path: bytes) -> AsyncIterator[list[Entry]]:
        """Iterate over the entries of a directory by name, a page's worth each; none if it is no directory."""
        key = directory_key(path)
        async for section in self._sections((key, b""), (key + b"\0", b"")):
            if entries := _named(section):
                yield entries

    async def walk(self, path: bytes = b"", *, reverse: bool = False) -> AsyncIterator[tuple[bytes, list[Entry]]]:
        """Iterate over (directory, entries): first a path's own entry alone, then what lies below, a page's worth each.

        A directory's listing may come in several parts. Reversed, everything comes backwards, the entries of each
        part too. Nothing comes if there is no such path.
        """
        own = await self.find(path)
        if own is None:
            if not path:
                raise Damaged("a catalog has no entry for the root")
            return
        if not reverse:
            yield split_path(path)[0], [own]
        if stat.S_ISDIR(own.mode):
            key = directory_key(path)
            async for section in self._sections((key, b""), (key + b"\1", b"") if key else None, reverse=reverse):
                if entries := _named(section):
                    yield section.directory, entries[::-1] if reverse else entries
        if reverse:
            yield split_path(path)[0], [own]

    async def file_refs(self, entry: Entry) -> AsyncIterator[bytes]:
        """Iterate over a regular file's chunk list, in pieces of packed refs.

        :raises Damaged: also if the chunks are more, or (of a file without holes) fewer bytes than the file has
        """
        extra = entry.extra or _NO_EXTRA
        total = 0
        async for piece in self._lists(entry.content, extra.depth):
            length = refs_length(piece)
            total += length
            # Of a list that repeats itself only the file's size says where it ends.
            if total > entry.size or not length:
                raise Damaged(f"the chunks of {entry.name!r} are not those of a file of its size")
            yield piece
        if total != entry.size and not (extra.extents or extra.extents_ref):
            raise Damaged(f"the chunks of {entry.name!r} are fewer than a file of its size has")

    async def attributes(self, entry: Entry) -> Attributes:
        """An entry's xattrs and extents, wherever they are kept.

        :raises Damaged: also if extents overlap or lie outside the file, or an xattr has an impossible name
        """
        extra = entry.extra
        if extra is None:
            return Attributes([], b"")
        refs = [ref for ref in (extra.xattrs_ref, extra.extents_ref) if ref]
        lengths = [payload_length(ref, _MAX_ATTRIBUTE_BYTES) for ref in refs]
        payloads = await self._load(refs) if refs else []
        if lengths != [len(payload) for payload in payloads]:
            raise Damaged(f"attributes of {entry.name!r} have another length than their ref says")
        found = iter(payloads)
        xattrs = _decode_xattrs(next(found)) if extra.xattrs_ref else extra.xattrs
        extents = next(found) if extra.extents_ref else extra.extents
        if any(not name or b"\0" in name for name, _ in xattrs):
            raise Damaged(f"{entry.name!r} has an xattr of an impossible name")
        _check_extents(entry, extents)
        return Attributes(xattrs, extents)

    async def _sections(self, start: Key, stop: Key | None, *, reverse: bool = False) -> AsyncIterator[Section]:
        """Sections of the directories in the range; the first and last may hold entries outside it."""
        async for _, sections in self.pages(start, stop, reverse=reverse):
            for section in reversed(sections) if reverse else sections:
                key = directory_key(section.directory)
                if start[0] <= key and (stop is None or (key, section.entries[0].name) < stop):
                    yield section

    async def _lists(self, refs: bytes, depth: int) -> AsyncIterator[bytes]:
        if depth == 0:
            if refs:
                yield refs
            return
        step = _LISTS_AHEAD * REF_BYTES
        for begin in range(0, len(refs), step):
            batch = refs[begin : begin + step]
            asked = [batch[at : at + REF_BYTES] for at in range(0, len(batch), REF_BYTES)]
            lengths = [payload_length(ref) for ref in asked]
            for length, payload in zip(lengths, await self._load(asked), strict=True):
                if len(payload) != length or not payload or len(payload) % REF_BYTES:
                    raise Damaged("a chunk list is not whole")
                async for piece in self._lists(payload, depth - 1):
                    yield piece


def _named(section: Section) -> list[Entry]:
    """The entries but the root directory's own."""
    return section.entries if section.entries[0].name else section.entries[1:]


def _decode_xattrs(payload: bytes) -> list[tuple[bytes, bytes]]:
    try:
        return decode_xattrs(payload)
    except msgspec.MsgspecError as error:
        raise Damaged(f"stored xattrs do not decode: {error}") from None


def _check_extents(entry: Entry, extents: bytes) -> None:
    if extents == _NO_DATA:
        return
    if len(extents) % _EXTENT.size:
        raise Damaged(f"the extents of {entry.name!r} are cut short")
    end = 0
    for offset, length in _EXTENT.iter_unpack(extents):
        # One extent of no length stands for a file that is one hole.
        if offset < end or not (length or len(extents) == _EXTENT.size):
            raise Damaged(f"the extents of {entry.name!r} overlap")
        end = offset + length
    if end > entry.size:
        raise Damaged(f"the extents of {entry.name!r} reach beyond its end")


class Run(NamedTuple):
    """Neighbouring entries of one directory in a page of the parent's; the first is the page's `first`-th, from 0."""

    page: LoadedPage
    entries: list[Entry]
    first: int


class ParentCursor:
    """Follows a scan through its parent's catalog; `load` blocks, in the scan's thread. `recheck` sees each page first.

    Directories are sought in the catalog's order; pages between them are not read. Every method, and what it returns,
    raises Damaged if what is read is not well-formed.
    """

    def __init__(
        self, root: bytes, depth: int, load: BlockingLoad, *, recheck: Callable[[LoadedPage], None] | None = None
    ) -> None:
        self._walk = PageWalk(root, depth)
        self._load, self._recheck = load, recheck
        self._page: LoadedPage | None = None
        # Of the current page: the next section, and where it begins.
        self._section = self._first = 0
        self._sought, self._seeks = b"", 0

    def seek(self, directory: bytes) -> Iterator[Run]:
        """The parent's entries of a directory, read as they are asked for; what was sought before reads no further.

        The root directory's own entry is the first of its listing.

        :raises ValueError: if the directory comes before the one sought last
        """
        key = directory_key(directory)
        if key < self._sought:
            raise ValueError(f"{directory!r} is sought after {self._sought!r}")
        self._sought = key
        self._seeks += 1
        return self._runs(key, self._seeks)

    def _runs(self, key: bytes, seek: int) -> Iterator[Run]:
        while seek == self._seeks:
            page = self._page or self._turn(key)
            if page is None:
                return
            if self._section == len(page.sections):
                self._page = None
                continue
            section = page.sections[self._section]
            found = directory_key(section.directory)
            if found > key:
                return
            if found == key:
                yield Run(page, section.entries, self._first)
                if seek != self._seeks:
                    return
            self._section += 1
            self._first += len(section.entries)

    def _turn(self, key: bytes) -> LoadedPage | None:
        """Go to the next page that may hold entries of a directory, or to one behind it; None at the end."""
        walk, begin = self._walk, (key, b"")
        walk.skip_to(begin)
        while refs := walk.wanted():
            walk.feed(self._load(refs))
            walk.skip_to(begin)
        self._page, self._section, self._first = walk.take(), 0, 0
        if self._page is not None and self._recheck is not None:
            self._recheck(self._page)
        return self._page
