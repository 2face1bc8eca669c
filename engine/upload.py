"""Upload: put packs, several at a time, and tell the index where their chunks lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio import to_thread

from coffret.engine.packfile import pack_name
from coffret.engine.records import PackTable
from coffret.engine.storecache import block_key

if TYPE_CHECKING:
    from anyio import CapacityLimiter

    from coffret.connectors.base import Connector
    from coffret.engine.flow import Channel
    from coffret.engine.index import IndexWriter
    from coffret.engine.packer import Packer
    from coffret.engine.packfile import PackBuilder
    from coffret.engine.progress import Progress
    from coffret.engine.storecache import StoreCache


async def upload_stage(
    inbox: Channel[PackBuilder],
    *,
    connector: Connector,
    packer: Packer,
    index: IndexWriter,
    threads: CapacityLimiter,
    progress: Progress,
    kept: StoreCache | None = None,
) -> None:
    """Finish and put packs; several of these run at once. A pack is in the index only once it is durable."""
    async for builder in inbox:
        pack_id, length = await to_thread.run_sync(builder.finish, limiter=threads)
        await connector.put(pack_name(pack_id), [builder.buffer[:length]])
        if kept is not None and builder.meta:
            # The next backup begins with reading this.
            await kept.keep({block_key(pack_id, block.offset): builder.stored(block) for block in builder.blocks})
        table = PackTable(pack_id, builder.header, length, builder.blocks)
        packer.release(builder)
        progress.stored_bytes += length
        await index.add(table)
