"""Restore: the tree. Walk the catalog, hand files to `restore_files` and all else to the workers; directories last."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from anyio import to_thread

from coffret.engine.errors import Damaged
from coffret.engine.hardlinks import HardLinks
from coffret.engine.restore_files import FileWriter, each_its_own
from coffret.engine.restore_jobs import temporary_name
from coffret.engine.restore_target import existing
from coffret.engine.restore_writer import LOST

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anyio

    from coffret.engine.catalog_reader import Catalog
    from coffret.engine.fetch import Fetcher
    from coffret.engine.filters import PathPatterns
    from coffret.engine.metadata import Meta
    from coffret.engine.openpool import OpenPool
    from coffret.engine.places import Places
    from coffret.engine.records import Entry
    from coffret.engine.restore_report import Report
    from coffret.engine.restore_target import Target

    Faults = list[tuple[bytes, str, int]]

# Nodes are sent to a worker this many at a time, and so many jobs may wait for the workers beside those with slabs.
_NODES, _JOBS_BESIDE_SLABS = 256, 8
# Hard links are made this many at a time.
_LINKS = 1024


class Scope(NamedTuple):
    """What is restored: the path it begins at; what is cut off the front of each path; whether the target gets the
    metadata of that. Paths are without a leading slash."""

    start: bytes
    base: bytes
    named: bool


class TreeRestore:
    """One restore into an open target. `overwrite` and `sparse` as in `RestoreOptions`."""

    def __init__(
        self,
        fetcher: Fetcher,
        catalog: Catalog,
        pool: OpenPool,
        group: anyio.abc.TaskGroup,
        places: Places,
        scope: Scope,
        report: Report,
        *,
        patterns: PathPatterns | None,
        overwrite: str,
        sparse: bool,
    ) -> None:
        self._catalog, self._pool, self._places, self._report = catalog, pool, places, report
        self._jobs = pool.slabs + _JOBS_BESIDE_SLABS
        self._patterns, self._overwrite = patterns, overwrite
        self._scope, self._cut = scope, len(scope.base) + 1 if scope.base else 0
        # Some names may be taken: what is not there at once as a whole is made under another and renamed.
        self._temporary = overwrite != "refuse"
        self._files = FileWriter(
            fetcher, catalog, pool, group, places, report, temporary=self._temporary, sparse=sparse
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
        enter = self._patterns.may_contain if self._patterns is not None else None
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
        patterns = self._patterns
        return patterns is None or patterns.wanted(join(directory, entry.name), stat.S_ISDIR(entry.mode))

    async def _section(self, directory: bytes, entries: Sequence[Entry]) -> None:
        place = directory[self._cut :]
        wanted = [e for e in entries if not stat.S_ISDIR(e.mode)]
        if self._patterns is not None:
            wanted = [e for e in wanted if self._wanted(directory, e)]
        self.matched += len(wanted)
        if self._overwrite == "never":
            await self._note_directories(directory, place, entries)
        if self._overwrite in ("never", "if-changed") and wanted:
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
        meta, _ = await self._files.meta(join(place, entry.name), entry)
        target, rdev = (extra.target, extra.rdev) if extra is not None else (b"", 0)
        temporary = temporary_name() if self._temporary else b""
        self._nodes.append((place, entry.name, temporary, meta, target, rdev))
        if len(self._nodes) >= _NODES:
            await self._flush_nodes()

    async def _note_directories(self, directory: bytes, place: bytes, entries: Sequence[Entry]) -> None:
        """Remember which directories are there before anything is made in them: they are left as they are."""
        directories = [e for e in entries if stat.S_ISDIR(e.mode) and e.name]
        if join(directory, entries[0].name) == self._scope.start and self._scope.start == self._scope.base:
            return  # the target itself
        found = await to_thread.run_sync(lambda: existing(self._places, place, directories, alike=False))
        self._there |= {join(place, name) for name, wrong in found.items() if not wrong}

    async def _leave(self, place: bytes, wanted: list[Entry]) -> list[Entry]:
        """Leave alone what is there already, or looks the same; return the others."""
        alike = self._overwrite == "if-changed"
        kept = await to_thread.run_sync(lambda: existing(self._places, place, wanted, alike=alike))
        for entry in wanted:
            if entry.name not in kept:
                continue
            path = join(place, entry.name)
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
        while self._patterns is not None and place and place not in self._ways:
            self._ways.add(place)
            place = place.rpartition(b"/")[0]

    async def _flush_nodes(self) -> None:
        nodes, self._nodes = self._nodes, []
        if not nodes:
            return
        await self._pool.drain(below=self._jobs)
        job = 0

        def done(faults: Faults) -> None:
            del self._begun[job]
            self._tell(faults, [join(directory, name) for directory, name, *_ in nodes])

        job = self._pool.submit("nodes", nodes, done=done)
        self._begun[job] = nodes

    async def _flush_kept(self) -> None:
        kept, self._kept = self._kept, []
        if kept:
            await self._pool.drain(below=self._jobs)
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
                path = join(directory, entry.name)
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
            path = join(directory, entry.name)
            place = path[self._cut :]
            if not place:  # the target itself
                if not self._scope.named or self._overwrite == "never" or not self._asked(directory, entry):
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
            await self._pool.drain(below=self._jobs)
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


def join(directory: bytes, name: bytes) -> bytes:
    """The path of a name in a directory."""
    return directory + b"/" + name if directory else name


def _linked(entry: Entry) -> bool:
    return entry.extra is not None and entry.extra.nlink > 1
