"""Store chunks that no file is read for: the end of a backup's pipeline, from dedup on, by itself."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio

from coffret.engine.dedup import dedup_stage
from coffret.engine.flow import Channel
from coffret.engine.messages import RawBlock, Run
from coffret.engine.packer import Packer
from coffret.engine.packfile import PackBuilder
from coffret.engine.pipeline import Limits
from coffret.engine.seal import seal_stage
from coffret.engine.settings import COMPRESSION_LEVELS, MIB
from coffret.engine.upload import upload_stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from coffret.engine.index import IndexWriter
    from coffret.engine.known import KnownChunks
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository


@asynccontextmanager
async def chunk_writer(
    repository: Repository, attempt: bytes, *, known: KnownChunks, index: IndexWriter, progress: Progress
) -> AsyncIterator[Callable[[Run], Awaitable[None]]]:
    """What stores runs of chunks, as far as they are not known; when the context ends all of it is in `index`.

    Memory is that of a backup to the same storage without slabs.
    """
    connector = repository.connector
    # There is little to store: as many uploads as to a local disk.
    limits = replace(Limits(), uploads=min(2, connector.capabilities.parallel_puts))
    runs = Channel[Run]("runs", max_items=limits.runs, max_bytes=4 * MIB, size=lambda run: run.size_bytes)
    blocks = Channel[RawBlock](
        "blocks", max_items=limits.blocks, max_bytes=16 * MIB, size=lambda block: block.raw_bytes
    )
    packs = Channel[PackBuilder]("packs", max_items=limits.uploads, max_bytes=1 << 40, size=lambda pack: pack.used)
    inlet, dedup_out, seal_out = runs.sender(), blocks.sender(), packs.sender()
    threads = anyio.CapacityLimiter(limits.sealers + limits.uploads)
    packer = Packer(
        repository.sealer,
        attempt,
        level=COMPRESSION_LEVELS["default"],
        pack_bytes=repository.config.pack_bytes,
        buffers=limits.pack_buffers,
        outbox=seal_out,
    )

    async def seal() -> None:
        with seal_out:
            async with anyio.create_task_group() as sealers:
                for _ in range(limits.sealers):
                    sealers.start_soon(partial(seal_stage, blocks, seal_out, packer=packer, threads=threads))
            await packer.finish()

    upload = partial(
        upload_stage,
        packs,
        connector=connector,
        packer=packer,
        index=index,
        threads=threads,
        progress=progress,
        kept=repository.kept,
    )
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(dedup_stage, runs, dedup_out, known=known, index=index, progress=progress))
            group.start_soon(seal)
            for _ in range(limits.uploads):
                group.start_soon(upload)
            with inlet:
                yield inlet.send
    finally:
        packer.close()
