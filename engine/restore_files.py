"""Restore the content of regular files: windows of small ones, pieces of large ones, other copies of what is bad."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from anyio.lowlevel import checkpoint

from coffret.engine.catalog_reader import content_length
from coffret.engine.errors import Damaged
from coffret.engine.fetch import fetch_into
from coffret.engine.metadata import without_xattrs
from coffret.engine.records import REF_BYTES, iter_refs
from coffret.engine.restore_copies import Copies, Failed, Part, unlocated
from coffret.engine.restore_jobs import LargeFile, Window, file_meta, is_whole
from coffret.engine.restore_writer import KEPT, LOST
from coffret.engine.settings import RESTORE_STREAM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.abc import TaskGroup

    from coffret.engine.catalog_reader import Catalog
    from coffret.engine.fetch import Fetcher
    from coffret.engine.metadata import Meta
    from coffret.engine.openpool import OpenPool
    from coffret.engine.places import Places
    from coffret.engine.records import Entry
    from coffret.engine.restore_copies import Spot
    from coffret.engine.restore_jobs import Chunk
    from coffret.engine.restore_report import Report

    Faults = list[tuple[bytes, str, int]]

_NO_XATTRS: list[tuple[bytes, bytes]] = []
# Small files are located this many at a time, some windows' worth, so that blocks which two windows need are few: with
# 512 a third more was opened than there is, so 7 %. And other copies are sought when so many files have failed.
_FILES, _FAILED = 8192, 512


class FileWriter:
    """Has workers write files. `temporary`: names may be taken, so files are made under others and renamed."""

    def __init__(
        self,
        fetcher: Fetcher,
        catalog: Catalog,
        pool: OpenPool,
        group: TaskGroup,
        places: Places,
        report: Report,
        *,
        temporary: bool,
        sparse: bool,
    ) -> None:
        self._fetcher, self._catalog, self._pool, self._group = fetcher, catalog, pool, group
        self._places, self._report = places, report
        self._temporary, self._sparse = temporary, sparse
        self._files: list[tuple[bytes, Entry]] = []
        self._window = Window(pool.slab_bytes)
        # What workers are at, windows by job: to be cleared away if they are killed.
        self._windows: dict[int, Window] = {}
        self._large: dict[int, LargeFile] = {}
        # What another copy is to be found for; of files in windows where their chunks were sought before.
        self._failed: list[Failed] = []
        self._parts: list[Part] = []
        self._tried: dict[bytes, frozenset[Spot]] = {}
        self._copies = Copies(fetcher.mirror, pool.slab_bytes)

    async def add_plain(self, place: bytes, entries: Sequence[Entry]) -> None:
        """Restore regular files of one directory that have nothing but content, some time."""
        for entry in entries:
            if entry.size > RESTORE_STREAM_BYTES:
                await self._write_large(place, entry)
            else:
                self._files.append((place, entry))
        await self._go_on()

    async def add(self, place: bytes, entry: Entry) -> None:
        """Restore a regular file, some time."""
        if entry.size > RESTORE_STREAM_BYTES or (entry.extra is not None and entry.extra.depth):
            await self._write_large(place, entry)
            return
        self._files.append((place, entry))
        await self._go_on()

    async def _go_on(self) -> None:
        if len(self._files) >= _FILES:
            await self._locate()
        if len(self._failed) + len(self._parts) >= _FAILED:
            await self._retry()

    async def settle(self) -> None:
        """Return when all files are written, or known not to be had."""
        while True:
            await self._locate()
            await self._flush()
            await self._pool.drain()
            if not self._failed and not self._parts:
                return
            await self._retry()

    async def meta(self, path: bytes, entry: Entry) -> tuple[Meta, bytes]:
        """An entry's metadata and extents; without attributes, which is a fault, if the chunks of these are damaged.

        :raises Damaged: if its extents can't be had
        """
        if entry.extra is None:
            return file_meta(entry, []), b""
        try:
            attributes = await self._catalog.attributes(entry)
            return file_meta(entry, attributes.xattrs), attributes.extents
        except Damaged as error:
            extents = await self._catalog.extents(entry)
            self._report.fault(path, f"its extended attributes can't be read: {error}")
            return without_xattrs(file_meta(entry, [])), extents

    # Small files ------------------------------------------------------------------------------------------------------

    async def _locate(self) -> None:
        """Add the files that have come together to windows, which are sent off as they become full."""
        files, self._files = self._files, []
        refs = list(iter_refs(b"".join([entry.content for _, entry in files])))
        locations = await self._fetcher.mirror.locate([chunk_id for chunk_id, _ in refs])
        every = [(chunk_id, length, found) for (chunk_id, length), found in zip(refs, locations, strict=True)]
        located: list[tuple[bytes, int, int, bytes, Entry, Meta, Sequence[Chunk], bytes]] = []
        end = 0
        for number, (place, entry) in enumerate(files):
            begin, end = end, end + len(entry.content) // REF_BYTES
            chunks: Sequence[Chunk] = every[begin:end]
            extents = b""
            if entry.extra is None and is_whole(entry, chunks):
                meta: Meta = (entry.mode, entry.uid, entry.gid, entry.size, entry.mtime_ns, _NO_XATTRS)
            else:
                try:
                    meta, extents, chunks = await self._look_closer(place, entry, chunks)
                except Damaged as error:
                    self._report.fault(_path(place, entry.name), str(error))
                    continue
            first = chunks[0][2] if chunks else None
            pack, offset = (first.pack, first.offset) if first is not None else (b"", 0)
            located.append((pack, offset, number, place, entry, meta, chunks, extents))
        # By blocks, since one that two windows need is opened twice: a backup fills them as its workers come to read,
        # so that neighbours among files are neighbours among blocks only by and large.
        located.sort()
        for _, _, _, place, entry, meta, chunks, extents in located:
            fits = self._window.take(place, entry.name, meta, chunks, extents, temporary=self._temporary)
            if not fits and not await self._take(place, entry.name, meta, chunks, extents):
                await self._write_large(place, entry)

    async def _look_closer(
        self, place: bytes, entry: Entry, chunks: Sequence[Chunk]
    ) -> tuple[Meta, bytes, Sequence[Chunk]]:
        """What to write of a file that has more than content, or whose chunks are not where they were sought first.

        :raises Damaged: if it can't be had
        """
        meta, extents = await self.meta(_path(place, entry.name), entry)
        if sum([length for _, length, _ in chunks]) != content_length(entry, extents):
            raise Damaged("its chunks are not those of a file of its size")
        if any(location is None or location.length != length for _, length, location in chunks):
            refs = [(chunk_id, length) for chunk_id, length, _ in chunks]
            chunks = await self._copies.others(refs, frozenset()) or unlocated(refs)
        return meta, extents, chunks

    async def _take(self, place: bytes, name: bytes, meta: Meta, chunks: Sequence[Chunk], extents: bytes) -> bool:
        """Add a file to the window, sending off what is in it if it is full; False if it fits into none."""
        if not self._window.take(place, name, meta, chunks, extents, temporary=self._temporary):
            await self._flush()
            return self._window.take(place, name, meta, chunks, extents, temporary=self._temporary)
        return True

    async def _flush(self) -> None:
        """Send the window off: fetch its ranges into a slab, and have a worker open them and write the files."""
        window, self._window = self._window, Window(self._pool.slab_bytes)
        if not window.groups:
            return
        slab = await self._pool.acquire()
        self._group.start_soon(self._send_window, window, slab)
        await checkpoint()  # so that it is on its way while others are located

    async def _send_window(self, window: Window, slab: int) -> None:
        blocks = await fetch_into(self._fetcher, window.blocks, self._pool.view(slab))
        job = 0

        def done(faults: Faults) -> None:
            del self._windows[job]
            self._written(window, faults)

        job = self._pool.submit("files", blocks, window.groups, slab=slab, done=done)
        self._windows[job] = window

    def _written(self, window: Window, faults: Faults) -> None:
        if not faults and not self._report.wants_items and not self._tried:
            self._report.files(window.files, window.size_bytes)
            return
        damaged: dict[bytes, tuple[str, int]] = {}
        failed: set[bytes] = set()
        for path, reason, block in each_its_own(faults, [window.path(number) for number in range(window.files)]):
            if block >= 0:
                damaged[path] = reason, block
                continue
            if block == LOST:
                failed.add(path)
            self._report.fault(path, reason)
        for directory, files in window.groups:
            for name, _, meta, parts, extents in files:
                path = _path(directory, name)
                tried = self._tried.pop(path, frozenset())
                if path in damaged:
                    reason, block = damaged[path]
                    at = window.blocks[block]
                    tried |= {(at.pack, at.offset, inner) for number, inner, _, _ in parts if number == block}
                    refs = [(chunk_id, length) for _, _, length, chunk_id in parts]
                    self._failed.append(Failed(directory, name, meta, refs, extents, tried, reason))
                elif path not in failed:
                    self._report.file(path, meta[3])

    # Large files ------------------------------------------------------------------------------------------------------

    async def _write_large(self, place: bytes, entry: Entry) -> None:
        """Write a large file in pieces, out of order; it gets its name when all of it is there."""
        path = _path(place, entry.name)
        try:
            meta, extents = await self.meta(path, entry)
        except Damaged as error:
            self._report.fault(path, str(error))
            return
        large = LargeFile(place, entry.name, meta, extents)
        try:
            self._large[id(large)] = large
            for note in await to_thread.run_sync(large.create, self._places, self._sparse):
                self._report.fault(path, note)
        except OSError as error:
            del self._large[id(large)]
            self._report.fault(path, error.strerror or str(error))
            return
        try:
            await self._send_pieces(large, entry)
        except Damaged as error:
            large.reason = str(error)
        large.complete = True
        self._finish(large)

    async def _send_pieces(self, large: LargeFile, entry: Entry) -> None:
        window = Window(self._pool.slab_bytes)
        async for refs in self._catalog.file_refs(entry):
            found = list(iter_refs(refs))
            locations = await self._fetcher.mirror.locate([chunk_id for chunk_id, _ in found])
            for (chunk_id, length), location in zip(found, locations, strict=True):
                if location is None or not self._copies.usable(location, length):
                    [(_, _, location)] = await self._copies.others([(chunk_id, length)], frozenset()) or unlocated(
                        [(chunk_id, length)]
                    )
                    assert location is not None
                chunk = [(chunk_id, length, location)]
                if not window.fits(chunk) or window.raw_bytes + length > self._pool.slab_bytes:
                    await self._send_piece(large, window)
                    window = Window(self._pool.slab_bytes)
                large.add(window, chunk_id, length, location)
        await self._send_piece(large, window)

    async def _send_piece(self, large: LargeFile, window: Window) -> None:
        writes = large.take()
        if not writes:
            return
        large.unfinished += 1

        def done(faults: Faults) -> None:
            large.unfinished -= 1
            for _, reason, block in faults:
                if block >= 0 and not large.reason:
                    self._take_apart(large, window, writes, reason, block)
                elif not large.reason:
                    large.reason = reason
            self._finish(large)

        await self._submit_piece(large, window, writes, done)

    async def _submit_piece(
        self, large: LargeFile, window: Window, writes: list[Any], done: Callable[[Faults], None]
    ) -> None:
        slab = await self._pool.acquire()
        self._group.start_soon(self._fetch_piece, large, window, slab, writes, done)

    async def _fetch_piece(
        self, large: LargeFile, window: Window, slab: int, writes: list[Any], done: Callable[[Faults], None]
    ) -> None:
        blocks = await fetch_into(self._fetcher, window.blocks, self._pool.view(slab))
        place = (large.directory, large.temporary, *large.identity)
        self._pool.submit("piece", blocks, place, writes, slab=slab, done=done)

    def _take_apart(self, large: LargeFile, window: Window, writes: list[Any], reason: str, block: int) -> None:
        """A block of a piece is damaged: each of the piece's chunks is sought and written by itself."""
        at = window.blocks[block]
        for begin, length, skip, parts in writes:
            offset = begin
            for number, inner, chunk_bytes, chunk_id in parts:
                count = min(chunk_bytes - skip, begin + length - offset)
                part = Part(large, offset, count, skip, chunk_id, chunk_bytes, reason)
                if number == block:
                    part.tried.add((at.pack, at.offset, inner))
                self._parts.append(part)
                large.unfinished += 1
                offset, skip = offset + count, 0

    def _finish(self, large: LargeFile) -> None:
        if not large.complete or large.unfinished:
            return
        path = _path(large.directory, large.name)

        def done(faults: Faults) -> None:
            del self._large[id(large)]
            for _, reason, _ in faults:
                self._report.fault(path, reason)
            if not large.reason and all(kept == KEPT for _, _, kept in faults):
                self._report.file(path, large.meta[3])

        if large.reason:
            self._report.fault(path, large.reason)
        name = b"" if large.reason else large.name
        self._pool.submit("finish", large.directory, name, large.temporary, large.identity, large.meta, done=done)

    # Other copies -----------------------------------------------------------------------------------------------------

    async def _retry(self) -> None:
        """Try another copy for whatever was damaged; what has none is lost."""
        failed, self._failed = self._failed, []
        parts, self._parts = self._parts, []
        for each in failed:
            path = _path(each.directory, each.name)
            chunks = await self._copies.others(each.refs, each.tried)
            if chunks is None:
                self._report.fault(path, each.reason)
                continue
            self._tried[path] = each.tried
            if not await self._take(each.directory, each.name, each.meta, chunks, each.extents):
                self._report.fault(path, each.reason)
        await self._flush()
        for part in parts:
            await self._retry_part(part)

    async def _retry_part(self, part: Part) -> None:
        large = part.large
        found = None if large.reason else await self._copies.others([(part.chunk_id, part.chunk_bytes)], part.tried)

        def done(faults: Faults) -> None:
            large.unfinished -= 1
            for _, reason, block in faults:
                part.reason = reason
                if block >= 0 and found and (at := found[0][2]) is not None:
                    part.tried.add((at.pack, at.offset, at.inner))
                    self._parts.append(part)
                    large.unfinished += 1
                else:
                    large.reason = large.reason or reason
            self._finish(large)

        if found is None or (location := found[0][2]) is None:
            done([(b"", part.reason, LOST)])
            return
        window = Window(self._pool.slab_bytes)
        writes = [(part.offset, part.length, part.skip, [window.part(part.chunk_id, part.chunk_bytes, location)])]
        await self._submit_piece(large, window, writes, done)

    # After a failure --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """After the workers were killed: remove what they had begun to write and not finished, and nothing else."""
        for large in self._large.values():
            large.remove(self._places)
        for job, number, created in self._pool.marks:
            if job in self._windows:
                self.remove(*self._windows[job].made(number), created=created)

    def remove(self, directory: bytes, name: bytes, *, created: bool) -> None:
        """Remove what a worker was making; if it may not have come to that, only what looks like its beginning."""
        with contextlib.suppress(OSError):
            folder = self._places.enter(directory, make=False)
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            begun = stat.S_ISREG(status.st_mode) and not status.st_size and status.st_uid == os.geteuid()
            if created or begun:
                os.unlink(name, dir_fd=folder)


def _path(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def each_its_own(faults: Faults, paths: Sequence[bytes]) -> Faults:
    """Faults by path; one without a path is of the job, and so of all the paths it was for."""
    if any(not path for path, _, _ in faults):
        return [(path, faults[0][1], LOST) for path in paths]
    return faults
