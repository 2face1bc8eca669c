"""Seal: compress and encrypt blocks in threads, into the open packs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio import to_thread

if TYPE_CHECKING:
    from anyio import CapacityLimiter

    from coffret.engine.flow import Channel, Sender
    from coffret.engine.messages import RawBlock
    from coffret.engine.packer import Packer
    from coffret.engine.packfile import PackBuilder


async def seal_stage(
    inbox: Channel[RawBlock], outbox: Sender[PackBuilder], *, packer: Packer, threads: CapacityLimiter
) -> None:
    """Seal blocks, in any order; several of these run at once. A full pack goes on when its last block is sealed."""
    async for block in inbox:
        body, placed, ready = await to_thread.run_sync(packer.compress_and_place, block, limiter=threads)
        while not placed:
            await packer.make_room(body)
            placed, ready = await to_thread.run_sync(packer.place, body, limiter=threads)
        block.release()
        if ready is not None:
            await outbox.send(ready)
