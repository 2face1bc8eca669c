"""Restore: catalog pages → wanted chunks by pack → ranges fetched → opened and written by workers → metadata."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from anyio import to_thread

from coffret.engine.catalog_reader import Catalog, clean_path, no_such_path
from coffret.engine.errors import CoffretError, Damaged, TargetError
from coffret.engine.hardlinks import HardLinks
from coffret.engine.openpool import OpenPool
from coffret.engine.places import Places
from coffret.engine.restore_files import FileWriter, each_its_own
from coffret.engine.restore_jobs import temporary_name
from coffret.engine.restore_report import Report
from coffret.engine.restore_target import existing, open_target
from coffret.engine.restore_writer import LOST
from coffret.engine.settings import OPEN_SLABS, OPEN_WORKERS, RESTORE_SLAB_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.fetch import Fetcher
    from coffret.engine.filters import PathPatterns
    from coffret.engine.metadata import Meta
    from coffret.engine.progress import Progress
    from coffret.engine.records import Entry
    from coffret.engine.repository import Repository
    from coffret.engine.restore_target import Target
    from coffret.engine.snapshot import Snapshot

    Faults = list[tuple[bytes, str, int]]

# Nodes are sent to a worker this many at a time, and so many jobs may wait for the workers beside those with slabs.
_NODES, _JOBS = 256, OPEN_SLABS + 8
# Hard links are made this many at a time.
_LINKS = 1024


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How to restore. `overwrite` is one of `settings.OVERWRITE`.

    `owner` None: set owners if root, else skip them with a note.
    `workers`: how many processes open and write; None for the number that was measured best.
    """

    overwrite: str = "refuse"
    patterns: PathPatterns | None = None
    owner: bool | None = None
    sparse: bool = False
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class RestoreSummary:
    """What a restore wrote: files, bytes and faults; `kept`: entries that were there and were left as they are."""

    snapshot_id: str
    path: bytes
    target: bytes
    files: int
    size_bytes: int
    errors: int
    duration_s: float
    kept: int = 0


class _Scope(NamedTuple):
    """What is restored: the path it begins at; what is cut off the front of each path; whether the target gets the
    metadata of that. Paths are without a leading slash."""

    start: bytes
    base: bytes
    named: bool


async def restore(
    repository: Repository,
    snapshot: Snapshot,
    path: bytes | None,
    target: bytes,
    options: RestoreOptions,
    progress: Progress,
) -> RestoreSummary:
    """Restore a snapshot, or what lies at `path` in it (absolute), into the directory `target`.

    :raises UsageError: if there is no such path
    :raises TargetError: if the target can't be used, or something would be overwritten
    :raises CoffretError: if the patterns match nothing
    """
    begin = time.perf_counter()
    await repository.commits()
    fetcher = repository.fetcher()
    catalog = Catalog(snapshot.header.catalog, snapshot.header.depth, fetcher.load, lost=progress.fault)
    scope = await _scope(catalog, snapshot, path)
    owner = os.geteuid() == 0 if options.owner is None else options.owner
    if options.patterns is not None:
        _note_idle(options.patterns, scope.start, progress)
    replace = options.overwrite != "refuse"
    opened = await to_thread.run_sync(lambda: open_target(target, replace=replace))
    unused = True
    try:
        if opened.occupied and not replace:
            await _refuse_taken(catalog, scope, opened, options.patterns)
            scope = scope._replace(named=False)
        if not owner and options.owner is None:
            progress.note("owners are not restored, since this is not root")
        progress.phase = "restore"
        if path is None and options.patterns is None:
            progress.files_total, progress.size_total = snapshot.header.counts.files, snapshot.header.counts.size_bytes
        report = Report(progress, scope.base)
        pool = OpenPool(
            repository.secrets,
            repository.id_bytes,
            workers=options.workers or OPEN_WORKERS,
            slabs=OPEN_SLABS,
            slab_bytes=max(RESTORE_SLAB_BYTES, 2 * repository.config.chunker.max_bytes),
            target=opened.fd,
            owner=owner,
            sparse=options.sparse,
            wary=opened.wary,
            unlock=options.overwrite in ("always", "if-changed"),
        )
        unused = await _run(fetcher, catalog, pool, opened, scope, options, report)
    finally:
        await to_thread.run_sync(lambda: opened.close(unused=unused))
    if report.kept:
        progress.note(f"entries kept as they are, since they were there already: {report.kept}")
    if options.patterns is not None and unused and not progress.errors:
        raise CoffretError(
            f"nothing in snapshot {snapshot.short_id} matches the patterns",
            remedy="patterns with a slash begin at the snapshot's root, as in /home/*/notes; others match any name",
        )
    return RestoreSummary(
        snapshot.id,
        path or b"/",
        target,
        progress.files,
        progress.size_bytes,
        progress.errors,
        time.perf_counter() - begin,
        report.kept,
    )


