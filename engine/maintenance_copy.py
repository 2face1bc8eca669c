"""Copy: what is needed of doomed packs, into new ones. Each block is opened, and each chunk's id verified.

    ranges of packs ──► open (threads) ──► seal ──► upload ──► index

A block of which everything is wanted is sealed anew as it was compressed; of another the wanted chunks are gathered
with their neighbours into new blocks. Of a damaged block each chunk is sought elsewhere, and what can't be had is kept
as it is (`maintenance_keep.py`). Memory, in the order the bytes flow: ranges being read (`_READERS` of 8 MiB, and
what they decompress to), blocks (16 MiB), pack buffers (uploads + 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.engine.errors import ChunkMissing, Damaged
from coffret.engine.fetch import Range, coalesce
from coffret.engine.maintenance_keep import DamagedPacks
from coffret.engine.messages import RawBlock
from coffret.engine.packfile import MAX_RAW_BYTES
from coffret.engine.pipeline import Storing
from coffret.engine.records import pack_ref
from coffret.engine.sealing import RAW, ZSTD, decompress
from coffret.engine.settings import BLOCK_BYTES, COMPRESSION_LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from coffret.engine.fetch import Fetcher
    from coffret.engine.flow import Sender
    from coffret.engine.index import IndexWriter
    from coffret.engine.mirror import Location
    from coffret.engine.pipeline import Limits
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository

_READERS = 3
#: Chunks that are looked for at a time: what is known of one takes some 300 bytes.
COPIES_AT_ONCE = 50_000


class Wanted(msgspec.Struct):
    """A block, and what is wanted of it: where in it, which chunk, how long; `meta`: of a catalog."""

    location: Location
    meta: bool
    chunks: list[tuple[int, bytes, int]] = msgspec.field(default_factory=list)


class Gather:
    """Gathers chunks that lie alone into blocks of about a MiB; those of catalogs apart."""

    def __init__(self) -> None:
        self._open = {False: RawBlock(False), True: RawBlock(True)}

    def add(self, meta: bool, chunk_id: bytes, data: bytes) -> list[RawBlock]:
        """Take a chunk; return the block that is full."""
        block, full = self._open[meta], []
        if block.parts and block.raw_bytes + len(data) > BLOCK_BYTES:
            full, block = [block], RawBlock(meta)
        block.parts.append(data)
        block.refs.append(pack_ref(chunk_id, len(data)))
        block.raw_bytes += len(data)
        self._open[meta] = block
        return full

    def finish(self) -> list[RawBlock]:
        """What is left."""
        return [block for block in self._open.values() if block.parts]


class Copier:
    """Copies for one attempt of maintenance. `index` is told of each new pack that is durable.

    `damaged`: the packs of which something could not be read.
    """

    def __init__(
        self,
        repository: Repository,
        fetcher: Fetcher,
        *,
        attempt: bytes,
        index: IndexWriter,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._repository, self._fetcher, self._progress = repository, fetcher, progress
        self._storing = Storing(
            connector=repository.connector,
            sealer=repository.sealer,
            pack_bytes=repository.config.pack_bytes,
            attempt=attempt,
            index=index,
            level=COMPRESSION_LEVELS["default"],
            limits=limits.suited(repository.connector.capabilities),
            kept=repository.kept,
            progress=progress,
        )
        self._outbox = self._storing.blocks.sender()
        progress.channels = self._storing.statistics
        self._gather = Gather()
        self.damaged = DamagedPacks(repository.connector, attempt=attempt, index=index, progress=progress)

    async def run(self, groups: Iterable[list[tuple[bytes, Location, bool]]]) -> None:
        """Copy groups of (chunk id, where it lies, whether of a catalog); each group is of packs of its own.

        :raises ChunkMissing: if a pack can't be read at all
        """
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._read, groups)
                self._storing.start(group)
        finally:
            self._storing.close()

    async def _read(self, groups: Iterable[list[tuple[bytes, Location, bool]]]) -> None:
        with self._outbox as outbox:
            iterator = iter(groups)
            while (found := await to_thread.run_sync(next_wanted, iterator, self._fetcher)) is not None:
                parts, wanted = iter(found[0]), found[1]
                async with anyio.create_task_group() as readers:
                    for _ in range(_READERS):
                        readers.start_soon(self._ranges, parts, wanted, outbox)
            for block in self._gather.finish():
                await outbox.send(block)

    async def _ranges(
        self, parts: Iterator[Range], wanted: dict[tuple[bytes, int], Wanted], outbox: Sender[RawBlock]
    ) -> None:
        """One of several readers, which take ranges in turn."""
        for part in parts:
            data = await self._fetcher.read(part)
            for location in part.blocks:
                each = wanted[location.pack, location.offset]
                try:
                    block, chunks = await to_thread.run_sync(open_wanted, self._fetcher, part, data, each)
                except Damaged as error:
                    block, chunks = None, await self._sought(each, str(error))
                self._progress.size_bytes += sum(length for _, _, length in each.chunks)
                if block is not None:
                    await outbox.send(block)
                for chunk_id, content in chunks:
                    for full in self._gather.add(each.meta, chunk_id, content):
                        await outbox.send(full)

    async def _sought(self, wanted: Wanted, reason: str) -> list[tuple[bytes, bytes]]:
        """What can be had of a damaged block all the same, here or from another pack; the rest is kept as it is."""
        found, lost = [], []
        for inner, chunk_id, length in wanted.chunks:
            try:
                [content] = await self._fetcher.chunks([chunk_id])
            except ChunkMissing:
                lost.append((inner, chunk_id, length))
            else:
                found.append((chunk_id, content))
        if lost:
            await self.damaged.keep(wanted.location, lost, reason)
        return found


def next_wanted(
    groups: Iterator[list[tuple[bytes, Location, bool]]], fetcher: Fetcher
) -> tuple[list[Range], dict[tuple[bytes, int], Wanted]] | None:
    """The ranges of packs to read for the next group, and what is wanted of their blocks; None if none is left.

    For threads.
    """
    if (found := next(groups, None)) is None:
        return None
    wanted = _by_block(found)
    gap_bytes = fetcher.connector.capabilities.coalesce_gap_bytes
    return [*coalesce([each.location for each in wanted.values()], gap_bytes)], wanted


def _by_block(found: list[tuple[bytes, Location, bool]]) -> dict[tuple[bytes, int], Wanted]:
    """What is wanted, by block, in order; a block counts as one of a catalog if anything wanted of it is."""
    blocks: dict[tuple[bytes, int], Wanted] = {}
    for chunk_id, location, meta in sorted(found, key=lambda each: (each[1].pack, each[1].offset, each[1].inner)):
        block = blocks.setdefault((location.pack, location.offset), Wanted(location, meta))
        block.meta = block.meta or meta
        block.chunks.append((location.inner, chunk_id, location.length))
    return blocks


def open_wanted(
    fetcher: Fetcher, part: Range, data: bytes, wanted: Wanted
) -> tuple[RawBlock | None, list[tuple[bytes, bytes]]]:
    """A block as it is to be sealed, if all of it is wanted; else the chunks that are. For threads.

    :raises Damaged: if it is
    """
    location = wanted.location
    at = location.offset - part.begin
    stored = memoryview(data)[at : at + location.stored_bytes]
    if location.raw_bytes > MAX_RAW_BYTES or location.codec not in (RAW, ZSTD):
        raise Damaged("a block is larger or compressed otherwise than any that is made")
    body = fetcher.cipher(location.header).open(stored, location.offset)
    raw = decompress(body, location.raw_bytes) if location.codec == ZSTD else body
    if len(raw) != location.raw_bytes:
        raise Damaged("a block has another length than its table says")
    end, whole, chunks = 0, True, []
    for inner, chunk_id, length in wanted.chunks:
        content = bytes(raw[inner : inner + length])
        if blake3(content, key=fetcher.id_key).digest() != chunk_id:
            raise Damaged(f"chunk {chunk_id.hex()[:16]} does not have its id")
        whole, end = whole and inner == end, inner + length
        chunks.append((chunk_id, content))
    if not whole or end != len(raw):
        return None, chunks
    refs = b"".join(pack_ref(chunk_id, len(content)) for chunk_id, content in chunks)
    return RawBlock(wanted.meta, [], [refs], len(raw), packed=body, codec=location.codec), []
