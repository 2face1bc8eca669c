"""Resolve: find every chunk that snapshots need, by walking their catalogs; what they share is walked once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from anyio import to_thread

from coffret.engine.catalog import MAX_DEPTH
from coffret.engine.catalog_walk import UNKNOWN, open_node, open_page, payload_length
from coffret.engine.errors import Damaged
from coffret.engine.records import REF_BYTES, PageRef, iter_refs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.catalog_walk import LoadedPage
    from coffret.engine.fetch import Fetcher
    from coffret.engine.maintenance_needs import Needs
    from coffret.engine.progress import Progress
    from coffret.engine.snapshot import Snapshot

# So many pages, nodes and lists are asked for at a time: a page has 25 KiB, a node stands for dozens of them.
_PAGES, _NODES, _LISTS = 32, 8, 16
# Lists have levels of their own, below those of catalogs.
_LIST_LEVEL = -1


class Unresolved(Damaged):
    """A chunk that a snapshot needs can't be found."""

    remedy = "nothing was removed; see what `coffret at REPO check` says of it"


class Resolver:
    """Tells `needs` of all that snapshots need."""

    def __init__(self, needs: Needs, fetcher: Fetcher, progress: Progress) -> None:
        self._needs, self._fetcher, self._progress = needs, fetcher, progress

    async def snapshot(self, snapshot: Snapshot) -> None:
        """Resolve one snapshot.

        :raises Unresolved: if that can't be done
        """
        try:
            await self._catalog(snapshot.header.catalog, snapshot.header.depth)
        except Damaged as error:
            raise Unresolved(f"snapshot {snapshot.short_id} can't be resolved: {error}") from None

    async def _catalog(self, root: bytes, depth: int) -> None:
        if not 0 <= depth <= MAX_DEPTH:
            raise Damaged(f"a catalog of {depth} levels")
        waiting: list[tuple[int, list[PageRef]]] = [(depth, [PageRef(b"", b"", root, UNKNOWN, 0, 0)])]
        while waiting:
            level, refs = waiting.pop()
            count = _NODES if level else _PAGES
            if len(refs) > count:
                waiting.append((level, refs[count:]))
            fresh = await to_thread.run_sync(self._enter, refs[:count], level)
            payloads = await self._fetcher.load([ref.ref for ref in fresh])
            if level:
                for ref, payload in zip(fresh, payloads, strict=True):
                    _, children = await to_thread.run_sync(open_node, ref, payload)
                    waiting.append((level - 1, children))
            else:
                for ref, payload in zip(fresh, payloads, strict=True):
                    await self._page(await to_thread.run_sync(open_page, ref, payload))

    def _enter(self, refs: Sequence[PageRef], level: int) -> list[PageRef]:
        """Those that are new; all their own chunks are needed. For threads."""
        fresh = []
        for ref in refs:
            payload_length(ref.ref)
            if self._needs.enter(ref.ref, level):
                self._take(ref.ref, "the listing", meta=True)
                fresh.append(ref)
        return fresh

    async def _page(self, page: LoadedPage) -> None:
        for refs, level, what in await to_thread.run_sync(self._entries, page):
            await self._lists(refs, level, what)
        self._progress.files += page.ref.files

    def _entries(self, page: LoadedPage) -> list[tuple[bytes, int, str]]:
        """Take what the entries of a page name; return the lists of large files. For threads."""
        lists, plain = [], []
        for section in page.sections:
            for entry in section.entries:
                extra = entry.extra
                if extra is not None:
                    plain += [extra.xattrs_ref, extra.extents_ref]
                if extra is not None and extra.depth:
                    lists.append((entry.content, extra.depth, _path(section.directory, entry.name)))
                else:
                    plain.append(entry.content)
        if nowhere := self._needs.take(b"".join(plain)):
            self._name(page, nowhere)
        return lists

    def _name(self, page: LoadedPage, nowhere: bytes) -> None:
        """Say which path it is that lacks a chunk.

        :raises Damaged: always
        """
        [(chunk_id, _), *_] = iter_refs(nowhere)
        for section in page.sections:
            for entry in section.entries:
                extra = entry.extra
                refs = entry.content if extra is None else entry.content + extra.xattrs_ref + extra.extents_ref
                if any(each == chunk_id for each, _ in iter_refs(refs)):
                    raise _lacking(chunk_id, _path(section.directory, entry.name))
        raise _lacking(chunk_id, "a file")

    async def _lists(self, refs: bytes, depth: int, what: str) -> None:
        waiting = [(depth, refs)]
        while waiting:
            level, refs = waiting.pop()
            if not level:
                await to_thread.run_sync(self._take, refs, what)
                continue
            step = _LISTS * REF_BYTES
            if len(refs) > step:
                waiting.append((level, refs[step:]))
            fresh = await to_thread.run_sync(self._enter_lists, refs[:step], level, what)
            for ref, payload in zip(fresh, await self._fetcher.load(fresh), strict=True):
                if len(payload) != payload_length(ref) or not payload or len(payload) % REF_BYTES:
                    raise Damaged(f"the chunk list of {what} is not whole")
                waiting.append((level - 1, payload))

    def _enter_lists(self, refs: bytes, level: int, what: str) -> list[bytes]:
        self._take(refs, what, meta=True)
        each = [refs[at : at + REF_BYTES] for at in range(0, len(refs), REF_BYTES)]
        return [ref for ref in each if payload_length(ref) and self._needs.enter(ref, _LIST_LEVEL - level)]

    def _take(self, refs: bytes, what: str, *, meta: bool = False) -> None:
        if nowhere := self._needs.take(refs, meta=meta):
            [(chunk_id, _), *_] = iter_refs(nowhere)
            raise _lacking(chunk_id, what)


def _lacking(chunk_id: bytes, what: str) -> Damaged:
    return Damaged(f"chunk {chunk_id.hex()[:16]} of {what} is in no pack")


def _path(directory: bytes, name: bytes) -> str:
    return os.fsdecode(b"/" + directory + b"/" + name if directory else b"/" + name)
