"""Copy a snapshot's catalog into another repository: the same tree, its refs being those of the target.

What lies below a page, node or chunk list is moved before it, in *windows*: the chunks of some thousand entries are
looked up, fetched and moved together, then the pages are written that name them. Each part of the tree has the length
it had, and lies where it lay; nothing is cut again.

What a snapshot that is listed in the target holds already need not be looked at: see `SyncIds.containers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coffret.engine.catalog import MAX_DEPTH
from coffret.engine.catalog_walk import UNKNOWN, open_node, open_page, payload_length
from coffret.engine.errors import CoffretError, Damaged
from coffret.engine.messages import MetaChunks
from coffret.engine.records import (
    REF_BYTES,
    PageRef,
    decode_node,
    decode_page,
    encode,
    iter_refs,
    pack_ref,
    refs_length,
)
from coffret.engine.sync_ids import SyncIds, container_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from coffret.engine.catalog_walk import LoadedPage
    from coffret.engine.known import KnownChunks
    from coffret.engine.progress import Progress
    from coffret.engine.records import Entry
    from coffret.engine.sync_move import Mover

# A window is moved when it names so many chunks (some KiB each while it is), or its pages and lists have so many
# bytes: what lies at its edges may be read twice, so it is large.
_WINDOW_CHUNKS, _WINDOW_BYTES = 1 << 15, 8 << 20
# Pages read together, nodes, and lists of one file; and so many bytes of them.
_PAGES, _NODES, _LISTS, _TOGETHER_BYTES = 32, 4, 16, 4 << 20
PAGE = 0


class _Window(msgspec.Struct):
    """Chunks wanted, by id, with their lengths; and the containers that name them, those below others first.

    A container is known by its key; it has a level (see `container_key`), refs and a payload.
    """

    chunks: dict[bytes, int] = msgspec.field(default_factory=dict)
    containers: dict[bytes, tuple[int, bytes, bytes]] = msgspec.field(default_factory=dict)
    size_bytes: int = 0

    @property
    def full(self) -> bool:
        return len(self.chunks) >= _WINDOW_CHUNKS or self.size_bytes >= _WINDOW_BYTES


class CatalogCopy:
    """Copies one catalog for one attempt. `load` reads the source's; `sound` are attempts whose snapshots are whole."""

    def __init__(
        self,
        load: Callable[[Sequence[bytes]], Awaitable[list[bytes]]],
        *,
        ids: SyncIds,
        id_key: bytes,
        attempt: bytes,
        sound: frozenset[bytes],
        known: KnownChunks,
        mover: Mover,
        progress: Progress,
    ) -> None:
        self._load, self._ids, self._known, self._mover = load, ids, known, mover
        self._attempt, self._seen_to = attempt, sound | {attempt}
        self._meta = MetaChunks(id_key)
        self._progress = progress
        self._window = _Window()
        # What the window that was moved last is in the target.
        self._leaves: dict[bytes, bytes] = {}
        self._made: dict[bytes, bytes] = {}

    async def run(self, root: bytes, depth: int) -> bytes:
        """Copy a catalog, given by the refs of its root and its depth; return the root's refs in the target.

        :raises Damaged: if it can't be read as it should be
        """
        if not 0 <= depth <= MAX_DEPTH:
            raise Damaged(f"a catalog of {depth} levels")
        await self._tree([PageRef(b"", b"", root, UNKNOWN, 0, 0)], depth)
        await self._flush()
        return (await self._containers([root], depth))[0]

    async def _tree(self, refs: Sequence[PageRef], height: int) -> None:
        """See to pages (height 0) or nodes, and to all below them."""
        lacking = await self._lacking([ref.ref for ref in refs], height)
        todo = {ref.ref: ref for ref in refs if ref.ref in lacking}
        self._pass(ref for ref in refs if ref.ref not in lacking)
        for part in _parts(list(todo), _NODES if height else _PAGES):
            for ref, payload in zip(map(todo.__getitem__, part), await self._load(part), strict=True):
                if height:
                    _, children = open_node(ref, payload)
                    await self._tree(children, height - 1)
                    self._note(height, ref.ref, payload)
                else:
                    await self._page(open_page(ref, payload), payload)
                if self._window.full:
                    await self._flush()

    def _pass(self, refs: Iterable[PageRef]) -> None:
        """Count what the target has already."""
        for ref in refs:
            if ref.entries != UNKNOWN:
                self._progress.files += ref.files
                self._progress.size_bytes += ref.size_bytes

    async def _page(self, page: LoadedPage, payload: bytes) -> None:
        for section in page.sections:
            for entry in section.entries:
                extra = entry.extra
                if extra is None or not extra.depth:
                    self._want(entry.content)
                else:
                    await self._lists(entry, entry.content, extra.depth, [entry.size])
                if extra is not None:
                    self._want(extra.xattrs_ref)
                    self._want(extra.extents_ref)
        self._note(PAGE, page.ref.ref, payload)
        self._pass([page.ref])

    async def _lists(self, entry: Entry, refs: bytes, depth: int, left: list[int]) -> None:
        """See to the chunk lists of a large file; `left`: bytes it may still have, in a list of one."""
        for part in _parts(_each(refs), _LISTS):
            lacking = await self._lacking(part, -depth)
            todo = [ref for ref in dict.fromkeys(part) if ref in lacking]
            for ref, payload in zip(todo, await self._load(todo) if todo else [], strict=True):
                if len(payload) != payload_length(ref) or not payload or len(payload) % REF_BYTES:
                    raise Damaged(f"the chunk list of {entry.name!r} is not whole")
                if depth > 1:
                    await self._lists(entry, payload, depth - 1, left)
                else:
                    # Of a list that repeats itself only the file's size says where it ends.
                    left[0] -= refs_length(payload)
                    if left[0] < 0:
                        raise Damaged(f"the chunks of {entry.name!r} are not those of a file of its size")
                    self._want(payload)
                self._note(-depth, ref, payload)
                if self._window.full:
                    await self._flush()

    def _want(self, refs: bytes) -> None:
        for chunk_id, length in iter_refs(refs):
            self._window.chunks[chunk_id] = length

    def _note(self, level: int, refs: bytes, payload: bytes) -> None:
        self._window.containers[container_key(refs, level)] = level, refs, payload
        self._window.size_bytes += len(payload)

    async def _lacking(self, refs: Sequence[bytes], level: int) -> set[bytes]:
        """Those of the containers of which it is not known that the target has all that lies below them."""
        keys = {container_key(each, level): each for each in refs}
        asked = [key for key in keys if key not in self._window.containers]
        known = await self._ids.containers(asked)
        return {keys[key] for key in asked if key not in known or known[key][1] not in self._seen_to}

    async def _flush(self) -> None:
        """Have the window's chunks moved, then write what names them."""
        window, self._window = self._window, _Window()
        known = await self._ids.leaves(list(window.chunks))
        lacking = await self._known.lacking(list(set(known.values())))
        todo = {
            chunk_id: length
            for chunk_id, length in window.chunks.items()
            if (target := known.get(chunk_id)) is None or target in lacking
        }
        # Noted as they go: what an interrupted run has moved is not read again.
        moved = await self._mover.move(todo, self._ids.keep_leaves)
        self._leaves, self._made = known | moved, {}
        for key, (level, refs, payload) in window.containers.items():
            made = self._meta.store(payload if self._ids.same else await self._translated(level, payload))
            if len(made) != len(refs) or (self._ids.same and made != refs):
                raise Damaged("a part of a catalog is not what its refs say")
            self._made[key] = made
            await self._mover.store(self._meta.runs())
        await self._ids.keep_containers(self._made, self._attempt)

    async def _translated(self, level: int, payload: bytes) -> bytes:
        """A page, node or list with the target's refs."""
        if level == -1:
            return await self._refs(payload)
        if level < -1:
            return b"".join(await self._containers(_each(payload), level + 1))
        if level > PAGE:
            children = decode_node(payload)
            refs = await self._containers([child.ref for child in children], level - 1)
            return encode([msgspec.structs.replace(child, ref=ref) for child, ref in zip(children, refs, strict=True)])
        sections = decode_page(payload)
        await self._look_up(entry for section in sections for entry in section.entries)
        for section in sections:
            for entry in section.entries:
                await self._translate(entry)
        return encode(sections)

    async def _translate(self, entry: Entry) -> None:
        """Give an entry the target's refs."""
        extra = entry.extra
        if extra is None or not extra.depth:
            if entry.content:
                entry.content = await self._refs(entry.content)
        else:
            entry.content = b"".join(await self._containers(_each(entry.content), -extra.depth))
        if extra is not None and (extra.xattrs_ref or extra.extents_ref):
            extra.xattrs_ref = await self._refs(extra.xattrs_ref)
            extra.extents_ref = await self._refs(extra.extents_ref)

    async def _look_up(self, entries: Iterable[Entry]) -> None:
        """Ask together for what an earlier window has moved."""
        missing = {
            chunk_id
            for entry in entries
            if entry.extra is None or not entry.extra.depth
            for chunk_id, _ in iter_refs(entry.content)
            if chunk_id not in self._leaves
        }
        if missing:
            self._leaves |= await self._ids.leaves(list(missing))

    async def _refs(self, refs: bytes) -> bytes:
        """The target's refs of chunks."""
        found = self._leaves
        if missing := [chunk_id for chunk_id, _ in iter_refs(refs) if chunk_id not in found]:
            found |= await self._ids.leaves(missing)
        try:
            return b"".join([pack_ref(found[chunk_id], length) for chunk_id, length in iter_refs(refs)])
        except KeyError:
            raise _forgotten() from None

    async def _containers(self, refs: Sequence[bytes], level: int) -> list[bytes]:
        """The target's refs of pages, nodes or lists of a level, each given by its own."""
        keys = [container_key(each, level) for each in refs]
        missing = [key for key in keys if key not in self._made]
        known = {key: found for key, (found, _) in (await self._ids.containers(missing)).items()} if missing else {}
        try:
            return [self._made.get(key) or known[key] for key in keys]
        except KeyError:
            raise _forgotten() from None


def _each(refs: bytes) -> list[bytes]:
    """Packed refs, one by one."""
    return [refs[at : at + REF_BYTES] for at in range(0, len(refs), REF_BYTES)]


def _parts(refs: Sequence[bytes], count: int) -> Iterator[list[bytes]]:
    """Refs of containers to be read together: so many, and fewer if they are large.

    :raises Damaged: if one claims to be larger than any
    """
    part: list[bytes] = []
    size_bytes = 0
    for each in refs:
        length = payload_length(each)
        if part and (len(part) == count or size_bytes + length > _TOGETHER_BYTES):
            yield part
            part, size_bytes = [], 0
        part.append(each)
        size_bytes += length
    if part:
        yield part


def _forgotten() -> CoffretError:
    return CoffretError(
        "the local cache has lost what this run had noted there", remedy="run the command again: it takes up the rest"
    )