async def _run(
    fetcher: Fetcher,
    catalog: Catalog,
    pool: OpenPool,
    target: Target,
    scope: _Scope,
    options: RestoreOptions,
    report: Report,
) -> bool:
    """Restore into an open target; return whether there was nothing to be restored."""
    places = Places(target.fd, wary=target.wary, unlock=options.overwrite in ("always", "if-changed"))
    work = None
    try:
        async with pool, anyio.create_task_group() as group:
            work = _Restore(fetcher, catalog, pool, group, places, scope, options, report)
            await work.run(target)
    except BaseException:
        if work is not None:
            work.clear()
        raise
    finally:
        if work is not None:
            work.close()
        places.close()
    assert work is not None
    return work.matched == 0


async def _scope(catalog: Catalog, snapshot: Snapshot, path: bytes | None) -> _Scope:
    """A common ancestor of several roots is no more than a place: the target stays as it is."""
    roots = [clean_path(root) for root in snapshot.header.roots]
    start = clean_path(path) if path is not None else (roots[0] if len(roots) == 1 else os.path.commonpath(roots))
    try:
        entry = await catalog.find(start)
    except Damaged:
        if not catalog.survives:
            raise
        return _Scope(start, start, named=False)
    if entry is None:
        raise no_such_path(snapshot.short_id, start)
    base = start if stat.S_ISDIR(entry.mode) else start.rpartition(b"/")[0]
    return _Scope(start, base, named=path is not None or len(roots) == 1)


async def _refuse_taken(catalog: Catalog, scope: _Scope, target: Target, patterns: PathPatterns | None) -> None:
    """See that none of the names that will be restored to the target itself is there.

    :raises TargetError: if one is
    """
    if scope.start != scope.base:
        names = [scope.start.rpartition(b"/")[2]]
    else:
        names = []
        async for entries in catalog.listing(scope.start):
            names += [e.name for e in entries if e.name in target.occupied and _concerned(patterns, scope.start, e)]
            if names:
                break
    for name in names:
        if name in target.occupied:
            raise TargetError(
                f"{os.fsdecode(os.path.join(target.path, name))} is there already",
                remedy="restore into another directory, or say --overwrite always, if-changed or never",
            )


def _concerned(patterns: PathPatterns | None, directory: bytes, entry: Entry) -> bool:
    """Whether an entry will be restored, or something in it may be."""
    if patterns is None:
        return True
    path, is_dir = _join(directory, entry.name), stat.S_ISDIR(entry.mode)
    return patterns.wanted(path, is_dir) or (is_dir and patterns.may_contain(path))


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _note_idle(patterns: PathPatterns, start: bytes, progress: Progress) -> None:
    from coffret.engine.filters import MATCHES_NOTHING

    for pattern in patterns.idle(start):
        progress.note(f"{pattern!r} {MATCHES_NOTHING}")


