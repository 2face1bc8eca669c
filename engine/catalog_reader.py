"""Read a snapshot's catalog: find a path, list a directory, walk a subtree, follow a backup through its parent.

Everything is checked as it is read (see `catalog_walk`): what these return can be trusted not to leave the tree it
belongs to, nor to go on for ever. The loader sees the ref of every page, node, list and attribute that is read, so it
can also tell which chunks a catalog itself consists of.
"""

from __future__ import annotations

import os
import stat
import struct
from bisect import bisect_left
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from coffret.engine.catalog import directory_key, key_of, split_path
from coffret.engine.catalog_walk import LoadedPage, PageWalk, payload_length
from coffret.engine.errors import Damaged, UsageError
from coffret.engine.records import REF_BYTES, Extra, decode_xattrs, refs_length

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from coffret.engine.catalog import Key
    from coffret.engine.records import Entry, PageRef, Section

    Load = Callable[[Sequence[bytes]], Awaitable[list[bytes]]]
    Lost = Callable[[bytes, str], None]
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
    Damaged if what it reads is not well-formed; but `lost`, if there is one, is told once of each page or node that is
    damaged, by the path at which it begins (with a leading slash) and in words, and iterations go on without it.
    """

    def __init__(self, root: bytes, depth: int, load: Load, *, lost: Lost | None = None) -> None:
        self._root, self._depth, self._load, self._lost = root, depth, load, lost
        # Refs of what is damaged; and how often something was met that is, which may be the same.
        self._told: set[bytes] = set()
        self._met = 0
        #: Where damaged pages and nodes that were told of begin, and where what follows does (None: at the end).
        self.lost_ranges: list[tuple[Key, Key | None]] = []

    @property
    def survives(self) -> bool:
        """Whether the damage that was met, if any, has left parts of the catalog that can be read."""
        return self._met > 0

    async def pages(
        self,
        start: Key | None = None,
        stop: Key | None = None,
        *,
        reverse: bool = False,
        known: Callable[[PageRef], Key | None] | None = None,
    ) -> AsyncIterator[tuple[PageRef, list[Section]]]:
        """Iterate over the pages that hold keys (`catalog.key_of`) in [start, stop), as they are stored.

        Pages that are `known`, by the last key they hold, are not read: they come without sections.
        """
        async for page in self._pages(self._walk(start, stop, reverse, known)):
            yield page.ref, page.sections

    def _walk(
        self,
        start: Key | None,
        stop: Key | None,
        reverse: bool,
        known: Callable[[PageRef], Key | None] | None = None,
    ) -> PageWalk:
        lost = None if self._lost is None else self._lose
        return PageWalk(self._root, self._depth, start or (b"", b""), stop, reverse=reverse, lost=lost, known=known)

    async def _pages(self, walk: PageWalk) -> AsyncIterator[LoadedPage]:
        while True:
            while refs := walk.wanted():
                walk.feed(await self._read(refs))
            page = walk.take()
            if page is not None:
                yield page
            elif walk.ended:
                return

    async def _read(self, refs: Sequence[bytes]) -> Sequence[bytes | Damaged]:
        """Payloads; where one can't be had, and that is not the end, why, in its place."""
        try:
            return await self._load(refs)
        except Damaged as error:
            if self._lost is None:
                raise
            if len(refs) == 1:
                return [error]
        return [(await self._read([ref]))[0] for ref in refs]

    def _lose(self, ref: PageRef, after: PageRef | None, error: Damaged) -> None:
        self._met += 1
        if ref.ref in self._told or self._lost is None:
            return
        self._told.add(ref.ref)
        behind = None if after is None else key_of(after.directory, after.name)
        self.lost_ranges.append((key_of(ref.directory, ref.name), behind))
        first = _path_of(ref)
        until = f"to {os.fsdecode(_path_of(after))}" if after else "to the end"
        self._lost(first, f"{ref.entries} entries from {os.fsdecode(first)} {until} can't be read: {error}")

    async def find(self, path: bytes) -> Entry | None:
        """The entry of a path, in as many requests as the catalog is deep.

        :raises Damaged: if it may be in a page that is
        """
        if path.startswith(b"/"):
            return None
        directory, name = split_path(path)
        key, met = directory_key(directory), self._met
        async for section in self._sections((key, name), (key, name + b"\0")):
            at = bisect_left(section.entries, name, key=_name)
            if at < len(section.entries) and section.entries[at].name == name:
                return section.entries[at]
        if self._met > met:
            raise Damaged(f"the entry of /{os.fsdecode(path)} may be in a part of the catalog that can't be read")
        return None

    async def listing(self, path: bytes) -> AsyncIterator[list[Entry]]:
        """Iterate over the entries of a directory by name, a page's worth each; none if it is no directory."""
        key = directory_key(path)
        async for section in self._sections((key, b""), (key + b"\0", b"")):
            if entries := _named(section):
                yield entries

    async def walk(
        self, path: bytes = b"", *, reverse: bool = False, enter: Callable[[bytes], bool] | None = None
    ) -> AsyncIterator[tuple[bytes, list[Entry]]]:
        """Iterate over (directory, entries): first a path's own entry alone, then what lies below, a page's worth each.

        A directory's listing may come in several parts. Reversed, everything comes backwards, the entries of each
        part too. Nothing comes if there is no such path. Of a directory that `enter` does not hold for nothing below
        is read. Where the path's own entry can't be read, the path is taken for a directory.
        """
        unread = False
        try:
            own = await self.find(path)
        except Damaged:
            if not self.survives:
                raise
            own, unread = None, True
        if own is None and not unread:
            if not path:
                raise Damaged("a catalog has no entry for the root")
            return
        if own and not reverse:
            yield split_path(path)[0], [own]
        if own is None or stat.S_ISDIR(own.mode):
            key = directory_key(path)
            stop = (key + b"\1", b"") if key else None
            async for section in self._sections((key, b""), stop, reverse=reverse, enter=enter):
                if entries := _named(section):
                    yield section.directory, entries[::-1] if reverse else entries
        if own and reverse:
            yield split_path(path)[0], [own]

    async def file_refs(self, entry: Entry) -> AsyncIterator[bytes]:
        """Iterate over a regular file's chunk list, in pieces of packed refs.

        :raises Damaged: also if the chunks are not as many bytes as the file has outside its holes
        """
        extra = entry.extra or _NO_EXTRA
        expected = content_length(entry, await self.extents(entry))
        total = 0
        async for piece in self._lists(entry.content, extra.depth):
            length = refs_length(piece)
            total += length
            # Of a list that repeats itself only the file's size says where it ends.
            if total > expected or not length:
                raise Damaged(f"the chunks of {entry.name!r} are not those of a file of its size")
            yield piece
        if total != expected:
            raise Damaged(f"the chunks of {entry.name!r} are fewer than a file of its size has")

    async def attributes(self, entry: Entry) -> Attributes:
        """An entry's xattrs and extents, wherever they are kept.

        :raises Damaged: also if extents overlap or lie outside the file, or an xattr has an impossible name
        """
        extra = entry.extra
        if extra is None:
            return Attributes([], b"")
        found = iter(await self._attributes(entry, [ref for ref in (extra.xattrs_ref, extra.extents_ref) if ref]))
        xattrs = _decode_xattrs(next(found)) if extra.xattrs_ref else extra.xattrs
        if any(not name or b"\0" in name for name, _ in xattrs):
            raise Damaged(f"{entry.name!r} has an xattr of an impossible name")
        return Attributes(xattrs, _checked(entry, next(found) if extra.extents_ref else extra.extents))

    async def extents(self, entry: Entry) -> bytes:
        """A sparse file's data extents alone, none of a file without holes.

        :raises Damaged: also if they overlap or lie outside the file
        """
        extra = entry.extra or _NO_EXTRA
        extents = (await self._attributes(entry, [extra.extents_ref]))[0] if extra.extents_ref else extra.extents
        return _checked(entry, extents)

    async def _attributes(self, entry: Entry, refs: list[bytes]) -> list[bytes]:
        lengths = [payload_length(ref, _MAX_ATTRIBUTE_BYTES) for ref in refs]
        payloads = await self._load(refs) if refs else []
        if lengths != [len(payload) for payload in payloads]:
            raise Damaged(f"attributes of {entry.name!r} have another length than their ref says")
        return payloads

    async def _sections(
        self,
        start: Key,
        stop: Key | None,
        *,
        reverse: bool = False,
        enter: Callable[[bytes], bool] | None = None,
    ) -> AsyncIterator[Section]:
        """Sections of the directories in the range; the first and last may hold entries outside it."""
        walk = self._walk(start, stop, reverse)
        async for page in self._pages(walk):
            for section in reversed(page.sections) if reverse else page.sections:
                key = directory_key(section.directory)
                if start[0] > key or (stop is not None and (key, section.entries[0].name) >= stop):
                    continue
                if enter is not None and (barred := _barred(section.directory, enter)) is not None:
                    # The subtree may fill many pages.
                    if reverse:
                        walk.skip_back((barred, b""))
                    else:
                        walk.skip_to((barred + b"\1", b""))
                    continue
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


