"""Check: verify everything from pack to file, and say which packs, snapshots and files are damaged."""

from __future__ import annotations

import stat
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.connectors.errors import ConnectorError, NotFound
from coffret.engine.attempt import find_bad_packs
from coffret.engine.catalog_reader import Catalog, clean_path, content_length, no_such_path
from coffret.engine.catalog_walk import last_key_of
from coffret.engine.check_damage import CheckSummary, Damage
from coffret.engine.check_objects import check_objects
from coffret.engine.check_packs import PackCheck
from coffret.engine.errors import CoffretError, Damaged
from coffret.engine.fetch import Fetcher, unreadable
from coffret.engine.objects import list_objects
from coffret.engine.packfile import pack_name
from coffret.engine.progress import Item, Progress
from coffret.engine.records import iter_refs
from coffret.engine.snapshot import removal_name
from coffret.engine.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coffret.connectors.base import Connector
    from coffret.engine.catalog import Key
    from coffret.engine.check_subset import Subset
    from coffret.engine.mirror import Mirror
    from coffret.engine.records import Entry, PageRef
    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

    Targets = Sequence[tuple[Snapshot, bytes | None]]

__all__ = ["CheckOptions", "CheckSummary", "check", "check_packs"]

# Catalog pages whose files were found whole are not read again for the next snapshot; so many are remembered (some 300
# bytes each, for 256 entries).
_PAGES_REMEMBERED = 1 << 16
# How often the display learns how far the files are (s).
_SHOW_S = 0.2
# Entries verified at a time: asking the mirror costs a hop of 60 µs or more.
_ENTRIES = 512


class CheckOptions(msgspec.Struct, frozen=True):
    """How deep to look. `fast`: index, catalogs, existence and size of packs; nothing of packs' content.

    `subset`: the packs whose content is looked at; None for all. `workers`: how many processes verify packs; None for
    the number that was measured best.
    """

    fast: bool = False
    subset: Subset | None = None
    workers: int | None = None


async def check(
    repository: Repository, targets: Targets | None, options: CheckOptions, progress: Progress
) -> CheckSummary:
    """Check the whole repository, or only snapshots (each with a path in it, or None for all of it).

    :raises UsageError: if there is no such path
    :raises CoffretError, ConnectorError: if the storage can't be asked, possibly in an ExceptionGroup
    """
    work = Checking(repository, options, progress)
    try:
        await _check(repository, work, targets, progress)
    finally:
        # The next backup stores again what lies in damaged packs alone.
        bad, whole = work.damage.packs, work.packs.whole
        if bad or not whole.isdisjoint(repository.mirror.bad_packs):
            await repository.mirror.judge(bad, whole)
    return work.damage.summary


async def _check(repository: Repository, work: Checking, targets: Targets | None, progress: Progress) -> None:
    commits = await repository.commits()
    work.damage.summary.missing_snapshots += [*repository.rollback.gone, *repository.rollback.back]
    if targets is None:
        targets = [(snapshot, None) for snapshot in commits.snapshots]
        await check_objects(repository, work.damage, progress)
        ahead = await work.packs_and_files(targets)
        if (unnamed := work.packs.unnamed())[0]:
            progress.note(
                f"packs that no index object names: {unnamed[0]}, of {format_size(unnamed[1])}; a backup at work, "
                "or one that was interrupted, has put them; if the index was lost, `coffret repair index` names them"
            )
        if ahead is not None:
            work.take_over(ahead)
            return
    else:
        targets = [(snapshot, path if path is None else clean_path(path)) for snapshot, path in targets]
        # What is missing is sought elsewhere at once: it matters if there is no other.
        await find_bad_packs(repository.connector, repository.mirror)
        await work.paths(targets)
        await work.needed_packs(targets)
    if all(path is None for _, path in targets):
        progress.files_total = sum(snapshot.header.counts.files for snapshot, _ in targets)
    await work.snapshots(targets)