class _Restore:
    def __init__(
        self,
        fetcher: Fetcher,
        catalog: Catalog,
        pool: OpenPool,
        group: anyio.abc.TaskGroup,
        places: Places,
        scope: _Scope,
        options: RestoreOptions,
        report: Report,
    ) -> None:
        self._catalog, self._pool, self._places, self._options, self._report = catalog, pool, places, options, report
        self._scope, self._cut = scope, len(scope.base) + 1 if scope.base else 0
        # Some names may be taken: what is not there at once as a whole is made under another and renamed.
        self._temporary = options.overwrite != "refuse"
        self._files = FileWriter(
            fetcher, catalog, pool, group, places, report, temporary=self._temporary, sparse=options.sparse
        )
        self._nodes: list[tuple[bytes, bytes, bytes, Meta, bytes, int]] = []
        self._begun: dict[int, list[tuple[bytes, bytes, bytes, Meta, bytes, int]]] = {}
        self._directories: list[tuple[bytes, Meta]] = []
        self._kept: list[tuple[bytes, bytes, Meta]] = []
        self._links = HardLinks()
        # With patterns: the directories on the way to what is wanted. With "never": those that were there.
        self._ways: set[bytes] = set()
        self._there: set[bytes] = set()
        #: How many entries were asked for.
        self.matched = 0

    async def run(self, target: Target) -> None:
        """Files first, then hard links, then directories from the deepest up: each change below sets their times."""
        enter = self._options.patterns.may_contain if self._options.patterns is not None else None
        async for directory, entries in self._catalog.walk(self._scope.start, enter=enter):
            await self._section(directory, entries)
        await self._flush_nodes()
        await self._flush_kept()
        await self._files.settle()
        await self._make_links()
        named = False
        async for directory, entries in self._catalog.walk(self._scope.start, reverse=True, enter=enter):
            named |= await self._set_directories(directory, entries)
        await self._flush_directories()
        await self._pool.drain()
        if not named:
            target.publish()

    def _wanted(self, directory: bytes, entry: Entry) -> bool:
        patterns = self._options.patterns
        return patterns is None or patterns.wanted(_join(directory, entry.name), stat.S_ISDIR(entry.mode))

    async def _section(self, directory: bytes, entries: Sequence[Entry]) -> None:
        place = directory[self._cut :]
        wanted = [e for e in entries if not stat.S_ISDIR(e.mode)]
        if self._options.patterns is not None:
            wanted = [e for e in wanted if self._wanted(directory, e)]
        self.matched += len(wanted)
        if self._options.overwrite == "never":
            await self._note_directories(directory, place, entries)
        if self._options.overwrite in ("never", "if-changed") and wanted:
            wanted = await self._leave(place, wanted)
        if wanted:
            self._lead_to(place)
        # As a rule all are plain files: a coroutine for each would cost more than all else that is done here.
        plain = [entry for entry in wanted if entry.extra is None and stat.S_ISREG(entry.mode)]
        await self._files.add_plain(place, plain)
        for entry in wanted if len(plain) < len(wanted) else ():
            if entry.extra is None and stat.S_ISREG(entry.mode):
                continue
            if _linked(entry) and self._links.seen(place, entry, self._places if self._temporary else None):
                continue
            await self._entry(place, entry)

    async def _entry(self, place: bytes, entry: Entry) -> None:
        if stat.S_ISREG(entry.mode):
            await self._files.add(place, entry)
            return
        extra = entry.extra
        meta, _ = await self._files.meta(_join(place, entry.name), entry)
        target, rdev = (extra.target, extra.rdev) if extra is not None else (b"", 0)
        temporary = temporary_name() if self._temporary else b""
        self._nodes.append((place, entry.name, temporary, meta, target, rdev))
        if len(self._nodes) >= _NODES:
            await self._flush_nodes()

    async def _note_directories(self, directory: bytes, place: bytes, entries: Sequence[Entry]) -> None:
        """Remember which directories are there before anything is made in them: they are left as they are."""
        directories = [e for e in entries if stat.S_ISDIR(e.mode) and e.name]
        if _join(directory, entries[0].name) == self._scope.start and self._scope.start == self._scope.base:
            return  # the target itself
        found = await to_thread.run_sync(lambda: existing(self._places, place, directories, alike=False))
        self._there |= {_join(place, name) for name, wrong in found.items() if not wrong}

    async def _leave(self, place: bytes, wanted: list[Entry]) -> list[Entry]:
        """Leave alone what is there already, or looks the same; return the others."""
        alike = self._options.overwrite == "if-changed"
        kept = await to_thread.run_sync(lambda: existing(self._places, place, wanted, alike=alike))
        for entry in wanted:
            if entry.name not in kept:
                continue
            path = _join(place, entry.name)
            self._report.kept += 1
            if kept[entry.name]:
                self._report.fault(path, kept[entry.name])
            if alike:
                await self._with_meta(path, entry, self._kept, (place, entry.name))
                if _linked(entry):
                    self._links.seen(place, entry, None)
        if len(self._kept) >= _NODES:
            await self._flush_kept()
        return [entry for entry in wanted if entry.name not in kept]

    def _lead_to(self, place: bytes) -> None:
        """Something is restored there: the directories on the way, wanted or not, get their metadata too."""
        while self._options.patterns is not None and place and place not in self._ways:
            self._ways.add(place)
            place = place.rpartition(b"/")[0]

    async def _flush_nodes(self) -> None:
        nodes, self._nodes = self._nodes, []
        if not nodes:
            return
        await self._pool.drain(below=_JOBS)
        job = 0

        def done(faults: Faults) -> None:
            del self._begun[job]
            self._tell(faults, [_join(directory, name) for directory, name, *_ in nodes])

        job = self._pool.submit("nodes", nodes, done=done)
        self._begun[job] = nodes

    async def _flush_kept(self) -> None:
        kept, self._kept = self._kept, []
        if kept:
            await self._pool.drain(below=_JOBS)
            self._pool.submit("kept", kept, done=lambda faults: self._tell(faults, None))

    def _tell(self, faults: Faults, paths: Sequence[bytes] | None) -> None:
        """Report faults, and of these paths those that were restored."""
        if paths is not None:
            faults = each_its_own(faults, paths)
        for path, reason, _ in faults:
            self._report.fault(path, reason)
        if paths and self._report.wants_items:
            lost = {path for path, _, kind in faults if kind == LOST}
            for path in paths:
                if path not in lost:
                    self._report.item(path)

    async def _make_links(self) -> None:
        """Make hard links; where that can't be done, the entry becomes a file of its own."""
        make = self._links.make
        while made := await to_thread.run_sync(lambda: make(self._places, replace=self._temporary, at_most=_LINKS)):
            for directory, entry, reason, apart in made:
                path = _join(directory, entry.name)
                if reason:
                    self._report.fault(path, f"restored as a file of its own: {reason}" if apart else reason)
                if apart:
                    await self._entry(directory, entry)
                elif not reason:
                    self._report.linked(path, entry)
        await self._flush_nodes()
        await self._files.settle()

    async def _set_directories(self, directory: bytes, entries: Sequence[Entry]) -> bool:
        """Send the metadata of directories; return whether the target itself is among them."""
        named = False
        for entry in entries:
            if not stat.S_ISDIR(entry.mode):
                continue
            path = _join(directory, entry.name)
            place = path[self._cut :]
            if not place:  # the target itself
                if not self._scope.named or self._options.overwrite == "never" or not self._asked(directory, entry):
                    continue
                named = True
            elif place in self._there or not (place in self._ways or self._wanted(directory, entry)):
                continue
            else:
                self._lead_to(place.rpartition(b"/")[0])
            self.matched += 1
            await self._with_meta(place, entry, self._directories, (place,))
        if len(self._directories) >= _NODES:
            await self._flush_directories()
            await self._pool.drain(below=_JOBS)
        return named

    def _asked(self, directory: bytes, entry: Entry) -> bool:
        """Whether the target itself is asked for: the last to be seen to, after all that was found in it."""
        return self.matched > 0 or self._wanted(directory, entry)

    async def _with_meta(self, path: bytes, entry: Entry, batch: list[Any], key: tuple[bytes, ...]) -> None:
        """Add an entry's key and metadata to what is to be sent."""
        try:
            batch.append((*key, (await self._files.meta(path, entry))[0]))
        except Damaged as error:
            self._report.fault(path, str(error))

    async def _flush_directories(self) -> None:
        directories, self._directories = self._directories, []
        if directories:
            paths = [path for path, _ in directories]
            # In order: what is below one that may not be entered is set before.
            self._pool.submit("directories", directories, done=lambda faults: self._tell(faults, paths), ordered=True)

    def clear(self) -> None:
        """After the workers were killed: remove what they had begun to write and not finished."""
        self._files.clear()
        for job, number, created in self._pool.marks:
            if job in self._begun and (temporary := self._begun[job][number][2]):
                self._files.remove(self._begun[job][number][0], temporary, created=created)

    def close(self) -> None:
        """Let go of what waits on disk."""
        self._links.close()


def _linked(entry: Entry) -> bool:
    return entry.extra is not None and entry.extra.nlink > 1
