"""Chunk: have the pool read what the scan found new, and fill the pages with what it read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coffret.engine.catalog import RefList
from coffret.engine.chunkpool import Job, Slab
from coffret.engine.chunkworker import iter_stats
from coffret.engine.entries import make_entry, make_extra
from coffret.engine.messages import Run
from coffret.engine.records import iter_refs, refs_length
from coffret.engine.settings import BATCH_BYTES, BATCH_FILES

if TYPE_CHECKING:
    from coffret.engine.chunkpool import ChunkPool
    from coffret.engine.chunkworker import BatchResult, Result, Xattrs
    from coffret.engine.flow import Channel, Sender
    from coffret.engine.messages import MetaChunks, Read, ScanPage
    from coffret.engine.progress import Progress

FaultSink = Callable[[bytes, str], None]


class Chunking:
    """The state of the stage: the batch being gathered, and where results go."""

    def __init__(
        self,
        pool: ChunkPool,
        *,
        runs: Sender[Run],
        pages: Sender[ScanPage],
        meta: MetaChunks,
        progress: Progress,
        fault: FaultSink,
    ) -> None:
        self._pool, self._runs, self._pages = pool, runs, pages
        self._meta, self._progress, self._fault = meta, progress, fault
        self._batch: list[Read] = []
        self._batch_bytes = 0

    async def add(self, page: ScanPage) -> None:
        """Take a page: its files join the batch or become streams."""
        if not page.missing:
            await self._pages.send(page)
            return
        for read in page.reads:
            if read.size_bytes > BATCH_BYTES:
                await self._pool.submit(self._stream(read))
                continue
            if self._batch_bytes + read.size_bytes > BATCH_BYTES or len(self._batch) >= BATCH_FILES:
                await self.flush()
            self._batch.append(read)
            self._batch_bytes += read.size_bytes + 1

    async def flush(self) -> None:
        """Submit the batch as it is."""
        reads, self._batch, self._batch_bytes = self._batch, [], 0
        if not reads:
            return

        async def deliver(kind: str, slab: Slab, results: BatchResult) -> None:
            await self._batch_done(reads, slab, results)

        await self._pool.submit(Job("batch", [read.source for read in reads], deliver))

    async def _batch_done(self, reads: list[Read], slab: Slab, results: BatchResult) -> None:
        read_ns, stats, contents, xattrs, unusual = results
        refs, complete, usual, read_bytes = [], [], iter_stats(stats), 0
        for index, (read, content) in enumerate(zip(reads, contents, strict=True)):
            if content is not None:
                fields = next(usual)
                read_bytes += fields[3]
                refs.append(content)
                self._enter(read, fields, read_ns, content, xattrs.get(index))
            else:
                result = unusual[index]
                if result is None:  # it has grown beyond the slab: read it as a stream
                    self._pool.submit_nowait(self._stream(read))
                    continue
                if not isinstance(result, str):
                    refs.append(result[2])
                    read_bytes += refs_length(result[2])
                self._fill(read, result)
            if not read.page.missing:
                complete.append(read.page)
        self._progress.read_bytes += read_bytes
        await self._send_meta()
        for page in complete:
            await self._pages.send(page)
        joined = b"".join(refs)
        if joined:
            await self._runs.send(Run(slab.view[: refs_length(joined)], joined, slab))
        else:
            slab.release()

    def _stream(self, read: Read) -> Job:
        chunks = RefList(self._meta.store)

        async def deliver(kind: str, *message: Any) -> None:
            if kind == "piece":
                slab, offset, refs = message
                for chunk_id, length in iter_refs(refs):
                    chunks.add(chunk_id, length)
                total = refs_length(refs)
                self._progress.read_bytes += total
                if refs:
                    await self._runs.send(Run(slab.view[offset : offset + total], refs, slab))
                else:
                    slab.release()
                await self._send_meta()
            else:
                self._fill(read, message[0], chunks)
                await self._send_meta()
                if not read.page.missing:
                    await self._pages.send(read.page)

        return Job("file", [read.source], deliver)

    def _fill(self, read: Read, result: str | Result, chunks: RefList | None = None) -> None:
        """Put a file's entry in its place, or report why there is none; `chunks`: what a stream consists of."""
        if isinstance(result, str):
            self._fault(read.path, result)
            self._done(read.page)
            return
        fields, read_ns, content, extents, xattrs, note = result
        depth = 0
        if chunks is not None:
            content, depth = chunks.finish()
        self._enter(read, fields, read_ns, content, xattrs, extents, depth)
        if note:
            self._fault(read.path, note)

    def _enter(
        self,
        read: Read,
        fields: tuple[int, ...],
        read_ns: int,
        content: bytes,
        xattrs: Xattrs | None,
        extents: bytes = b"",
        depth: int = 0,
    ) -> None:
        extra = None
        if xattrs or extents or depth or fields[8] > 1:
            extra = make_extra(self._meta.store, nlink=fields[8], depth=depth, xattrs=xattrs, extents=extents)
        read.entries[read.index] = make_entry(read.name, fields, read_ns, content, extra)
        self._done(read.page)

    def _done(self, page: ScanPage) -> None:
        page.missing -= 1
        if not page.missing:
            # The reads point back to the page: without this only the garbage collector would find them.
            page.reads.clear()

    async def _send_meta(self) -> None:
        for run in self._meta.runs():
            await self._runs.send(run)


async def chunk_stage(inbox: Channel[ScanPage], *, chunking: Chunking, pool: ChunkPool) -> None:
    """Have files read in batches and streams; pages go on when all their files are read."""
    async for page in inbox:
        await chunking.add(page)
        if inbox.idle:
            await chunking.flush()
    await chunking.flush()
    await pool.drain()
