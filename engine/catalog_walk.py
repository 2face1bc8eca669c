"""Open and check the catalog's pages and nodes, and walk them in order, without any I/O of its own.

What is decoded here may have been written by an enemy who holds the keys. Whatever it says, names can't leave their
directory, a walk ends, and memory stays bounded; anything else is `Damaged`. (That a directory's entry is a directory
and no link is for restore to see to: it opens each with O_NOFOLLOW.)
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from operator import lt
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from coffret.engine.catalog import MAX_DEPTH, describe, directory_key, key_of
from coffret.engine.errors import Damaged
from coffret.engine.records import REF_BYTES, Extra, PageRef, Section, refs_length

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coffret.engine.catalog import Key

_Record = TypeVar("_Record")

# Pages asked for at once, first and after each skip, then doubled up to the most: the loader makes few requests of
# them. Nodes, each of which stands for dozens of pages, are asked for in smaller numbers.
_AHEAD_FIRST, _AHEAD_MOST, _AHEAD_NODES, _AHEAD_BYTES = 4, 32, 8, 4 << 20
# Far above what a page or a node weighs; a hostile one decodes to at most ten times as much.
_MAX_PAYLOAD_BYTES = 16 << 20
_decode_sections = msgspec.msgpack.Decoder(Annotated[list[Section], msgspec.Meta(max_length=1 << 14)]).decode
_decode_refs = msgspec.msgpack.Decoder(Annotated[list[PageRef], msgspec.Meta(max_length=1 << 12)]).decode
_FORBIDDEN = frozenset((b"", b".", b".."))
#: Stands for the sums of the root, which no node tells.
UNKNOWN = -1
_START: Key = (b"", b"")


class LoadedPage(msgspec.Struct, eq=False):
    """A page as read: `entries` is how many it has in all its sections; 0 if it must not be kept as it is."""

    ref: PageRef
    sections: list[Section]
    entries: int


class _Waiting(msgspec.Struct):
    """A page or node still to come: its first key, its ref, the ref behind it, and its payload once that is read.

    `last`: the last key of a page that is known and not to be read.
    """

    key: Key
    ref: PageRef
    after: PageRef | None
    payload: bytes | Damaged = b""
    last: Key | None = None


class PageWalk:
    """The pages that hold keys from `start` up to, not including, `stop`, in order or backwards.

    The caller does the reading: while `wanted` returns refs, it feeds their payloads; then `take` has the next page,
    or None at the end. The first and last page may hold keys outside the range.

    `lost` is told of each page or node that is damaged, by its ref and the one behind it, and the walk goes on without
    it. If it is None, or the root is damaged, that is an error. Of pages that are `known`, by the last key they hold,
    only the ref is taken (and no sections): they are not read.

    :raises Damaged: in all methods, if the catalog is not well-formed
    """

    def __init__(
        self,
        root: bytes,
        depth: int,
        start: Key = _START,
        stop: Key | None = None,
        *,
        reverse: bool = False,
        lost: Callable[[PageRef, PageRef | None, Damaged], None] | None = None,
        known: Callable[[PageRef], Key | None] | None = None,
    ) -> None:
        if not 0 <= depth <= MAX_DEPTH:
            raise Damaged(f"a catalog of {depth} levels")
        payload_length(root)
        self._start, self._stop, self._reverse, self._lost = start, stop, reverse, lost
        self._known = known
        # What is still to come, nearest first: loaded pages, then refs of pages, of nodes, of nodes above them …
        self._queues: list[deque[_Waiting]] = [deque() for _ in range(depth + 2)]
        self._queues[-1].append(_Waiting(_START, PageRef(b"", b"", root, UNKNOWN, 0, 0), None))
        self._asked = (0, 0)
        self._ahead = _AHEAD_FIRST
        self._edge: Key | None = None

    def wanted(self) -> list[bytes]:
        """Packed refs of what is to be fed next; none when a page can be taken or the end is reached."""
        self._pass_known()
        if self._queues[0]:
            return []
        for height, queue in enumerate(self._queues):
            if queue:
                refs: list[bytes] = []
                size_bytes = 0
                limit = self._ahead if height == 1 else max(1, self._ahead // _AHEAD_NODES)
                for waiting in queue:
                    size_bytes += refs_length(waiting.ref.ref)
                    if refs and (len(refs) == limit or size_bytes > _AHEAD_BYTES or waiting.last is not None):
                        break
                    refs.append(waiting.ref.ref)
                self._asked = (height, len(refs))
                self._ahead = min(self._ahead * 2, _AHEAD_MOST)
                return refs
        return []

    def feed(self, payloads: Sequence[bytes | Damaged]) -> None:
        """Take the payloads of the refs that `wanted` returned last; an error for one that could not be read."""
        height, count = self._asked
        queue, below = self._queues[height], self._queues[height - 1]
        asked = [queue.popleft() for _ in range(count)]
        for waiting, payload in zip(asked, payloads, strict=True):
            waiting.payload = payload
            if height == 1:
                below.append(waiting)
                continue
            try:
                children = self._children(waiting)
            except Damaged as error:
                self._lose(waiting, error)
                continue
            if height == 2 and self._known is not None:
                for page in children:
                    page.last = self._known(page.ref)
            below.extend(children)

    @property
    def ended(self) -> bool:
        """Whether nothing is to be fed or taken any more."""
        return not any(self._queues)

    def take(self) -> LoadedPage | None:
        """The next page; None at the end, or while something is wanted."""
        while self._queues[0]:
            waiting = self._queues[0].popleft()
            try:
                return self._open(waiting)
            except Damaged as error:
                self._lose(waiting, error)
        return None

    def _pass_known(self) -> None:
        """Pages that come next and need not be read can be taken at once."""
        loaded, pages = self._queues[:2]
        while not loaded and pages and pages[0].last is not None:
            loaded.append(pages.popleft())

    def _lose(self, waiting: _Waiting, error: Damaged) -> None:
        if self._lost is None or waiting.ref.entries == UNKNOWN:
            raise error
        self._lost(waiting.ref, waiting.after, error)

    def _open(self, waiting: _Waiting) -> LoadedPage:
        if waiting.last is not None:
            page = LoadedPage(waiting.ref, [], 0)
            first_key, last_key = waiting.key, waiting.last
        else:
            page = open_page(waiting.ref, _payload(waiting))
            first_key, last_key = key_of(page.ref.directory, page.ref.name), last_key_of(page.sections)
        near, far = (last_key, first_key) if self._reverse else (first_key, last_key)
        if self._edge is not None and not (near < self._edge if self._reverse else near > self._edge):
            raise Damaged("catalog pages are out of order")
        self._edge = far
        return page

    def skip_to(self, key: Key) -> None:
        """Leave out, when walking forward, pages that lie wholly before `key`, without reading them."""
        self._start = max(self._start, key)
        for height in range(len(self._queues) - 1, -1, -1):
            queue = self._queues[height]
            while len(queue) > 1 and queue[1].key <= key:
                queue.popleft()
                self._ahead = _AHEAD_FIRST
            if queue and queue[0].key <= key:
                for nearer in self._queues[:height]:
                    if nearer:
                        nearer.clear()
                        self._ahead = _AHEAD_FIRST
                return

    def skip_back(self, key: Key) -> None:
        """Leave out, when walking backwards, pages that begin at `key` or behind it, without reading them."""
        self._stop = key if self._stop is None else min(self._stop, key)
        for queue in self._queues:
            while queue and queue[0].key >= key:
                queue.popleft()
                self._ahead = _AHEAD_FIRST

    def _children(self, waiting: _Waiting) -> list[_Waiting]:
        keys, refs = open_node(waiting.ref, _payload(waiting))
        first = max(bisect_right(keys, self._start) - 1, 0)
        end = len(keys) if self._stop is None else bisect_left(keys, self._stop)
        behind = [*refs[1:], waiting.after]
        found = [_Waiting(keys[at], refs[at], behind[at]) for at in range(first, end)]
        return found[::-1] if self._reverse else found


def _payload(waiting: _Waiting) -> bytes:
    if isinstance(waiting.payload, Damaged):
        raise waiting.payload
    return waiting.payload


def last_key_of(sections: Sequence[Section]) -> Key:
    """The key of the last entry of a page, given by its sections."""
    last = sections[-1]
    return key_of(last.directory, last.entries[-1].name)


def payload_length(ref: bytes, limit_bytes: int = _MAX_PAYLOAD_BYTES) -> int:
    """Length in bytes of what packed refs name.

    :raises Damaged: if they are none, or it is more than any page, node or list has
    """
    if not ref or len(ref) % REF_BYTES:
        raise Damaged("a catalog ref is cut short")
    length = refs_length(ref)
    if length > limit_bytes:
        raise Damaged("a part of a catalog claims an absurd length")
    return length


def open_page(ref: PageRef, payload: bytes) -> LoadedPage:
    """Decode a page and check it against its ref.

    :raises Damaged: if it is not well-formed, or not the page meant
    """
    sections = _decode(_decode_sections, ref, payload)
    if not sections:
        raise Damaged("a catalog page is empty")
    previous: bytes | None = None
    for section in sections:
        key = directory_key(section.directory)
        if previous is not None and key <= previous:
            raise Damaged("directories in a catalog page are out of order")
        previous = key
        if key and (b"\0" in section.directory or not _FORBIDDEN.isdisjoint(key.split(b"\0"))):
            raise Damaged(f"a catalog holds an impossible path: {section.directory!r}")
    count = _check_entries(sections)
    if ref.entries == UNKNOWN:
        ref = describe(sections, ref.ref)
    first = sections[0]
    if (first.directory, first.entries[0].name, count) != (ref.directory, ref.name, ref.entries):
        raise Damaged("a catalog page is not the one its index means")
    return LoadedPage(ref, sections, count)


def open_node(ref: PageRef, payload: bytes) -> tuple[list[Key], list[PageRef]]:
    """Decode a node of the page index and check it against its own ref; return its children, and their keys.

    :raises Damaged: if it is not well-formed, or not the node meant
    """
    children = _decode(_decode_refs, ref, payload)
    keys = [key_of(child.directory, child.name) for child in children]
    if not keys or not all(map(lt, keys, keys[1:])):
        raise Damaged("a node of a catalog is empty or out of order")
    for child in children:
        payload_length(child.ref)
        if child.entries < 1 or child.files < 0 or child.size_bytes < 0:
            raise Damaged("a node of a catalog counts less than nothing")
    if ref.entries != UNKNOWN:
        sums = (sum(c.entries for c in children), sum(c.files for c in children), sum(c.size_bytes for c in children))
        if keys[0] != key_of(ref.directory, ref.name) or sums != (ref.entries, ref.files, ref.size_bytes):
            raise Damaged("a node of a catalog is not the one its index means")
    return keys, children


def _decode(decoder: Callable[[bytes], list[_Record]], ref: PageRef, payload: bytes) -> list[_Record]:
    if len(payload) != payload_length(ref.ref):
        raise Damaged("a part of a catalog has another length than its ref says")
    try:
        return decoder(payload)
    # Beside its own errors, msgspec lets pass those of bad UTF-8 and of nesting in fields that are skipped.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Damaged(f"a part of a catalog does not decode: {error}") from None


def _check_entries(sections: list[Section]) -> int:
    """Names in order and possible, numbers in range, refs whole: how many. A page at once: it sees every entry."""
    entries = [entry for section in sections for entry in section.entries]
    names = [entry.name for entry in entries]
    rising = bytearray(map(lt, names, names[1:]))
    end = 0
    for section in sections:
        if not section.entries:
            raise Damaged(f"a catalog has an empty listing of {section.directory!r}")
        end += len(section.entries)
        rising[end - 1 : end] = b"\1"  # the next directory's names begin anew
    if 0 in rising:
        raise Damaged("names in a catalog page are out of order")
    joined = b"/".join(names)
    # Only the root directory's own entry, the first of all, is without a name.
    named = names if names[0] or sections[0].directory else names[1:]
    if joined.count(b"/") != len(names) - 1 or b"\0" in joined or not _FORBIDDEN.isdisjoint(named):
        raise Damaged("a catalog holds an impossible name")
    # Other numbers are only ever compared, or cut to what a call takes.
    for entry in entries:
        if (
            (entry.mode | entry.uid | entry.gid) >> 32
            or entry.size >> 63
            or len(entry.content) % REF_BYTES
            or (entry.extra is not None and not _possible_extra(entry.extra))
        ):
            raise Damaged(f"a catalog holds an impossible entry: {entry.name!r}")
    return len(entries)


def _possible_extra(extra: Extra) -> bool:
    return not (
        b"\0" in extra.target
        or (extra.rdev | extra.nlink) >> 64
        or not 0 <= extra.depth <= MAX_DEPTH
        or len(extra.extents) % 16
        or len(extra.extents_ref) % REF_BYTES
        or len(extra.xattrs_ref) % REF_BYTES
        or (extra.extents and extra.extents_ref)
    )
