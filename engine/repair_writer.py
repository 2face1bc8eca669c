"""Store chunks that no file is read for: the end of a backup's pipeline, from dedup on, by itself."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec

from coffret.engine.dedup import dedup_stage
from coffret.engine.flow import Channel
from coffret.engine.messages import Run
from coffret.engine.pipeline import Limits, Storing
from coffret.engine.settings import COMPRESSION_LEVELS, MIB

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
    limits = msgspec.structs.replace(Limits(), uploads=min(2, connector.capabilities.parallel_puts))
    storing = Storing(
        connector=connector,
        sealer=repository.sealer,
        pack_bytes=repository.config.pack_bytes,
        attempt=attempt,
        index=index,
        level=COMPRESSION_LEVELS["default"],
        limits=limits,
        kept=repository.kept,
        progress=progress,
    )
    runs = Channel[Run]("runs", max_items=limits.runs, max_bytes=4 * MIB, size=lambda run: run.size_bytes)
    inlet, outbox = runs.sender(), storing.blocks.sender()
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(dedup_stage, runs, outbox, known=known, index=index, progress=progress))
            storing.start(group)
            with inlet:
                yield inlet.send
    finally:
        storing.close()
