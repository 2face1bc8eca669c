"""Check: verify everything from pack to file, and say which packs, snapshots and files are damaged."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.connectors.errors import InvalidRange, NotFound
from coffret.engine import sealing
from coffret.engine.catalog_reader import Catalog
from coffret.engine.errors import CoffretError, Damaged
from coffret.engine.fetch import Fetcher
from coffret.engine.mirror import attempt_of
from coffret.engine.openpool import OpenPool
from coffret.engine.packfile import pack_name
from coffret.engine.progress import Item
from coffret.engine.records import decode_index, iter_refs
from coffret.engine.settings import CHECK_SLABS, OPEN_WORKERS
from coffret.engine.snapshot import load_commits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.progress import Progress
    from coffret.engine.records import Entry, PackTable
    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

# Catalog pages whose chunks were found whole are not looked at again for the next snapshot; so many are remembered.
_PAGES_REMEMBERED = 1 << 18
# Entries verified at a time: asking the mirror costs a hop of 60 µs or more.
_ENTRIES = 512


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """How deep to look. `fast`: index, catalogs, existence and size of packs; nothing of packs' content.

    `workers`: how many processes verify packs; None for the number that was measured best.
    """

    fast: bool = False
    workers: int | None = None


@dataclass(slots=True)
class CheckSummary:
    """What a check found. `damaged_files` counts (snapshot, path) pairs; each was reported as a fault."""

    packs: int = 0
    snapshots: int = 0
    files: int = 0
    size_bytes: int = 0
    damaged_packs: list[str] = field(default_factory=list)
    damaged_objects: list[str] = field(default_factory=list)
    damaged_snapshots: list[str] = field(default_factory=list)
    damaged_files: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged_packs or self.damaged_objects or self.damaged_snapshots or self.damaged_files)


async def check(
    repository: Repository,
    targets: Sequence[tuple[Snapshot, bytes | None]] | None,
    options: CheckOptions,
    progress: Progress,
) -> CheckSummary:
    """Check the whole repository, or only snapshots (each with a path in it, or None for all of it)."""
    work = _Check(repository, options, progress)
    if targets is None:
        await work.objects()
        await work.packs(None)
        targets = [(snapshot, None) for snapshot in (await repository.commits()).snapshots]
    elif not options.fast:
        await work.packs(await work.needed(targets))
    if all(path is None for _, path in targets):
        progress.files_total = sum(snapshot.header.counts.files for snapshot, _ in targets)
    for snapshot, path in targets:
        await work.snapshot(snapshot, path)
    return work.summary


async def check_packs(repository_connector: Any, progress: Progress) -> CheckSummary:
    """Verify the checksums of all packs by their names: needs no passphrase, finds any altered byte."""
    summary = CheckSummary()
    packs = [info async for info in repository_connector.list("packs/")]
    progress.phase, progress.size_total = "packs", sum(info.size_bytes for info in packs)
    for info in packs:
        data = await repository_connector.get(info.name)
        digest = await to_thread.run_sync(_digest, data)
        summary.packs += 1
        summary.size_bytes += info.size_bytes
        progress.size_bytes += info.size_bytes
        if info.name != pack_name(bytes.fromhex(digest)):
            summary.damaged_packs.append(info.name)
            progress.fault(info.name.encode(), "its bytes are not those of its name")
    return summary


def _digest(data: bytes) -> str:
    return blake3(data).hexdigest()


class _Check:
    def __init__(self, repository: Repository, options: CheckOptions, progress: Progress) -> None:
        self._repository, self._options, self._progress = repository, options, progress
        self._connector, self._sealer = repository.connector, repository.sealer
        self._fetcher = Fetcher(
            repository.connector, repository.sealer, repository.mirror, id_key=repository.secrets.id_key
        )
        self._gets = anyio.CapacityLimiter(repository.connector.capabilities.parallel_gets)
        self.summary = CheckSummary()
        # Blocks that are damaged; -1 stands for the whole pack. Few, or the repository is lost anyway.
        self._bad: set[tuple[bytes, int]] = set()
        self._known_pages: OrderedDict[bytes, None] = OrderedDict()

    def _object_fault(self, name: str, reason: str) -> None:
        self.summary.damaged_objects.append(name)
        self._progress.fault(name.encode(), reason.removeprefix(f"{name}: "))

    async def objects(self) -> None:
        """Verify what is neither pack nor catalog: index objects (as they are read below), snapshots, removals."""
        commits = await load_commits(self._connector, self._sealer)
        for name, reason in commits.damaged:
            self._object_fault(name, reason)
        for prefix, kind in (("removed/", sealing.REMOVED), ("leases/", sealing.LEASE)):
            async for info in self._connector.list(prefix):
                try:
                    self._sealer.open(kind, info.name, await self._connector.get(info.name))
                except Damaged as error:
                    self._object_fault(info.name, str(error))
                except NotFound:
                    continue

    async def packs(self, wanted: set[bytes] | None) -> None:
        """Verify packs: all that the index names, or those wanted. Each against its own table and the index's."""
        self._progress.phase = "packs"
        if self._options.fast:
            await self._sizes()
            return
        pool = OpenPool(
            self._repository.secrets,
            self._repository.id_bytes,
            workers=self._options.workers or OPEN_WORKERS,
            slabs=CHECK_SLABS,
            slab_bytes=self._repository.config.pack_bytes,
        )
        names = await self._index()
        self._progress.size_total = await self._stored_bytes(wanted)
        seen: set[bytes] = set()
        async with pool, anyio.create_task_group() as group:
            for name in names:
                for table in await self._tables(name):
                    if table.pack in seen or (wanted is not None and table.pack not in wanted):
                        continue
                    seen.add(table.pack)
                    slab = await pool.acquire()
                    group.start_soon(self._pack, pool, slab, table)
        self.summary.packs = len(seen)

    async def _stored_bytes(self, wanted: set[bytes] | None) -> int:
        """The size of all packs there are, or of those wanted."""
        names = None if wanted is None else {pack_name(pack) for pack in wanted}
        packs = self._connector.list("packs/")
        return sum([info.size_bytes async for info in packs if names is None or info.name in names])

    async def _index(self) -> list[str]:
        """The index objects that count: what an attempt that was taken for dead had put is void."""
        revoked = (await self._repository.commits()).revoked
        names = [info.name async for info in self._connector.list("index/")]
        return [name for name in names if attempt_of(name) not in revoked]

    async def _tables(self, name: str) -> list[PackTable]:
        try:
            _, payload = self._sealer.open(sealing.INDEX, name, await self._connector.get(name))
            return decode_index(payload).packs
        except NotFound:
            return []  # merged by maintenance meanwhile
        except (Damaged, msgspec.MsgspecError) as error:
            self._object_fault(name, str(error))
            return []

    async def _pack(self, pool: OpenPool, slab: int, table: PackTable) -> None:
        """Fetch a pack into a slab and have a worker verify it."""
        name, pack = pack_name(table.pack), table.pack
        try:
            info = await self._connector.stat(name)
            if info.size_bytes != table.size_bytes:
                raise InvalidRange(f"{info.size_bytes} bytes instead of {table.size_bytes}")
            async with self._gets:
                await self._connector.get_into(name, 0, pool.view(slab)[: table.size_bytes])
        except (NotFound, InvalidRange) as error:
            pool.release(slab)
            self._pack_faults(pack, [(-1, str(error))])
            return
        self._progress.size_bytes += table.size_bytes
        blocks = [(b.offset, b.stored_bytes, b.raw_bytes, b.codec, b.refs) for b in table.blocks]
        done = anyio.Event()

        def verified(faults: list[tuple[int, str]]) -> None:
            self._pack_faults(pack, faults)
            done.set()

        pool.submit("pack", table.size_bytes, name, blocks, slab=slab, done=verified)
        await done.wait()

    def _pack_faults(self, pack: bytes, faults: list[tuple[int, str]]) -> None:
        if not faults:
            return
        name = pack_name(pack)
        self.summary.damaged_packs.append(name)
        for offset, reason in faults:
            self._bad.add((pack, offset))
            where = name if offset < 0 else f"{name} at {offset}"
            self._progress.fault(where.encode(), reason)

    async def _sizes(self) -> None:
        """Compare the packs there are with those that the index objects name, which are read anew."""
        found = {}
        async for info in self._connector.list("packs/"):
            found[info.name] = info.size_bytes
        seen: set[bytes] = set()
        for name in await self._index():
            for table in await self._tables(name):
                if table.pack in seen:
                    continue
                seen.add(table.pack)
                size_bytes = found.get(pack_name(table.pack))
                if size_bytes is None:
                    self._pack_faults(table.pack, [(-1, "the pack is missing")])
                elif size_bytes != table.size_bytes:
                    self._pack_faults(table.pack, [(-1, f"{size_bytes} bytes instead of {table.size_bytes}")])
        self.summary.packs = len(found)

    async def needed(self, targets: Sequence[tuple[Snapshot, bytes | None]]) -> set[bytes]:
        """The packs that hold the catalogs and files of some snapshots."""
        packs: set[bytes] = set()
        for snapshot, path in targets:
            catalog = self._catalog(snapshot)
            try:
                async for _, entries in catalog.walk((path or b"").strip(b"/")):
                    packs |= await self._holding(b"".join(entry.content for entry in entries))
                    for entry in entries:
                        if entry.extra is not None and entry.extra.depth:
                            with suppress(CoffretError):  # reported by `snapshot`, as are those below
                                async for refs in catalog.file_refs(entry):
                                    packs |= await self._holding(refs)
            except CoffretError:
                continue
        return packs

    async def _holding(self, refs: bytes) -> set[bytes]:
        """The packs in which chunks lie."""
        ids = [chunk_id for chunk_id, _ in iter_refs(refs)]
        return {found.pack for found in await self._repository.mirror.locate(ids) if found}

    def _catalog(self, snapshot: Snapshot) -> Catalog:
        return Catalog(snapshot.header.catalog, snapshot.header.depth, self._fetcher.load)

    async def snapshot(self, snapshot: Snapshot, path: bytes | None) -> None:
        """Verify that every file of a snapshot has all its chunks, whole."""
        self._progress.phase = "files"
        self._progress.subject = snapshot.short_id
        self.summary.snapshots += 1
        before = self.summary.damaged_files
        catalog = self._catalog(snapshot)
        start = (path or b"").strip(b"/")
        try:
            if await catalog.find(start) is None:
                raise Damaged(f"no {os.fsdecode(path or b'/')} in snapshot {snapshot.short_id}")
            if start:
                await self._subtree(snapshot, catalog, start)
            else:
                await self._pages(snapshot, catalog)
        except CoffretError as error:
            self.summary.damaged_snapshots.append(snapshot.id)
            self._progress.fault(snapshot.id.encode(), str(error))
            return
        if self.summary.damaged_files > before:
            self.summary.damaged_snapshots.append(snapshot.id)

    async def _subtree(self, snapshot: Snapshot, catalog: Catalog, start: bytes) -> None:
        found: list[tuple[bytes, Entry]] = []
        async for directory, entries in catalog.walk(start):
            found += [(directory, entry) for entry in entries]
            if len(found) >= _ENTRIES:
                await self._entries(snapshot, catalog, found)
                found = []
        await self._entries(snapshot, catalog, found)

    async def _pages(self, snapshot: Snapshot, catalog: Catalog) -> None:
        """All of a catalog; pages that another snapshot has too, and that were found whole there, are only counted."""
        async for page, sections in catalog.pages():
            known = page.ref in self._known_pages
            if known and self._progress.on_item is None:
                self.summary.files += page.files
                self._progress.files += page.files
                continue
            before = self.summary.damaged_files
            found = [(section.directory, entry) for section in sections for entry in section.entries]
            await self._entries(snapshot, catalog, found)
            if self.summary.damaged_files == before:
                self._known_pages[page.ref] = None
                if len(self._known_pages) > _PAGES_REMEMBERED:
                    self._known_pages.popitem(last=False)

    async def _entries(self, snapshot: Snapshot, catalog: Catalog, entries: list[tuple[bytes, Entry]]) -> None:
        """Verify entries, each given with its directory: all their chunks are there, whole."""
        ids: list[bytes] = []
        lengths: list[int] = []
        counts = []
        for _, entry in entries:
            found = [] if entry.extra is not None and entry.extra.depth else list(iter_refs(entry.content))
            ids += [chunk_id for chunk_id, _ in found]
            lengths += [length for _, length in found]
            counts.append(len(found))
        located = await self._repository.mirror.locate(ids)
        bad, at = self._bad, 0
        for (directory, entry), count in zip(entries, counts, strict=True):
            reason = ""
            for location, length in zip(located[at : at + count], lengths[at : at + count], strict=True):
                if location is None or location.length != length:
                    reason = "a chunk is in no pack"
                elif bad and ((location.pack, location.offset) in bad or (location.pack, -1) in bad):
                    reason = f"a chunk lies in a damaged block of {pack_name(location.pack)}"
            at += count
            if entry.extra is not None:
                reason = reason or await self._lists(catalog, entry)
            self._tell(snapshot, directory, entry, reason)

    async def _lists(self, catalog: Catalog, entry: Entry) -> str:
        """The chunk lists of a large file, and attributes that have chunks of their own."""
        try:
            await catalog.attributes(entry)
            if entry.extra is None or not entry.extra.depth:
                return ""
            total = 0
            async for refs in catalog.file_refs(entry):
                found = list(iter_refs(refs))
                for (_, length), location in zip(
                    found, await self._repository.mirror.locate([chunk_id for chunk_id, _ in found]), strict=True
                ):
                    total += length
                    if location is None or location.length != length:
                        return "a chunk is in no pack"
                    if (location.pack, location.offset) in self._bad or (location.pack, -1) in self._bad:
                        return f"a chunk lies in a damaged block of {pack_name(location.pack)}"
        except CoffretError as error:
            return str(error)
        return ""

    def _tell(self, snapshot: Snapshot, directory: bytes, entry: Entry, reason: str) -> None:
        path = b"/" + directory + b"/" + entry.name if directory else b"/" + entry.name
        if stat.S_ISREG(entry.mode):
            self.summary.files += 1
            self._progress.files += 1
        if reason:
            self.summary.damaged_files += 1
            self._progress.fault(snapshot.short_id.encode() + b":" + path, reason)
        elif self._progress.on_item is not None:
            self._progress.on_item(Item(path, "verified", entry.size))
