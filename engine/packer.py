"""Pack: place sealed blocks into pack buffers, and hand on those that are full.

Buffers are preallocated, page-aligned and reused: fresh memory is dear on virtual machines, and a connector can write
them with O_DIRECT. Catalog chunks fill packs of their own, so that reading a catalog touches few objects.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import msgspec

from coffret.engine.compressor import Compressor
from coffret.engine.errors import CoffretError
from coffret.engine.flow import Waiters
from coffret.engine.memory import fresh_memory, give_back
from coffret.engine.packfile import PackBuilder
from coffret.engine.sealing import RAW, ZSTD

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator

    from coffret.engine.flow import Sender
    from coffret.engine.messages import RawBlock
    from coffret.engine.sealing import Sealer


# What a thread seals before it comes back, so that slabs go back soon and cancelling does not take long.
_AT_ONCE_BYTES = 4 << 20
# So much, uncompressed, is worth making ready for: well before the first pack is full.
_SURE_BYTES = 4 << 20


class Body(msgspec.Struct):
    """A block compressed, waiting for its place; `seen` is the pack it did not fit in."""

    block: RawBlock
    data: bytes | memoryview
    codec: int
    seen: PackBuilder | None = None


class Packer:
    """The open packs of a backup: one of data, one of catalog chunks. `seal` runs in threads, the rest on the loop."""

    def __init__(
        self,
        sealer: Sealer,
        attempt: bytes,
        *,
        level: int | None,
        pack_bytes: int,
        buffers: int,
        outbox: Sender[PackBuilder],
        expect_transfers: Callable[[], None],
    ) -> None:
        self._sealer, self._attempt, self._level = sealer, attempt, level
        self._pack_bytes, self._spare, self._outbox = pack_bytes, buffers, outbox
        self._free: list[mmap.mmap] = []
        self._buffers: dict[int, mmap.mmap] = {}
        self._returned = Waiters()
        self._current: dict[bool, PackBuilder | None] = {False: None, True: None}
        self._turns = {False: anyio.Lock(), True: anyio.Lock()}
        self._lock = threading.Lock()
        # Those not in use. Taking and giving back are each atomic.
        self._compressors: list[Compressor] = []
        self._expect_transfers, self._until_transfers = expect_transfers, _SURE_BYTES

    def _compress(self, block: RawBlock, compressor: Compressor) -> Body:
        """Join and compress a block, unless it comes packed; one that does not shrink stays as it is.

        What is returned is good until the compressor is used again; a block that comes packed stays where it is.
        """
        if block.packed is not None:
            return Body(block, block.packed, block.codec)
        data = compressor.join(block.parts)
        packed = compressor.compress(data)
        return Body(block, data, RAW) if packed is None else Body(block, packed, ZSTD)

    def _place(self, body: Body) -> tuple[bool, PackBuilder | None]:
        """Seal a block into its open pack: (whether it fitted, the pack if this was the last it waited for)."""
        block = body.block
        with self._lock:
            body.seen = builder = self._current[block.meta]
            if builder is None:
                return False, None
            offset = builder.reserve(len(body.data), block.raw_bytes, body.codec, b"".join(block.refs))
            if offset is None:
                return False, None
        builder.seal(body.data, offset)
        with self._lock:
            builder.sealing -= 1
            return True, builder if builder.full and not builder.sealing else None

    def seal(self, blocks: list[RawBlock], body: Body | None) -> tuple[int, Body | None, list[PackBuilder]]:
        """Compress blocks and seal them into their open packs, some MiB, or up to one for which there is no room.

        Returns how many are sealed, the body of that one, to be given again when there is room, and the packs that
        waited for one of these last.
        """
        with self._compressor() as compressor:
            return self._seal(blocks, body, compressor)

    def _seal(
        self, blocks: list[RawBlock], body: Body | None, compressor: Compressor
    ) -> tuple[int, Body | None, list[PackBuilder]]:
        full: list[PackBuilder] = []
        sealed_bytes = 0
        for count, block in enumerate(blocks):
            if sealed_bytes >= _AT_ONCE_BYTES:
                return count, None, full
            body = body or self._compress(block, compressor)
            placed, pack = self._place(body)
            if not placed:
                if block.packed is None:  # it may lie in the compressor's memory
                    body.data = bytes(body.data)
                return count, body, full
            body = None
            sealed_bytes += block.raw_bytes
            if pack is not None:
                full.append(pack)
        return len(blocks), None, full

    @contextmanager
    def _compressor(self) -> Iterator[Compressor]:
        """One that nobody uses meanwhile: there are as many as threads that seal at a time."""
        try:
            compressor = self._compressors.pop()
        except IndexError:
            compressor = Compressor(self._level)
        try:
            yield compressor
        finally:
            self._compressors.append(compressor)

    def sealed(self, size_bytes: int) -> None:
        """So many bytes more, uncompressed, are in packs: before one is full the storage may make ready for it."""
        if self._until_transfers > 0:
            self._until_transfers -= size_bytes
            if self._until_transfers <= 0:
                self._expect_transfers()

    async def make_room(self, body: Body) -> None:
        """Open another pack in place of the one a block did not fit in.

        :raises CoffretError: if it fits in none
        """
        if not PackBuilder.fits(len(body.data), sum(map(len, body.block.refs)), self._pack_bytes):
            raise CoffretError(
                f"a block of {len(body.data)} bytes fits in no pack of {self._pack_bytes}",
                remedy="use a repository that was made with larger packs",
            )
        meta = body.block.meta
        async with self._turns[meta]:
            if self._current[meta] is not body.seen:
                return
            await self._close(meta)
            while not self._free and not self._spare:
                await self._returned.wait()
            if self._free:
                buffer = self._free.pop()
            else:
                self._spare -= 1
                buffer = fresh_memory(self._pack_bytes)
            builder = PackBuilder(memoryview(buffer), self._sealer, self._attempt)
            builder.meta = meta
            self._buffers[id(builder)] = buffer
            self._current[meta] = builder

    async def _close(self, meta: bool) -> None:
        with self._lock:
            builder, self._current[meta] = self._current[meta], None
            if builder is None:
                return
            builder.full = True
            ready = builder.sealing == 0
        if ready:
            await self._outbox.send(builder)

    def release(self, builder: PackBuilder) -> None:
        """A pack is stored: its buffer is free for another."""
        builder.buffer.release()
        self._free.append(self._buffers.pop(id(builder)))
        self._returned.wake()

    async def finish(self) -> None:
        """Hand on what is open, when all blocks are placed."""
        for meta in (False, True):
            await self._close(meta)

    def close(self) -> None:
        """Give all buffers back to the system, when no block is sealed and no pack put any more."""
        give_back([*self._free, *self._buffers.values()])
        self._free.clear()
        self._buffers.clear()
        self._compressors.clear()
        self._current.clear()
