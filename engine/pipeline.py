"""The backup pipeline: its stages, in order, and every queue size and worker count.

    scan ──► chunk ──► dedup ──► seal ──► upload ──► (index)
      │        │         ▲
      └────────┴─► catalog

Memory, in the order the bytes flow: slabs (4 of 8 MiB a worker), blocks copied out of slabs (`blocks` below), pack
buffers (uploads + 3, 32 MiB each). A stage acquires room downstream before it produces, so the sum is the bound.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread

from coffret.engine.bridge import LoadBridge, Stopped
from coffret.engine.chunk import Chunking, chunk_stage
from coffret.engine.chunkpool import ChunkPool
from coffret.engine.dedup import dedup_stage
from coffret.engine.flow import Channel
from coffret.engine.messages import MetaChunks, RawBlock, Run, ScanPage
from coffret.engine.packer import Packer
from coffret.engine.packfile import PackBuilder
from coffret.engine.pages import CatalogWriter, catalog_stage
from coffret.engine.seal import seal_stage
from coffret.engine.settings import MIB, SLABS_PER_WORKER, WORKERS
from coffret.engine.stream import StreamReader, StreamSource, stream_stage
from coffret.engine.upload import upload_stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from coffret.connectors.base import Capabilities, Connector
    from coffret.engine.flow import ChannelStatistics
    from coffret.engine.index import IndexWriter
    from coffret.engine.known import KnownChunks
    from coffret.engine.progress import Progress
    from coffret.engine.records import Config, Counts
    from coffret.engine.scan import Scanner
    from coffret.engine.sealing import Sealer, Secrets
    from coffret.engine.storecache import StoreCache

# As many as to a local disk.
_FEW_UPLOADS = 2
# Pages per step of the scan thread: a step costs a hop of about 60 µs.
_PAGES_A_STEP = 4


class Limits(msgspec.Struct, frozen=True):
    """How much of everything there is at a time; tests set all to their minimum."""

    workers: int = WORKERS
    slabs: int = SLABS_PER_WORKER
    sealers: int = 1 + (os.cpu_count() or 1)  # one may wait for the interpreter: 2 % on small files
    uploads: int = 0  # 0: as many as suit the storage
    pages: int = 32
    blocks: int = 8
    runs: int = 4

    def suited(self, capabilities: Capabilities) -> Limits:
        """With what was left to the storage. Many uploads at a time hold memory, which slabs then do without."""
        uploads = self.uploads or capabilities.parallel_puts
        fewer = min(max(0, uploads - _FEW_UPLOADS), max(0, self.slabs - 2))
        return msgspec.structs.replace(self, uploads=uploads, slabs=self.slabs - fewer)

    @property
    def pack_buffers(self) -> int:
        """Two packs are open, one waits for its last block, the others are being put."""
        return self.uploads + 3


class Storing:
    """The end that all who store chunks share: what is sent to `blocks` is sealed into packs, put, and told to `index`.

    A sending end of `blocks` exists before `start`; when all are closed and the group has ended, everything is stored.
    `close` is called in any case. `level`: zstd level for what is not packed yet, None for none.
    """

    def __init__(
        self,
        *,
        connector: Connector,
        sealer: Sealer,
        pack_bytes: int,
        attempt: bytes,
        index: IndexWriter,
        level: int | None,
        limits: Limits,
        kept: StoreCache | None,
        progress: Progress,
    ) -> None:
        self._connector, self._index, self._kept = connector, index, kept
        self._limits, self._progress = limits, progress
        self.blocks = Channel[RawBlock](
            "blocks", max_items=limits.blocks, max_bytes=16 * MIB, size=lambda block: block.raw_bytes
        )
        self._packs = Channel[PackBuilder](
            "packs", max_items=limits.uploads, max_bytes=1 << 40, size=lambda pack: pack.used
        )
        self._outbox = self._packs.sender()
        self._packer = Packer(
            sealer,
            attempt,
            level=level,
            pack_bytes=pack_bytes,
            buffers=limits.pack_buffers,
            outbox=self._outbox,
            expect_transfers=connector.expect_transfers,
        )

    @property
    def statistics(self) -> list[ChannelStatistics]:
        """How full its queues are, for `Progress.channels`."""
        return [self.blocks.statistics, self._packs.statistics]

    def start(self, group: TaskGroup) -> None:
        """Run the stages."""
        threads = anyio.CapacityLimiter(self._limits.sealers + self._limits.uploads)
        group.start_soon(self._seal, threads)
        for _ in range(self._limits.uploads):
            group.start_soon(self._upload, threads)

    def close(self) -> None:
        """Give the pack buffers back."""
        self._packer.close()

    async def _seal(self, threads: anyio.CapacityLimiter) -> None:
        with self._outbox as outbox:
            async with anyio.create_task_group() as sealers:
                for _ in range(self._limits.sealers):
                    sealers.start_soon(partial(seal_stage, self.blocks, outbox, packer=self._packer, threads=threads))
            await self._packer.finish()

    async def _upload(self, threads: anyio.CapacityLimiter) -> None:
        await upload_stage(
            self._packs,
            connector=self._connector,
            packer=self._packer,
            index=self._index,
            threads=threads,
            progress=self._progress,
            kept=self._kept,
        )


class Pipeline:
    """One run of the stages over one scanner. After `run`: `root`, the catalog's (ref, depth)."""

    def __init__(
        self,
        *,
        connector: Connector,
        sealer: Sealer,
        secrets: Secrets,
        config: Config,
        attempt: bytes,
        known: KnownChunks,
        index: IndexWriter,
        level: int | None,
        limits: Limits,
        kept: StoreCache | None = None,
        progress: Progress,
        counts: Counts,
        fault: Callable[[bytes, str], None],
    ) -> None:
        self._known, self._index = known, index
        self._config, self._secrets = config, secrets
        self._progress, self._fault = progress, fault
        self.meta = MetaChunks(secrets.id_key)
        self._writer = CatalogWriter(self.meta, counts, progress)
        self._pool = ChunkPool(
            workers=limits.workers,
            slabs=limits.slabs,
            chunker=config.chunker,
            secrets=secrets,
            current=progress.current,
        )
        self._scanned = Channel[ScanPage]("scanned", max_items=limits.pages, max_bytes=8 * MIB, size=_page_bytes)
        self._complete = Channel[ScanPage]("complete", max_items=limits.pages, max_bytes=8 * MIB, size=_page_bytes)
        self._runs = Channel[Run]("runs", max_items=limits.runs, max_bytes=4 * MIB, size=lambda run: run.size_bytes)
        self._storing = Storing(
            connector=connector,
            sealer=sealer,
            pack_bytes=config.pack_bytes,
            attempt=attempt,
            index=index,
            level=level,
            limits=limits,
            kept=kept,
            progress=progress,
        )
        # Every sending end exists before any stage runs, so that no channel ends before its senders have begun.
        self._chunk_runs, self._catalog_runs = self._runs.sender(), self._runs.sender()
        self._chunk_pages, self._dedup_blocks = self._complete.sender(), self._storing.blocks.sender()
        scanning = (self._scanned, self._complete, self._runs)
        progress.channels = [*(channel.statistics for channel in scanning), *self._storing.statistics]
        self.root: tuple[bytes, int] = (b"", 0)
        #: How the scan's thread reads the parent's catalog, if there is a parent.
        self.bridge: LoadBridge | None = None

    async def run(self, source: Scanner | StreamSource) -> None:
        """Run all stages to their end over a scanner, or a stream in the place of scan and chunk.

        An error or cancellation in one stage ends all, the pool's processes included.

        :raises CoffretError, ConnectorError: as the stages do, possibly in an ExceptionGroup
        """
        try:
            async with self._pool as pool, anyio.create_task_group() as group:
                if isinstance(source, StreamSource):
                    group.start_soon(self._stream, source)
                else:
                    group.start_soon(self._scan, source)
                    group.start_soon(self._chunk, pool)
                group.start_soon(self._catalog)
                group.start_soon(self._dedup)
                self._storing.start(group)
        finally:
            self._storing.close()

    async def _scan(self, scanner: Scanner) -> None:
        async with anyio.create_task_group() as group:
            if self.bridge is not None:
                await group.start(self.bridge.serve)
            with self._scanned.sender() as outbox:
                try:
                    while pages := await to_thread.run_sync(scanner.next, _PAGES_A_STEP):
                        for page in pages:
                            await outbox.send(page)
                except Stopped:  # the consequence of being cancelled, not a cause
                    await anyio.sleep_forever()
                finally:
                    scanner.close()
            group.cancel_scope.cancel()
        self._progress.files_total, self._progress.size_total = scanner.files, scanner.size_bytes

    async def _chunk(self, pool: ChunkPool) -> None:
        with self._chunk_runs as runs, self._chunk_pages as pages:
            chunking = Chunking(
                pool, runs=runs, pages=pages, meta=self.meta, progress=self._progress, fault=self._fault
            )
            await chunk_stage(self._scanned, chunking=chunking, pool=pool)

    async def _stream(self, source: StreamSource) -> None:
        with self._chunk_runs as runs, self._chunk_pages as pages:
            reader = StreamReader(source, self._config.chunker, self._secrets)
            await stream_stage(
                source,
                reader=reader,
                runs=runs,
                pages=pages,
                meta=self.meta,
                progress=self._progress,
                fault=self._fault,
            )

    async def _catalog(self) -> None:
        self.root = await catalog_stage(self._complete, self._catalog_runs, writer=self._writer, meta=self.meta)

    async def _dedup(self) -> None:
        await dedup_stage(self._runs, self._dedup_blocks, known=self._known, index=self._index, progress=self._progress)


def _page_bytes(page: ScanPage) -> int:
    return page.weight