async def check_packs(connector: Connector, progress: Progress, subset: Subset | None = None) -> CheckSummary:
    """Verify the checksums of all packs, or of a subset, by their names.

    Needs no passphrase, and finds any altered byte.
    """
    summary = CheckSummary()
    packs = await list_objects(connector, "packs/")
    if subset is not None:
        chosen = subset.choose({info.name: info.size_bytes for info in packs})
        packs = [info for info in packs if info.name in chosen]
    progress.phase, progress.size_total = "packs", sum(info.size_bytes for info in packs)
    for info in packs:
        summary.packs += 1
        summary.packs_read += 1
        summary.size_bytes += info.size_bytes
        progress.size_bytes += info.size_bytes
        try:
            digest = await to_thread.run_sync(_digest, await connector.get(info.name))
            reason = "" if info.name == pack_name(digest) else "its bytes are not those of its name"
        except ConnectorError as error:
            reason = unreadable(info.name, error).removeprefix(f"{info.name} ")
        if reason:
            summary.damaged_packs.append(info.name)
            progress.fault(info.name.encode(), reason)
    return summary


def _digest(data: bytes) -> bytes:
    return blake3(data).digest()


class _Removed(Exception):
    """A snapshot was removed while it was checked."""


class Checking:
    """A check at work; what it finds adds up in `damage`."""

    def __init__(
        self,
        repository: Repository,
        options: CheckOptions,
        progress: Progress,
        gets: anyio.CapacityLimiter | None = None,
    ) -> None:
        self._repository, self._options, self._progress = repository, options, progress
        self.damage = Damage(progress)
        # Of packs, and of catalogs meanwhile.
        self._gets = gets or anyio.CapacityLimiter(repository.connector.capabilities.parallel_gets)
        self.packs = PackCheck(
            repository,
            self.damage,
            progress,
            fast=options.fast,
            subset=options.subset,
            workers=options.workers,
            gets=self._gets,
        )
        # And the last key of each.
        self._known_pages: OrderedDict[PageRef, Key] = OrderedDict()
        self.look(repository.mirror)

    async def packs_and_files(self, targets: Targets) -> CheckSummary | None:
        """Verify all packs, and meanwhile in silence the files of snapshots as if no pack were damaged.

        Returns what was found of the files if that is how it is; else they are to be verified anew, and to be told of.
        """
        ahead = Checking(self._repository, self._options, Progress(), self._gets)
        well = False

        async def walk() -> None:
            nonlocal well
            with suppress(CoffretError, ConnectorError):
                await ahead.snapshots(targets)
                well = ahead.damage.summary.clean

        async def show() -> None:
            """Once the packs are done: how far the files are."""
            self._progress.phase = "files"
            self._progress.files_total = sum(snapshot.header.counts.files for snapshot, _ in targets)
            while True:
                self._progress.files = ahead._progress.files
                await anyio.sleep(_SHOW_S)

        async with anyio.create_task_group() as shown:
            async with anyio.create_task_group() as group:
                # Who wants to see each file is to see it once.
                if self._progress.on_item is None and self.damage.summary.clean:
                    group.start_soon(walk)
                await self.packs.run(None)
                if not self.damage.summary.clean:
                    group.cancel_scope.cancel()
                elif self._progress.on_item is None:
                    shown.start_soon(show)
            shown.cancel_scope.cancel()
        self._progress.files = 0
        return ahead.damage.summary if well and self.damage.summary.clean else None

    def take_over(self, found: CheckSummary) -> None:
        """Tell of files what was found by another, all of it good."""
        summary, progress = self.damage.summary, self._progress
        progress.phase, progress.files, progress.files_total = "files", found.files, found.files
        summary.snapshots, summary.files = found.snapshots, found.files

    def look(self, mirror: Mirror) -> None:
        """Go by this view of the index."""
        repository = self._repository
        self._mirror = mirror
        self._fetcher = Fetcher(
            repository.connector, repository.sealer, mirror, id_key=repository.secrets.id_key, gets=self._gets
        )

    def _catalog(self, snapshot: Snapshot, lost: Callable[[bytes, str], None]) -> Catalog:
        return Catalog(snapshot.header.catalog, snapshot.header.depth, self._fetcher.load, lost=lost)

    async def paths(self, targets: Targets) -> None:
        """See that what is to be checked is in the snapshots; what can't be read is reported later.

        :raises UsageError: if it is not
        """
        for snapshot, path in targets:
            with suppress(Damaged):
                if path and await self._catalog(snapshot, _ignore).find(path) is None:
                    raise no_such_path(snapshot.short_id, path)

    async def needed_packs(self, targets: Targets) -> None:
        """Verify the packs that hold the catalogs and files of some snapshots; where there is damage, other copies."""
        looked_at: frozenset[bytes] = frozenset()
        while not (wanted := await self._needed(targets)) <= looked_at:
            looked_at |= wanted
            await self.packs.run(wanted)
            if not (self.damage.packs or self.damage.index):
                return
            self.look(await self.packs.view())

    async def _needed(self, targets: Targets) -> frozenset[bytes]:
        packs: set[bytes] = set()
        for snapshot, path in targets:
            packs |= await self._holding(snapshot.header.catalog)
            catalog = self._catalog(snapshot, _ignore)
            with suppress(CoffretError):  # reported by `_snapshot`, as are those below
                async for _, entries in catalog.walk(path or b""):
                    packs |= await self._holding(b"".join(entry.content for entry in entries))
                    for entry in entries:
                        if entry.extra is not None and entry.extra.depth:
                            with suppress(CoffretError):
                                async for refs in catalog.file_refs(entry):
                                    packs |= await self._holding(refs)
        return frozenset(packs)

    async def _holding(self, refs: bytes) -> set[bytes]:
        """The packs in which chunks lie."""
        ids = [chunk_id for chunk_id, _ in iter_refs(refs)]
        return {found.pack for found in await self._mirror.locate(ids, avoid=self.damage.packs) if found}

    async def snapshots(self, targets: Targets) -> None:
        """Verify that every file of snapshots has all its chunks, whole, by what is in the repository now."""
        self.look(await self.packs.view())
        for snapshot, path in targets:
            await self._snapshot(snapshot, path or b"")

    async def _snapshot(self, snapshot: Snapshot, start: bytes) -> None:
        self._progress.phase = "files"
        self._progress.subject = snapshot.short_id
        summary = self.damage.summary
        before = summary.damaged_files
        try:
            lost = await self._walk(snapshot, start)
        except _Removed:
            self._progress.note(f"{snapshot.short_id} was removed meanwhile")
            return
        for what, reason in lost:
            self._progress.fault(what, reason)
        summary.snapshots += 1
        if lost or summary.damaged_files > before:
            summary.damaged_snapshots.append(snapshot.id)

    async def _walk(self, snapshot: Snapshot, start: bytes) -> list[tuple[bytes, str]]:
        """Verify the entries of a snapshot; return which parts of its catalog are lost, and why.

        :raises _Removed: if something is missing, and that is why
        """
        lost: list[tuple[bytes, str]] = []
        prefix = snapshot.short_id.encode() + b":"
        catalog = self._catalog(snapshot, lambda path, reason: lost.append((prefix + path, reason)))
        try:
            await (self._subtree(snapshot, catalog, start) if start else self._pages(snapshot, catalog))
        except CoffretError as error:
            lost.append((snapshot.id.encode(), str(error)))
        if lost:
            await self._see_to_it(snapshot)
        return lost

    async def _see_to_it(self, snapshot: Snapshot) -> None:
        """That a snapshot of which something is missing was not removed meanwhile: then maintenance may have swept it.

        :raises _Removed: if it was
        """
        with suppress(NotFound):
            await self._repository.connector.stat(removal_name(snapshot.header.snapshot_id, snapshot.attempt))
            raise _Removed

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
        summary, verbose = self.damage.summary, self._progress.on_item is not None
        async for page, sections in catalog.pages(known=None if verbose else self._known_pages.get):
            if not sections:
                summary.files += page.files
                self._progress.files += page.files
                continue
            before = summary.damaged_files
            found = [(section.directory, entry) for section in sections for entry in section.entries]
            await self._entries(snapshot, catalog, found)
            if summary.damaged_files == before:
                self._known_pages[page] = last_key_of(sections)
                if len(self._known_pages) > _PAGES_REMEMBERED:
                    self._known_pages.popitem(last=False)

    async def _entries(self, snapshot: Snapshot, catalog: Catalog, entries: list[tuple[bytes, Entry]]) -> None:
        """Verify entries, each given with its directory, and tell of them."""
        reasons = await self.reasons(catalog, [entry for _, entry in entries])
        if any(reasons):
            await self._see_to_it(snapshot)
        for (directory, entry), reason in zip(entries, reasons, strict=True):
            self._tell(snapshot, directory, entry, reason)

    async def reasons(self, catalog: Catalog, entries: Sequence[Entry]) -> list[str]:
        """Why each entry is not whole, or "": all its chunks are there, whole, and as long as the file."""
        refs = [list(iter_refs(entry.content)) if _inline(entry) else [] for entry in entries]
        ids = [chunk_id for found in refs for chunk_id, _ in found]
        locations = iter(await self._mirror.locate(ids, avoid=self.damage.packs))
        reasons = []
        for entry, found in zip(entries, refs, strict=True):
            reason, total = "", 0
            for chunk_id, length in found:
                total += length
                location = next(locations)
                if location is None or location.length != length or self.damage.of(location):
                    reason = await self._elsewhere(chunk_id, length) or reason
            if entry.extra is not None:
                reason = reason or await self._rest(catalog, entry, total)
            elif total != entry.size and stat.S_ISREG(entry.mode):
                reason = reason or "its chunks are not those of a file of its size"
            reasons.append(reason)
        return reasons

    async def _elsewhere(self, chunk_id: bytes, length: int) -> str:
        """Why a chunk can't be had, or "": it must be whole in one place, whichever."""
        reason = "a chunk is in no pack"
        for each in await self._mirror.locate_all(chunk_id):
            if each.length == length:
                reason = self.damage.of(each)
                if not reason:
                    return ""
        return reason

    async def _rest(self, catalog: Catalog, entry: Entry, total: int) -> str:
        """What is wrong with attributes, the chunk list of a large file, and the sum of its chunks; or ""."""
        try:
            attributes = await catalog.attributes(entry)
            if _inline(entry):
                wrong = stat.S_ISREG(entry.mode) and total != content_length(entry, attributes.extents)
                return "its chunks are not those of a file of its size" if wrong else ""
            async for refs in catalog.file_refs(entry):
                found = list(iter_refs(refs))
                located = await self._mirror.locate([chunk_id for chunk_id, _ in found], avoid=self.damage.packs)
                for (chunk_id, length), location in zip(found, located, strict=True):
                    bad = location is None or location.length != length or self.damage.of(location)
                    if bad and (reason := await self._elsewhere(chunk_id, length)):
                        return reason
        except CoffretError as error:
            return str(error)
        return ""

    def _tell(self, snapshot: Snapshot, directory: bytes, entry: Entry, reason: str) -> None:
        path = b"/" + directory + b"/" + entry.name if directory else b"/" + entry.name
        if stat.S_ISREG(entry.mode):
            self.damage.summary.files += 1
            self._progress.files += 1
        if reason:
            self.damage.summary.damaged_files += 1
            self._progress.fault(snapshot.short_id.encode() + b":" + path, reason)
        elif self._progress.on_item is not None:
            self._progress.on_item(Item(path, "verified", entry.size))


def _inline(entry: Entry) -> bool:
    """Whether an entry names its chunks itself."""
    return entry.extra is None or not entry.extra.depth


def _ignore(path: bytes, reason: str) -> None:
    """What is damaged is reported when it is checked."""
