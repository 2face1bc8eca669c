"""Fetch: read chunks back, by coalesced ranges of packs, opened in threads, every chunk id verified."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.connectors.errors import ConnectorError, InvalidRange, NotFound, PermissionRefused
from coffret.engine.errors import ChunkMissing, Damaged
from coffret.engine.packfile import open_block, pack_name
from coffret.engine.records import ID_BYTES, REF_BYTES
from coffret.engine.sealing import PACK
from coffret.engine.storecache import block_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.connectors.base import Connector
    from coffret.engine.mirror import Location, Mirror
    from coffret.engine.sealing import BlockCipher, Sealer
    from coffret.engine.storecache import StoreCache

#: What a storage says of one object that can't be had, as opposed to one that can't be asked.
LOST = (NotFound, InvalidRange, PermissionRefused)
# One range is at most this long (bytes): it is held twice, sealed and open.
MAX_RANGE_BYTES = 8 << 20
_CIPHERS = 1024

BlockKey = tuple[bytes, int]


class Range(msgspec.Struct):
    """Neighbouring blocks of one pack, fetched as one: `blocks` by offset."""

    pack: bytes
    begin: int
    end: int
    blocks: list[Location]


def coalesce(blocks: Sequence[Location], gap_bytes: int) -> list[Range]:
    """Group blocks (one location each) into ranges: those nearer than `gap_bytes` are fetched together."""
    ranges: list[Range] = []
    for block in sorted(blocks, key=lambda location: (location.pack, location.offset)):
        end = block.offset + block.stored_bytes
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and last.pack == block.pack
            and block.offset - last.end <= gap_bytes
            and end - last.begin <= MAX_RANGE_BYTES
        ):
            last.blocks.append(block)
            last.end = max(last.end, end)
        else:
            ranges.append(Range(block.pack, block.offset, end, [block]))
    return ranges


class Fetcher:
    """Reads chunks of one repository. `cache_bytes` of opened blocks are kept, since neighbours are wanted together.

    `kept`: what is kept of stored blocks on this machine; all that is loaded here is (`fetch_into` does not load).
    """

    def __init__(
        self,
        connector: Connector,
        sealer: Sealer,
        mirror: Mirror,
        *,
        id_key: bytes,
        cache_bytes: int = 8 << 20,
        kept: StoreCache | None = None,
        gets: anyio.CapacityLimiter | None = None,
        strict: bool = False,
    ) -> None:
        """`gets`: shared with others that read from the same storage at the same time.

        `strict`: where the storage can't be asked, that is an error of its own; else it is as if what is wanted were
        damaged.
        """
        self._strict = strict
        self.connector, self.mirror, self.id_key, self._kept = connector, mirror, id_key, kept
        self._sealer = sealer
        self._cache: OrderedDict[BlockKey, bytes | memoryview] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._ciphers: OrderedDict[bytes, BlockCipher] = OrderedDict()
        self._lock = threading.Lock()
        # Packs that were found to be bad: what they hold is sought elsewhere. And whether all was listed anew for that,
        # and nothing else was found: as long as there is, each sweep may have moved it once more.
        self._bad: set[bytes] = set()
        self._relisted = False
        self._gets = gets or anyio.CapacityLimiter(connector.capabilities.parallel_gets)

    def cipher(self, header: bytes) -> BlockCipher:
        """The cipher of a pack, by its clear header; may be called in threads."""
        with self._lock:
            cipher = self._ciphers.get(header)
            if cipher is None:
                cipher = self._ciphers[header] = self._sealer.cipher(header, PACK)
                if len(self._ciphers) > _CIPHERS:
                    self._ciphers.popitem(last=False)
            return cipher

    async def load(self, refs: Sequence[bytes]) -> list[bytes]:
        """The contents that packed refs name, each a concatenation of its chunks.

        :raises ChunkMissing: if a chunk has no usable copy
        """
        ids = [ref[at : at + ID_BYTES] for ref in refs for at in range(0, len(ref), REF_BYTES)]
        chunks = await self.chunks(ids)
        joined, number = [], 0
        for ref in refs:
            count = len(ref) // REF_BYTES
            joined.append(b"".join(chunks[number : number + count]))
            number += count
        return joined

    async def chunks(self, ids: Sequence[bytes]) -> list[bytes]:
        """The contents of chunks, verified; from another pack where one is bad, and as a new listing has them.

        :raises ChunkMissing: if one has no usable copy
        """
        while True:
            try:
                return await self._chunks(ids)
            except ChunkMissing as missing:
                if missing.pack is not None and missing.pack not in self._bad:
                    self._bad.add(missing.pack)
                elif self.mirror.relist is not None and not self._relisted:
                    before = frozenset(self.mirror.objects)
                    await self.mirror.relist()
                    self._relisted = before == self.mirror.objects
                else:
                    raise

    async def _chunks(self, ids: Sequence[bytes]) -> list[bytes]:
        locations = await self.mirror.locate(ids, avoid=frozenset(self._bad))
        blocks: dict[BlockKey, Location] = {}
        for chunk_id, location in zip(ids, locations, strict=True):
            if location is None:
                raise ChunkMissing(f"chunk {chunk_id.hex()[:16]} is in no pack")
            blocks.setdefault((location.pack, location.offset), location)
        opened = await self._blocks(blocks)
        return await to_thread.run_sync(self._cut, ids, locations, opened)

    def _cut(
        self, ids: Sequence[bytes], locations: Sequence[Location | None], opened: dict[BlockKey, bytes | memoryview]
    ) -> list[bytes]:
        found = []
        for chunk_id, location in zip(ids, locations, strict=True):
            if location is None:
                raise ChunkMissing(f"chunk {chunk_id.hex()[:16]} is in no pack")
            block = opened[location.pack, location.offset]
            data = bytes(block[location.inner : location.inner + location.length])
            if blake3(data, key=self.id_key).digest() != chunk_id:
                raise ChunkMissing(f"chunk {chunk_id.hex()[:16]} does not have its id", pack=location.pack)
            found.append(data)
        return found

    async def _blocks(self, wanted: dict[BlockKey, Location]) -> dict[BlockKey, bytes | memoryview]:
        opened: dict[BlockKey, bytes | memoryview] = {}
        missing: list[Location] = []
        failed: list[ChunkMissing] = []
        for key, location in wanted.items():
            if (block := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                opened[key] = block
            else:
                missing.append(location)

        if self._kept is not None and missing:
            opened |= await self._open_kept(self._kept, missing)
        lacking = [location for location in missing if (location.pack, location.offset) not in opened]

        async def fetch(part: Range) -> None:
            try:
                data = await self.read(part)
                if self._kept is not None:
                    await self._kept.keep(
                        {
                            block_key(b.pack, b.offset): data[b.offset - part.begin :][: b.stored_bytes]
                            for b in part.blocks
                        }
                    )
                for location, block in await to_thread.run_sync(self._open, part, data):
                    opened[location.pack, location.offset] = block
            except ChunkMissing as error:
                failed.append(error)

        ranges = coalesce(lacking, self.connector.capabilities.coalesce_gap_bytes)
        if len(ranges) == 1:
            await fetch(ranges[0])
        elif ranges:
            async with anyio.create_task_group() as group:
                for part in ranges:
                    group.start_soon(fetch, part)
        if failed:
            raise failed[0]
        for location in missing:
            self._keep((location.pack, location.offset), opened[location.pack, location.offset])
        return opened

    async def _open_kept(self, kept: StoreCache, wanted: Sequence[Location]) -> dict[BlockKey, bytes | memoryview]:
        """Of the blocks that are wanted those that are kept locally, as far as they open."""
        found = await kept.get([block_key(location.pack, location.offset) for location in wanted])

        def open_them() -> dict[BlockKey, bytes | memoryview]:
            opened: dict[BlockKey, bytes | memoryview] = {}
            for block in wanted:
                if (data := found.get(block_key(block.pack, block.offset))) is not None:
                    with suppress(ChunkMissing):
                        opened[block.pack, block.offset] = self.open_one(block, data, block.offset)
            return opened

        return await to_thread.run_sync(open_them) if found else {}

    async def read(self, part: Range) -> bytes:
        """The stored bytes of a range.

        :raises ChunkMissing: if they can't be had: the pack is gone, cut short or unreadable
        :raises ConnectorError: if the storage can't be asked, and this is strict
        """
        name = pack_name(part.pack)
        async with self._gets:
            try:
                return await self.connector.get(name, offset=part.begin, length=part.end - part.begin)
            except ConnectorError as error:
                if self._strict and not isinstance(error, LOST):
                    raise
                raise ChunkMissing(unreadable(name, error), pack=part.pack) from None

    async def read_into(self, part: Range, view: memoryview) -> str:
        """Fetch a range into memory; return why that can't be done, or ""."""
        name = pack_name(part.pack)
        async with self._gets:
            try:
                await self.connector.get_into(name, part.begin, view)
            except ConnectorError as error:
                return unreadable(name, error)
        return ""

    def _open(self, part: Range, data: bytes) -> list[tuple[Location, bytes | memoryview]]:
        return [(block, self.open_one(block, data, part.begin)) for block in part.blocks]

    def open_one(self, block: Location, data: bytes | memoryview, begin: int) -> bytes | memoryview:
        """Decrypt and decompress one block out of a range that begins at `begin`; for threads.

        :raises ChunkMissing: if it is damaged
        """
        at = block.offset - begin
        stored = memoryview(data)[at : at + block.stored_bytes]
        try:
            return open_block(self.cipher(block.header), stored, block.offset, block.raw_bytes, block.codec)
        except Damaged as error:
            message = f"{pack_name(block.pack)} at {block.offset}: {error}"
            raise ChunkMissing(message, pack=block.pack) from None

    def _keep(self, key: BlockKey, block: bytes | memoryview) -> None:
        if key in self._cache:
            return
        self._cache[key] = block
        self._cached_bytes += len(block)
        while self._cached_bytes > self._cache_bytes:
            _, old = self._cache.popitem(last=False)
            self._cached_bytes -= len(old)


