"""Make of a damaged snapshot another, of what is whole in it.

It has all files that have all their chunks, without attributes that are lost; directories whose entries are lost are
there without their metadata; and each loss is recorded in it as a fault. What it has in damaged packs is stored again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
from anyio import to_thread

from coffret import __version__
from coffret.engine.attempt import Attempt
from coffret.engine.catalog import key_of
from coffret.engine.catalog_reader import Catalog
from coffret.engine.errors import ChunkMissing, CoffretError
from coffret.engine.index import IndexWriter
from coffret.engine.known import KnownChunks
from coffret.engine.messages import MetaChunks, Run
from coffret.engine.records import ID_BYTES, Counts, Entry, Section, SourceFault, iter_refs, pack_ref
from coffret.engine.repair_catalog import CatalogRebuild, LostDirectories
from coffret.engine.repair_writer import chunk_writer
from coffret.engine.snapshot import Snapshot, load_whole

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from anyio.abc import TaskGroup

    from coffret.engine.check_damage import Damage
    from coffret.engine.fetch import Fetcher
    from coffret.engine.progress import Progress
    from coffret.engine.records import PageRef
    from coffret.engine.repository import Repository

    Reasons = Callable[[Catalog, Sequence[Entry]], Awaitable[list[str]]]

# As a backup does: so many are listed in the snapshot, all are counted.
_MAX_FAULTS = 10_000
# Chunks of a large file that are looked up at a time.
_IDS = 4096


class Repaired(msgspec.Struct, frozen=True):
    """A snapshot that was made of a damaged one, and how much of that is lost: files, and parts of the catalog."""

    snapshot: Snapshot
    damaged: Snapshot
    lost: int


class SnapshotRepair:
    """One attempt to repair one snapshot: `begin`, then `run`, then `commit`.

    `damage`: what is known to be damaged; `reasons`: why entries are not whole, by that and the attempt's own mirror.
    """

    def __init__(self, repository: Repository, damaged: Snapshot, damage: Damage, progress: Progress) -> None:
        self._repository, self.damaged, self._damage, self._progress = repository, damaged, damage, progress
        self.attempt = Attempt(
            repository.connector, repository.sealer, repository.mirror, what="repair", kept=repository.kept
        )
        self.reasons: Reasons
        self._faults: list[SourceFault] = []
        self._lost = 0
        self._counts = Counts()
        self._meta = MetaChunks(repository.secrets.id_key)
        # Refs that were read through the catalog: of the chunks it consists of.
        self._read: list[bytes] = []
        self._known: KnownChunks
        self._index: IndexWriter
        self._fetcher: Fetcher
        self._send: Callable[[Run], Awaitable[None]]

    async def begin(self, group: TaskGroup) -> bool:
        """Learn the repository's state; whether the snapshot is still there. `group`: for helpers."""
        repository, attempt = self._repository, self.attempt
        await attempt.begin(audit=True)
        mirror = attempt.mirror
        bad = attempt.marked | mirror.bad_packs | self._damage.packs
        self._known = KnownChunks(mirror, marked=bad)
        self._index = IndexWriter(repository.connector, repository.sealer, attempt.id, mirror=mirror, known=self._known)
        group.start_soon(self._index.keep)
        self._fetcher = repository.fetcher(mirror)
        return any(each.attempt == self.damaged.attempt for each in attempt.commits.snapshots)

    async def run(self) -> tuple[bytes, int]:
        """Store the catalog of what is whole; returns its (root ref, depth).

        :raises Damaged: if the catalog's root can't be read: then nothing is known of the snapshot
        """
        header = self.damaged.header
        rebuild = CatalogRebuild(self._repository.secrets.chunker_key, self._meta.store, self._counts)
        stand_ins = await self._lost_directories()
        at = 0
        writer = chunk_writer(
            self._repository, self.attempt.id, known=self._known, index=self._index, progress=self._progress
        )
        catalog = self._catalog(self._lose_part)
        async with writer as self._send:
            async for page, sections in catalog.pages():
                begin = at
                while at < len(stand_ins) and _key(stand_ins[at]) < key_of(page.directory, page.name):
                    at += 1
                self._stand_in(rebuild, stand_ins[begin:at])
                left, changed = await self._page(catalog, page, sections)
                rebuild.add(page, left, changed=changed)
                await self._flush()
            self._stand_in(rebuild, stand_ins[at:])
            root = rebuild.finish()
            await self._flush()
        await self._index.flush(last=True)
        self._counts.errors = header.counts.errors + self._lost
        return root

    async def commit(self, root: tuple[bytes, int]) -> Repaired:
        """Put the snapshot: right behind the damaged one in time, so that `latest` and the next backup mean this one.

        :raises LeaseLost: if maintenance has ended this attempt
        """
        old = await load_whole(self._repository.connector, self._repository.sealer, self.damaged)
        self._counts.stored_bytes, self._counts.added_bytes = self._progress.stored_bytes, self._progress.added_bytes
        header = msgspec.structs.replace(
            self.damaged.header,
            snapshot_id=os.urandom(ID_BYTES // 2),
            time_ns=self.damaged.header.time_ns + 1,
            catalog=root[0],
            depth=root[1],
            counts=self._counts,
            faults=[*self._faults, *old.header.faults][:_MAX_FAULTS],
            parent=self.damaged.header.snapshot_id,
            program=f"coffret {__version__}",
        )
        snapshot = Snapshot(self.attempt.id, header)
        await self.attempt.commit(snapshot)
        await self._repository.saw(snapshot)
        return Repaired(snapshot, self.damaged, self._lost)

    def _catalog(self, lost: Callable[[bytes, str], None]) -> Catalog:
        header = self.damaged.header
        return Catalog(header.catalog, header.depth, self._load, lost=lost)

    async def _load(self, refs: Sequence[bytes]) -> list[bytes]:
        self._read += refs
        return await self._fetcher.load(refs)

    async def _lost_directories(self) -> list[tuple[bytes, Entry]]:
        """What stands in for directories of which only the content is left."""
        catalog = self._catalog(_ignore)
        async for _ in catalog.pages():
            self._read.clear()
        if not catalog.lost_ranges:
            return []
        directories = LostDirectories(catalog.lost_ranges)
        async for _, sections in self._catalog(_ignore).pages():
            self._read.clear()
            for section in sections:
                directories.see(section.directory)
        return directories.entries(self.damaged.header.time_ns)

    def _stand_in(self, rebuild: CatalogRebuild, found: list[tuple[bytes, Entry]]) -> None:
        rebuild.add_directories(found)
        for directory, entry in found:
            self._lose(directory, entry, "the directory's metadata is lost")

    async def _page(self, catalog: Catalog, page: PageRef, sections: list[Section]) -> tuple[list[Section], bool]:
        """(what is left of a page, whether that differs from what it was); all that is left is in the repository."""
        self._read.clear()
        reasons = iter(await self.reasons(catalog, [entry for section in sections for entry in section.entries]))
        changed, left = False, []
        ids: list[bytes] = []
        doubtful: list[tuple[Section, Entry]] = []
        for section in sections:
            kept = Section(section.directory, [])
            for entry in section.entries:
                reason = next(reasons)
                whole = await self._whole(catalog, entry, reason) if reason or entry.extra else entry
                if whole is None or whole is not entry:
                    changed = True
                    self._lose(section.directory, entry, reason or "a chunk can't be had")
                if whole is not None:
                    kept.entries.append(whole)
                    ids += [chunk_id for chunk_id, _ in iter_refs(whole.content)]
                    doubtful.append((kept, whole))
            if kept.entries:
                left.append(kept)
        if await self._rely(ids):
            # Something that was taken for whole can't be read: find out which.
            for kept, entry in doubtful:
                if reason := await self._rely([chunk_id for chunk_id, _ in iter_refs(entry.content)]):
                    kept.entries.remove(entry)
                    self._lose(kept.directory, entry, reason)
                    changed = True
            left = [kept for kept in left if kept.entries]
        if not changed and await self._rely([chunk_id for chunk_id, _ in iter_refs(page.ref)], meta=True):
            changed = True  # it was read all the same: from the cache, say
        return left, changed

    async def _whole(self, catalog: Catalog, entry: Entry, reason: str) -> Entry | None:
        """What is to be kept of an entry that is not whole, or may have chunks beside its content; None: nothing."""
        if entry.extra is None:
            return None
        if not reason and not await self._rely_on_all(catalog, entry):
            return entry
        # Content is worth more than attributes.
        bare = msgspec.structs.replace(entry, extra=msgspec.structs.replace(entry.extra, xattrs=[], xattrs_ref=b""))
        if not entry.extra.xattrs_ref or (await self.reasons(catalog, [bare]))[0]:
            return None
        return None if await self._rely_on_all(catalog, bare) else bare

    async def _rely_on_all(self, catalog: Catalog, entry: Entry) -> str:
        """`_rely` for all chunks of an entry: attributes, lists, content."""
        self._read.clear()
        try:
            await catalog.attributes(entry)
            if entry.extra is not None and entry.extra.depth:
                async for refs in catalog.file_refs(entry):
                    if reason := await self._rely([chunk_id for chunk_id, _ in iter_refs(refs)]):
                        return reason
        except CoffretError as error:
            return str(error)
        return await self._rely([chunk_id for ref in self._read for chunk_id, _ in iter_refs(ref)], meta=True)

    async def _rely(self, ids: Sequence[bytes], *, meta: bool = False) -> str:
        """Have the repository hold chunks where they stay: stored again if they lie in bad packs only.

        `meta`: they are a catalog's. Returns why that can't be, or "".
        """
        reason = ""
        for at in range(0, len(ids), _IDS):
            for chunk_id in await to_thread.run_sync(self._known.absent, ids[at : at + _IDS]):
                try:
                    [data] = await self._fetcher.chunks([chunk_id])
                except ChunkMissing as error:
                    reason = str(error)
                else:
                    await self._send(Run(data, pack_ref(chunk_id, len(data)), meta=meta))
        return reason

    async def _flush(self) -> None:
        for run in self._meta.runs():
            await self._send(run)

    def _lose_part(self, path: bytes, reason: str) -> None:
        self._lost += 1
        if len(self._faults) < _MAX_FAULTS:
            self._faults.append(SourceFault(path, f"lost: {reason}"))

    def _lose(self, directory: bytes, entry: Entry, reason: str) -> None:
        path = b"/" + directory + b"/" + entry.name if directory else b"/" + entry.name
        self._lose_part(path, reason)


def _key(found: tuple[bytes, Entry]) -> tuple[bytes, bytes]:
    return key_of(found[0], found[1].name)


def _ignore(path: bytes, reason: str) -> None:
    """It is told of when the catalog is built."""
