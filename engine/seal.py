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


# Blocks a thread is given at a time, if so many wait: each hop to a thread and back costs 0.1 ms of CPU, and sealing a
# block 2 ms.
_AT_ONCE = 4


async def seal_stage(
    inbox: Channel[RawBlock], outbox: Sender[PackBuilder], *, packer: Packer, threads: CapacityLimiter
) -> None:
    """Seal blocks, in any order; several of these run at once. A full pack goes on when its last block is sealed."""
    async for first in inbox:
        blocks, body = [first, *inbox.receive_more(_AT_ONCE - 1)], None
        while blocks:
            count, body, full = await to_thread.run_sync(packer.seal, blocks, body, limiter=threads)
            packer.sealed(sum(block.raw_bytes for block in blocks[:count]))
            for block in blocks[:count]:
                block.release()
            del blocks[:count]
            for pack in full:
                await outbox.send(pack)
            if body is not None:
                await packer.make_room(body)
