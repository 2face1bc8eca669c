"""Restore: catalog pages → wanted chunks by pack → ranges fetched → opened and written by workers → metadata."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread

from coffret.engine.catalog_reader import Attributes, Catalog
from coffret.engine.errors import ChunkMissing, Damaged, OutOfSpace, TargetError, UsageError
from coffret.engine.fetch import Fetcher, fetch_into
from coffret.engine.hardlinks import HardLinks
from coffret.engine.openpool import OpenPool
from coffret.engine.places import Places
from coffret.engine.progress import Item
from coffret.engine.records import Entry, iter_refs
from coffret.engine.restore_jobs import LargeFile, Window, file_meta
from coffret.engine.settings import OPEN_SLABS, OPEN_WORKERS, RESTORE_SLAB_BYTES, RESTORE_STREAM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coffret.engine.filters import PathPatterns
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

OVERWRITE = ("refuse", "always", "if-changed", "never")
_NO_ATTRIBUTES = Attributes([], b"")
# Nodes are sent to a worker this many at a time.
_NODES = 256
# Small files are located this many at a time: asking the mirror costs a hop of 60 µs or more.
_FILES = 512
_FULL = {os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)}


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How to restore. `overwrite` is one of OVERWRITE; `owner` None: set owners if root, else skip them with a note.

    `workers`: how many processes open and write; None for the number that was measured best.
    """

    overwrite: str = "refuse"
    patterns: PathPatterns | None = None
    owner: bool | None = None
    sparse: bool = False
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class RestoreSummary:
    """What a restore wrote: files, bytes and faults."""

    snapshot_id: str
    path: bytes
    target: bytes
    files: int
    size_bytes: int
    errors: int
    duration_s: float


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
    """
    begin = time.perf_counter()
    await repository.commits()
    fetcher = Fetcher(repository.connector, repository.sealer, repository.mirror, id_key=repository.secrets.id_key)
    catalog = Catalog(snapshot.header.catalog, snapshot.header.depth, fetcher.load)
    start, base, named = await _base(catalog, snapshot, path)
    owner = os.geteuid() == 0 if options.owner is None else options.owner
    if not owner and options.owner is None:
        progress.note("owners are not restored, since this is not root")
    await to_thread.run_sync(_prepare, target, options.overwrite)
    pool = OpenPool(
        repository.secrets,
        repository.id_bytes,
        workers=options.workers or OPEN_WORKERS,
        slabs=OPEN_SLABS,
        slab_bytes=max(RESTORE_SLAB_BYTES, 2 * repository.config.chunker.max_bytes),
        target=os.path.abspath(target),  # noqa: ASYNC240 - reads the current directory, no more
        owner=owner,
        sparse=options.sparse,
        replace=options.overwrite != "refuse",
    )
    progress.phase = "restore"
    if path is None and options.patterns is None:
        progress.files_total, progress.size_total = snapshot.header.counts.files, snapshot.header.counts.size_bytes
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    places = Places(root)
    work = None
    try:
        async with pool, anyio.create_task_group() as group:
            work = _Restore(fetcher, catalog, pool, group, places, start, base, named, options, progress)
            await work.run()
    except BaseException:
        if work is not None:
            work.clear()
        raise
    finally:
        places.close()
        os.close(root)
    return RestoreSummary(
        snapshot.id,
        path or b"/",
        target,
        progress.files,
        progress.size_bytes,
        progress.errors,
        time.perf_counter() - begin,
    )


async def _base(catalog: Catalog, snapshot: Snapshot, path: bytes | None) -> tuple[bytes, bytes, bool]:
    """(where to start, what is cut off the front of each path, whether the target gets the metadata of that).

    Both without a leading slash. A common ancestor of several roots is no more than a place: the target stays as it is.
    """
    roots = [root.strip(b"/") for root in snapshot.header.roots]
    start = path.strip(b"/") if path is not None else (roots[0] if len(roots) == 1 else os.path.commonpath(roots))
    entry = await catalog.find(start)
    if entry is None:
        raise UsageError(
            f"no {os.fsdecode(path or b'/')} in snapshot {snapshot.short_id}",
            remedy=f"see `coffret at REPO ls {snapshot.short_id}` for what is there",
        )
    base = start if stat.S_ISDIR(entry.mode) else start.rpartition(b"/")[0]
    return start, base, path is not None or len(roots) == 1


def _prepare(target: bytes, overwrite: str) -> None:
    try:
        os.makedirs(target, exist_ok=True)
        with os.scandir(target) as found:
            occupied = next(found, None) is not None
    except OSError as error:
        raise TargetError(f"{os.fsdecode(target)}: {error.strerror}", remedy="choose another --to DIR") from None
    if occupied and overwrite == "refuse":
        raise TargetError(
            f"{os.fsdecode(target)} is not empty",
            remedy="restore into an empty directory, or say --overwrite always, if-changed or never",
        )


class _Restore:
    def __init__(
        self,
        fetcher: Fetcher,
        catalog: Catalog,
        pool: OpenPool,
        group: anyio.abc.TaskGroup,
        places: Places,
        start: bytes,
        base: bytes,
        named: bool,
        options: RestoreOptions,
        progress: Progress,
    ) -> None:
        self._fetcher, self._catalog, self._pool, self._group = fetcher, catalog, pool, group
        self._places, self._start, self._options, self._progress = places, start, options, progress
        self._cut = len(base) + 1 if base else 0
        self._base = b"/" + base if base else b""
        self._named = named
        self._window = Window(pool.slab_bytes)
        self._nodes: list[tuple[bytes, bytes, tuple[Any, ...], bytes, int]] = []
        self._files: list[tuple[bytes, Entry]] = []
        self._links = HardLinks()
        self._ways: set[bytes] = set()
        # What workers are at: to be cleared away if they are killed.
        self._begun: dict[int, LargeFile | Window] = {}
        # Some names may be taken: files are made under another and renamed.
        self._temporary = options.overwrite != "refuse"

    async def run(self) -> None:
        """Files first, then hard links, then directories from the deepest up: each change below sets their times."""
        async for directory, entries in self._catalog.walk(self._start):
            await self._section(directory, entries)
        await self._small()
        await self._flush()
        self._flush_nodes()
        await self._pool.drain()
        for fault in await to_thread.run_sync(self._links.make, self._places, self._temporary):
            self._fault(*fault)
        async for directory, entries in self._catalog.walk(self._start, reverse=True):
            await self._directories(directory, entries)
        self._flush_nodes()
        await self._pool.drain()

    def _relative(self, directory: bytes) -> bytes:
        return directory[self._cut :]

    def _wanted(self, directory: bytes, entry: Entry) -> bool:
        patterns = self._options.patterns
        if patterns is None:
            return True
        path = directory + b"/" + entry.name if directory else entry.name
        return patterns.wanted(path, stat.S_ISDIR(entry.mode))

    async def _section(self, directory: bytes, entries: Sequence[Entry]) -> None:
        place = self._relative(directory)
        wanted = [e for e in entries if not stat.S_ISDIR(e.mode) and self._wanted(directory, e)]
        if self._options.overwrite in ("never", "if-changed") and wanted:
            kept = await to_thread.run_sync(_existing, self._places, place, wanted, self._options.overwrite)
            for entry in wanted:
                if self._options.overwrite == "if-changed" and entry.name in kept and _linked(entry):
                    self._links.seen(place, entry, None)
            wanted = [entry for entry in wanted if entry.name not in kept]
        if wanted:
            self._lead_to(place)
        for entry in wanted:
            if _linked(entry) and self._links.seen(place, entry, self._places if self._temporary else None):
                continue
            if not stat.S_ISREG(entry.mode):
                if (node := await self._node(place, entry)) is not None:
                    self._nodes.append(node)
            elif entry.size > RESTORE_STREAM_BYTES or (entry.extra is not None and entry.extra.depth):
                await self._large(place, entry)
            else:
                self._files.append((place, entry))
        if len(self._nodes) >= _NODES:
            self._flush_nodes()
        if len(self._files) >= _FILES:
            await self._small()

    def _lead_to(self, place: bytes) -> None:
        """Something is restored there: the directories on the way, wanted or not, get their metadata too."""
        while self._options.patterns is not None and place and place not in self._ways:
            self._ways.add(place)
            place = place.rpartition(b"/")[0]

    async def _small(self) -> None:
        """Add the files that have come together to the window, which is sent off whenever it is full."""
        files, self._files = self._files, []
        refs = [list(iter_refs(entry.content)) for _, entry in files]
        locations = iter(await self._fetcher.mirror.locate([chunk_id for found in refs for chunk_id, _ in found]))
        for (place, entry), found in zip(files, refs, strict=True):
            chunks = [(chunk_id, length, next(locations)) for chunk_id, length in found]
            path = place + b"/" + entry.name if place else entry.name
            reason = missing(chunks)
            if reason:
                self._fault(path, reason)
                continue
            if (attributes := await self._attributes(path, entry)) is None:
                continue
            if not self._window.fits(chunks):
                await self._flush()
            meta = file_meta(entry, attributes.xattrs)
            self._window.add(place, entry.name, meta, chunks, attributes.extents, temporary=self._temporary)

    async def _attributes(self, path: bytes, entry: Entry) -> Attributes | None:
        """An entry's attributes; None, and a fault, if the chunks they are kept in are damaged."""
        if entry.extra is None:
            return _NO_ATTRIBUTES
        try:
            return await self._catalog.attributes(entry)
        except Damaged as error:
            self._fault(path, str(error))
            return None

    async def _flush(self) -> None:
        """Send the window off: fetch its ranges into a slab, and have a worker open them and write the files."""
        window, self._window = self._window, Window(self._pool.slab_bytes)
        if not window.groups:
            return
        slab = await self._pool.acquire()
        self._begun[id(window)] = window
        self._group.start_soon(self._fetch, window, slab, "files", (window.groups,), partial(self._written, window))

    async def _fetch(
        self, window: Window, slab: int, kind: str, arguments: tuple[Any, ...], done: Callable[[Any], None]
    ) -> None:
        blocks = await fetch_into(self._fetcher, window.blocks, self._pool.view(slab))
        self._pool.submit(kind, blocks, *arguments, slab=slab, done=done)

    def _written(self, window: Window, faults: list[tuple[bytes, str]]) -> None:
        failed = {path for path, _ in faults}
        for path, reason in faults:
            self._fault(path, reason)
        progress = self._progress
        for directory, files in window.groups:
            if not failed and progress.on_item is None:
                progress.files += len(files)
                progress.size_bytes += sum([meta[3] for _, _, meta, _, _ in files])
                continue
            for name, _, meta, *_ in files:
                path = directory + b"/" + name if directory else name
                if path not in failed:
                    self._done(path, meta[3])

    async def _large(self, place: bytes, entry: Entry) -> None:
        """Write a large file in pieces, out of order; it gets its name when all of it is there."""
        path = place + b"/" + entry.name if place else entry.name
        if (attributes := await self._attributes(path, entry)) is None:
            return
        large = LargeFile(place, entry.name, file_meta(entry, attributes.xattrs), attributes.extents)
        try:
            self._begun[id(large)] = large
            await to_thread.run_sync(large.create, self._places, self._options.sparse)
        except OSError as error:
            del self._begun[id(large)]
            self._fault(path, error.strerror or str(error))
            return
        window = Window(self._pool.slab_bytes)
        try:
            async for refs in self._catalog.file_refs(entry):
                found = list(iter_refs(refs))
                locations = await self._fetcher.mirror.locate([chunk_id for chunk_id, _ in found])
                for (chunk_id, length), location in zip(found, locations, strict=True):
                    chunk = [(chunk_id, length, location)]
                    if location is None:
                        raise ChunkMissing(missing(chunk))
                    if not window.fits(chunk) or window.raw_bytes + length > self._pool.slab_bytes:
                        await self._send_piece(large, window)
                        window = Window(self._pool.slab_bytes)
                    large.add(window, chunk_id, length, location)
        except Damaged as error:
            large.reason = str(error)
        await self._send_piece(large, window)
        large.complete = True
        self._finish(large)

    async def _send_piece(self, large: LargeFile, window: Window) -> None:
        writes = large.take()
        if not writes:
            return
        slab = await self._pool.acquire()
        large.unfinished += 1

        def done(faults: list[tuple[bytes, str]]) -> None:
            large.unfinished -= 1
            if faults and not large.reason:
                large.reason = faults[0][1]
            self._finish(large)

        place = (large.directory, large.temporary)
        self._group.start_soon(self._fetch, window, slab, "piece", (place, writes), done)

    def _finish(self, large: LargeFile) -> None:
        if not large.complete or large.unfinished:
            return
        path = large.directory + b"/" + large.name if large.directory else large.name

        def done(faults: list[tuple[bytes, str]]) -> None:
            del self._begun[id(large)]
            for fault in faults:
                self._fault(*fault)
            if not large.reason:
                self._done(path, large.meta[3])

        if large.reason:
            self._fault(path, large.reason)
        self._pool.submit(
            "finish", large.directory, b"" if large.reason else large.name, large.temporary, large.meta, done=done
        )

    async def _node(self, place: bytes, entry: Entry) -> tuple[bytes, bytes, tuple[Any, ...], bytes, int] | None:
        extra = entry.extra
        attributes = await self._attributes(place + b"/" + entry.name if place else entry.name, entry)
        if attributes is None:
            return None
        target, rdev = (extra.target, extra.rdev) if extra is not None else (b"", 0)
        return place, entry.name, file_meta(entry, attributes.xattrs), target, rdev

    async def _directories(self, directory: bytes, entries: Sequence[Entry]) -> None:
        for entry in reversed(entries):
            path = directory + b"/" + entry.name if directory else entry.name
            if not stat.S_ISDIR(entry.mode):
                continue
            place = self._relative(path)
            parent, _, name = place.rpartition(b"/")
            if not place:  # the target itself
                if not self._named:
                    continue
            elif self._wanted(directory, entry):
                self._lead_to(parent)
            elif place not in self._ways:
                continue
            if (node := await self._node(parent, entry)) is not None:
                self._nodes.append((parent, name, *node[2:]))
        if len(self._nodes) >= _NODES:
            self._flush_nodes()
            await self._pool.drain(below=8)

    def _flush_nodes(self) -> None:
        nodes, self._nodes = self._nodes, []
        if not nodes:
            return

        def done(faults: list[tuple[bytes, str]]) -> None:
            failed = {path for path, _ in faults}
            for fault in faults:
                self._fault(*fault)
            for directory, name, _, _, _ in nodes:
                path = directory + b"/" + name if directory else name
                if path not in failed:
                    self._item(path, 0)

        self._pool.submit("nodes", nodes, done=done, ordered=True)

    def clear(self) -> None:
        """After the workers were killed: remove what they had begun to write and not finished."""
        self._links.close()
        for begun in self._begun.values():
            if isinstance(begun, LargeFile):
                self._remove(begun.directory, begun.temporary, None)
                continue
            for directory, files in begun.groups:
                for name, temporary, meta, *_ in files:
                    self._remove(directory, temporary or name, None if temporary else meta[4])

    def _remove(self, directory: bytes, name: bytes, finished_ns: int | None) -> None:
        """Remove a file, but not one that has its final mtime: that is set last."""
        with contextlib.suppress(OSError):
            folder = self._places.enter(directory)
            if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns != finished_ns:
                os.unlink(name, dir_fd=folder)

    def _fault(self, path: bytes, reason: str) -> None:
        if reason in _FULL:  # it would be the same for all that follows
            raise OutOfSpace(f"{os.fsdecode(path)}: {reason}", remedy="choose a target with more space")
        self._progress.fault(path or b".", reason)  # "." is the target itself

    def _done(self, path: bytes, size_bytes: int) -> None:
        progress = self._progress
        progress.files += 1
        progress.size_bytes += size_bytes
        self._item(path, size_bytes)

    def _item(self, path: bytes, size_bytes: int) -> None:
        if self._progress.on_item is not None:
            shown = self._base + b"/" + path if path else self._base or b"/"
            self._progress.on_item(Item(shown, "restored", size_bytes))


def missing(chunks: Sequence[tuple[bytes, int, Any]]) -> str:
    """Why a file can't be restored: its first chunk that is in no pack, or ""."""
    for chunk_id, _, location in chunks:
        if location is None:
            return f"chunk {chunk_id.hex()[:16]} is in no pack"
    return ""


def _linked(entry: Entry) -> bool:
    return entry.extra is not None and entry.extra.nlink > 1


def _existing(places: Places, directory: bytes, entries: Sequence[Entry], policy: str) -> set[bytes]:
    """Names that stay as they are: all that exist, or only those that look the same."""
    kept: set[bytes] = set()
    try:
        folder = places.enter(directory)
    except OSError:  # who writes there will say so, for each file
        return kept
    for entry in entries:
        try:
            status = os.stat(entry.name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            continue
        same = (
            stat.S_IFMT(status.st_mode) == stat.S_IFMT(entry.mode)
            and status.st_mtime_ns == entry.mtime_ns
            and (status.st_size == entry.size or not stat.S_ISREG(entry.mode))
        )
        if policy == "never" or same:
            kept.add(entry.name)
    return kept