def clean_path(path: bytes) -> bytes:
    """A path as a catalog has it: without slashes at its ends, doubled ones, and components `.`."""
    return b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))


def no_such_path(snapshot: str, path: bytes) -> UsageError:
    """What to raise for a path (without a leading slash) that is not in a snapshot, given by its short id."""
    return UsageError(
        f"no /{os.fsdecode(path)} in snapshot {snapshot}",
        remedy=f"see `coffret at REPO ls {snapshot}` for what is there",
    )


def content_length(entry: Entry, extents: bytes) -> int:
    """How many bytes the chunks of a regular file have together: its size, or that of its data extents."""
    return sum([length for _, length in _EXTENT.iter_unpack(extents)]) if extents else entry.size


def _path_of(ref: PageRef) -> bytes:
    """Where a page begins, as an absolute path."""
    return b"/" + (ref.directory + b"/" + ref.name if ref.directory else ref.name)


def _barred(directory: bytes, enter: Callable[[bytes], bool]) -> bytes | None:
    """The key of the highest directory on the way to one (and with it) that is not to be entered."""
    if enter(directory):
        return None
    at = directory.find(b"/")
    while at >= 0 and enter(directory[:at]):
        at = directory.find(b"/", at + 1)
    return directory_key(directory if at < 0 else directory[:at])


def _named(section: Section) -> list[Entry]:
    """The entries but the root directory's own."""
    return section.entries if section.entries[0].name else section.entries[1:]


def _decode_xattrs(payload: bytes) -> list[tuple[bytes, bytes]]:
    try:
        return decode_xattrs(payload)
    except msgspec.MsgspecError as error:
        raise Damaged(f"stored xattrs do not decode: {error}") from None


def _checked(entry: Entry, extents: bytes) -> bytes:
    """The extents, if an entry can have them."""
    if extents == _NO_DATA:
        return extents
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
    return extents


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
