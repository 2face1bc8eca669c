"""Chunk: have the pool read what the scan found new, and fill the pages with what it read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coffret.engine.catalog import RefList
from coffret.engine.chunkpool import Job, Slab
from coffret.engine.entries import make_entry, make_extra
from coffret.engine.messages import Run
from coffret.engine.records import iter_refs, refs_length
from coffret.engine.settings import BATCH_BYTES, BATCH_FILES

if TYPE_CHECKING:
    from coffret.engine.chunkpool import ChunkPool
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

        async def deliver(kind: str, slab: Slab, results: list[Any]) -> None:
            await self._batch_done(reads, slab, results)

        await self._pool.submit(Job("batch", [read.path for read in reads], deliver))

    async def _batch_done(self, reads: list[Read], slab: Slab, results: list[Any]) -> None:
        refs, complete = [], []
        for read, result in zip(reads, results, strict=True):
            if result is None:  # it has grown beyond the slab: read it as a stream
                self._pool.submit_nowait(self._stream(read))
                continue
            if not isinstance(result, str):
                refs.append(result[3])
                self._progress.read_bytes += result[0][3]
            if self._fill(read, result):
                complete.append(read.page)
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
            elif self._fill(read, message[0], chunks):
                await self._send_meta()
                await self._pages.send(read.page)

        return Job("file", [read.path], deliver)

    def _fill(self, read: Read, result: Any, chunks: RefList | None = None) -> bool:
        """Put a file's entry in its place, or report why there is none; tell whether that completed its page."""
        page = read.page
        if isinstance(result, str):
            self._fault(read.path, result)
        else:
            fields, read_ns, _, content, extents, xattrs, note = result
            extra = None
            if chunks is not None:
                content, depth = chunks.finish()
                extra = make_extra(self._meta.store, nlink=fields[8], depth=depth, xattrs=xattrs, extents=extents)
            elif xattrs or extents or fields[8] > 1:
                extra = make_extra(self._meta.store, nlink=fields[8], xattrs=xattrs, extents=extents)
            read.entries[read.index] = make_entry(read.name, fields, read_ns, content=content, extra=extra)
            if note:
                self._fault(read.path, note)
        page.missing -= 1
        if page.missing:
            return False
        # The reads point back to the page: without this only the garbage collector would find them.
        page.reads.clear()
        return True

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