def unreadable(name: str, error: ConnectorError) -> str:
    """What to say of an object that can't be had, whatever the reason: it costs what is in it, and no more."""
    if isinstance(error, NotFound):
        return f"{name} is missing"
    if isinstance(error, InvalidRange):
        return f"{name} is cut short: {error}"
    text = str(error)  # says where that is, as a rule
    return f"{name} can't be read: {text.rpartition(f'{name}: ')[2]}"


async def fetch_into(fetcher: Fetcher, blocks: Sequence[Location], view: memoryview) -> list[tuple[object, ...] | str]:
    """Fetch the stored bytes of blocks into a slab; return each as `openworker` takes it, in the order given.

    In the place of one that can't be had stands the reason.
    """
    places: dict[BlockKey, int] = {}
    reasons: dict[BlockKey, str] = {}
    ranges: list[tuple[Range, int]] = []
    at = 0
    for part in coalesce(blocks, 0):
        ranges.append((part, at))
        for block in part.blocks:
            places[block.pack, block.offset] = at + block.offset - part.begin
        at += part.end - part.begin

    async def fetch(part: Range, begin: int) -> None:
        reason = await fetcher.read_into(part, view[begin : begin + part.end - part.begin])
        if reason and len(part.blocks) > 1:  # the others may be whole
            for block in part.blocks:
                alone = Range(part.pack, block.offset, block.offset + block.stored_bytes, [block])
                await fetch(alone, begin + block.offset - part.begin)
        elif reason:
            reasons[part.pack, part.begin] = reason

    if len(ranges) == 1:
        await fetch(*ranges[0])
    else:
        async with anyio.create_task_group() as group:
            for part, begin in ranges:
                group.start_soon(fetch, part, begin)
    return [
        reasons.get((b.pack, b.offset))
        or (b.header, places[b.pack, b.offset], b.stored_bytes, b.offset, b.raw_bytes, b.codec)
        for b in blocks
    ]
