"""Take over: what a revoked attempt has stored is committed by a new one, without reading the source again.

Maintenance ends an attempt that looks dead: its index objects are void, but the packs it has put are there. So the new
attempt lists anew, as any, looks up every chunk of the catalog that was made, and names in index objects of its own the
locations of those that only the old one knew. A pack of the old one counts if it is listed after the lease is durable,
and no open mark names it: then no sweep that does not wait for this attempt can be about to delete it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio import to_thread

from coffret.engine.attempt import Attempt
from coffret.engine.catalog_reader import Catalog
from coffret.engine.errors import CoffretError
from coffret.engine.index import IndexWriter
from coffret.engine.known import KnownChunks
from coffret.engine.packfile import pack_name
from coffret.engine.records import ID_BYTES, REF_BYTES
from coffret.engine.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.mirror import Location, Mirror
    from coffret.engine.progress import Progress
    from coffret.engine.records import Entry, SnapshotHeader
    from coffret.engine.repository import Repository


async def take_over(
    repository: Repository, old: Mirror, bad_packs: frozenset[bytes], header: SnapshotHeader, progress: Progress
) -> Snapshot | None:
    """Commit a snapshot as a new attempt; None if something it names is not there any more.

    `old`: the revoked attempt's view of the index. `bad_packs`: not to be relied on.

    :raises LeaseLost: if this attempt is revoked too, in an ExceptionGroup
    """
    attempt = Attempt(repository.connector, repository.sealer, repository.mirror, what="backup", kept=repository.kept)
    async with attempt.at_work(progress):
        await attempt.begin()
        # After the marks: what is listed here, and not marked, stays.
        sizes = {info.name: info.size_bytes async for info in repository.connector.list("packs/")}
        marked = attempt.marked | attempt.mirror.bad_packs | bad_packs
        known = KnownChunks(attempt.mirror, marked=marked)
        index = IndexWriter(repository.connector, repository.sealer, attempt.id, mirror=attempt.mirror, known=known)
        if not await _Relocation(repository, old, known, index, marked, sizes).of(header):
            return None
        await index.flush(last=True)
        snapshot = Snapshot(attempt.id, header)
        await attempt.commit(snapshot)
        return snapshot
    raise AssertionError("a task group does not swallow what it did not cancel")


class _Relocation:
    """Looks up all that a catalog names, and has the new attempt's index name what only the old one's did."""

    def __init__(
        self,
        repository: Repository,
        old: Mirror,
        known: KnownChunks,
        index: IndexWriter,
        marked: frozenset[bytes],
        sizes: dict[str, int],
    ) -> None:
        self._old, self._known, self._index, self._marked, self._sizes = old, known, index, marked, sizes
        self._fetcher = repository.fetcher(old)
        self._named: list[bytes] = []

    async def of(self, header: SnapshotHeader) -> bool:
        """Whether all of a snapshot can be relied on now."""
        catalog = Catalog(header.catalog, header.depth, self._load)
        try:
            async for _, sections in catalog.pages():
                for entry in (entry for section in sections for entry in section.entries):
                    await self._entry(catalog, entry)
                if not await self._settle():
                    return False
        except CoffretError:  # a part of the catalog can't be read any more
            return False
        return await self._settle()

    async def _load(self, refs: Sequence[bytes]) -> list[bytes]:
        """What the walk reads, pages, nodes and lists, is named by the catalog too."""
        for ref in refs:
            self._name(ref)
        return await self._fetcher.load(refs)

    def _name(self, refs: bytes) -> None:
        self._named += (refs[at : at + ID_BYTES] for at in range(0, len(refs), REF_BYTES))

    async def _entry(self, catalog: Catalog, entry: Entry) -> None:
        self._name(entry.content)
        if entry.extra is not None:
            self._name(entry.extra.xattrs_ref + entry.extra.extents_ref)
            if entry.extra.depth:
                async for refs in catalog.file_refs(entry):
                    self._name(refs)

    async def _settle(self) -> bool:
        """Look up what was named; whether all of it is there."""
        ids, self._named = self._named, []
        lacking = list(await to_thread.run_sync(self._known.absent, ids)) if ids else []
        located = await self._old.locate(lacking, avoid=self._marked) if lacking else []
        for chunk_id, location in zip(lacking, located, strict=True):
            if location is None or not self._is_there(location):
                others = filter(self._is_there, await self._old.locate_all(chunk_id))
                if (location := next(others, None)) is None:
                    return False
            self._known.adopt({chunk_id: location})
        await self._index.relieve()
        return True

    def _is_there(self, location: Location) -> bool:
        return location.pack not in self._marked and self._sizes.get(pack_name(location.pack)) == location.pack_bytes
