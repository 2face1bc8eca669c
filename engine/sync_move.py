"""Move: read blocks from one repository, verify their chunks, and store them in another, sealed anew.

    ranges ──► open ───────────────────────────► dedup ──► seal ──► upload
    of packs   threads: decrypt, decompress,     of parts   whole blocks are sealed as they are:
               verify ids, make the target's     only       they need not be compressed again

A block of which all chunks are wanted is handed on as it was compressed; of another the wanted chunks are copied out,
and gathered into new blocks. Memory, in the order the bytes flow: slabs (a range as stored, and decrypted), blocks
(`Limits.blocks`), pack buffers (uploads + 3).
"""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import msgspec
import zstandard
from anyio import to_thread
from blake3 import blake3

from coffret.engine.dedup import dedup_stage
from coffret.engine.errors import ChunkMissing, Damaged
from coffret.engine.fetch import LOST, MAX_RANGE_BYTES, Range, coalesce, unreadable
from coffret.engine.flow import Channel
from coffret.engine.messages import RawBlock, Run
from coffret.engine.packfile import pack_name
from coffret.engine.pipeline import Storing
from coffret.engine.records import REF_BYTES, iter_refs, pack_ref
from coffret.engine.sealing import RAW, TAG_BYTES, ZSTD
from coffret.engine.settings import BLOCK_BYTES, MIB
from coffret.engine.sync_slabs import Slabs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from coffret.engine.chunkpool import Slab
    from coffret.engine.index import IndexWriter
    from coffret.engine.known import KnownChunks
    from coffret.engine.mirror import Location
    from coffret.engine.pipeline import Limits
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository

    Note = Callable[[Mapping[bytes, bytes]], Awaitable[None]]
    _Key = tuple[bytes, int, int, int, int]

# Ranges in flight, each with the room of two: enough for a line with latency, and two more than threads to open them.
_MIN_SLABS, _MAX_SLABS = 4, 8
# What is opened of a range at a time, in bytes after decompression: a block that compresses well may have thirty times
# as many as it is stored in.
_OPENED_BYTES = 8 << 20
# Chunks are noted as moved when there are so many.
_NOTED = 256
# As many uploads as a local disk is given; more of them hold memory that slabs then do without.
_FEW_UPLOADS = 2


class _Wanted(msgspec.Struct):
    """A block, and the chunks of it that are wanted: by their place in it, (id in the source, length)."""

    location: Location
    chunks: dict[int, tuple[bytes, int]] = msgspec.field(default_factory=dict)

    def in_order(self) -> list[tuple[int, bytes, int]]:
        """(place, id, length) of the chunks, in their order in the block."""
        return [(inner, *self.chunks[inner]) for inner in sorted(self.chunks)]

    @property
    def whole(self) -> bool:
        """Whether the wanted chunks are all of the block, one behind the other."""
        at = 0
        for inner, _, length in self.in_order():
            if inner != at:
                return False
            at += length
        return at == self.location.raw_bytes


class _Opened(msgspec.Struct):
    """What came of a block: the target's refs of the wanted chunks, in order; and the block packed, or their bytes."""

    block: _Wanted
    refs: bytes
    packed: memoryview | bytes | None = None
    data: bytes = b""


class Found(dict[bytes, bytes]):
    """Ids of chunks in the target, by those in the source; `note` is told of them, some hundred at a time."""

    def __init__(self, note: Note) -> None:
        super().__init__()
        self._note = note
        self._fresh: dict[bytes, bytes] = {}

    async def add(self, source_id: bytes, target_id: bytes) -> None:
        """One was moved."""
        self[source_id] = self._fresh[source_id] = target_id
        if len(self._fresh) >= _NOTED:
            await self.flush()

    async def flush(self) -> None:
        """Note those that are not noted yet."""
        fresh, self._fresh = self._fresh, {}
        await self._note(fresh)


class Mover:
    """Moves chunks from `source` to `target` for one attempt of the target's. Use within `at_work`.

    `level`: what parts of blocks, and catalogs, are compressed with; None for not at all. `repack`: whole blocks too.
    """

    def __init__(
        self,
        source: Repository,
        target: Repository,
        *,
        attempt: bytes,
        known: KnownChunks,
        index: IndexWriter,
        level: int | None,
        repack: bool,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._source, self._target, self._known, self._index = source, target, known, index
        self._repack, self._progress = repack, progress
        limits = limits.suited(target.connector.capabilities)
        self._fetcher = source.fetcher()
        self._from, self._to = source.secrets.id_key, target.secrets.id_key
        gets = source.connector.capabilities.parallel_gets
        count = max(_MIN_SLABS, min(gets + 2, _MAX_SLABS) - max(0, limits.uploads - _FEW_UPLOADS))
        self._slabs = Slabs(count, max(MAX_RANGE_BYTES, source.config.chunker.max_bytes + TAG_BYTES))
        self._gets, self._openers = anyio.CapacityLimiter(gets), anyio.CapacityLimiter(limits.sealers)
        self._readers = count
        self._largest = max(BLOCK_BYTES, source.config.chunker.max_bytes)
        self._runs = Channel[Run]("runs", max_items=64, max_bytes=4 * MIB, size=lambda run: run.size_bytes)
        self._storing = Storing(
            connector=target.connector,
            sealer=target.sealer,
            pack_bytes=target.config.pack_bytes,
            attempt=attempt,
            index=index,
            level=level,
            limits=msgspec.structs.replace(limits, blocks=2 * limits.blocks),  # two send: those who open, and dedup
            kept=target.kept,
            progress=progress,
        )
        self._run_outbox, self._block_outbox = self._runs.sender(), self._storing.blocks.sender()
        self._dedup_outbox = self._storing.blocks.sender()
        progress.channels = [self._runs.statistics, *self._storing.statistics]
        # Packs of the source that were found to be bad, and whether it was listed anew for that.
        self._bad: set[bytes] = set()
        self._relisted = False
        self._local = threading.local()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Run the stages beside the body; when it is left, all that was given is stored, and handed to the index."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._dedup)
                self._storing.start(group)
                yield
                self._run_outbox.close()
                self._block_outbox.close()
        finally:
            self._storing.close()
            self._slabs.close()

    async def store(self, runs: Sequence[Run]) -> None:
        """Store chunks of the target's own, as far as it lacks them."""
        for run in runs:
            await self._run_outbox.send(run)

    async def move(self, wanted: Mapping[bytes, int], note: Note) -> dict[bytes, bytes]:
        """Move chunks, given by id in the source and length in bytes; return their ids in the target.

        Each is read, verified and handed on; it is stored by the end of `at_work`. `note` is told of them as they go.

        :raises ChunkMissing: if one has no usable copy in the source
        :raises ConnectorError: if a storage can't be asked
        """
        found = Found(note)
        todo = wanted
        while todo:
            failed = await self._move(todo, found)
            await found.flush()
            todo = {chunk_id: length for chunk_id, length in wanted.items() if chunk_id not in found}
            for pack, reason in failed.items():
                if pack not in self._bad:
                    self._bad.add(pack)
                elif self._relisted or self._source.mirror.relist is None:
                    raise ChunkMissing(reason, pack=pack or None)
                else:
                    self._relisted = True
                    await self._source.mirror.relist()
        return found

    async def _move(self, wanted: Mapping[bytes, int], found: Found) -> dict[bytes, str]:
        """Move what can be; return the packs where something can't be had, and why."""
        failed: dict[bytes, str] = {}
        blocks: dict[_Key, _Wanted] = {}
        locations = await self._source.mirror.locate(list(wanted), avoid=frozenset(self._bad))
        for (chunk_id, length), location in zip(wanted.items(), locations, strict=True):
            if location is None or location.length != length:
                self._bad.add(b"")  # stands for no pack at all
                failed[b""] = f"chunk {chunk_id.hex()[:16]} is in no pack"
                continue
            block = blocks.get(key_of(location))
            if block is None:
                block = blocks[key_of(location)] = _Wanted(location)
            block.chunks[location.inner] = chunk_id, length
        if failed:
            return failed
        parts = iter(coalesce([block.location for block in blocks.values()], self._gap))
        async with anyio.create_task_group() as group:
            for _ in range(self._readers):
                group.start_soon(self._read, parts, blocks, found, failed)
        return failed

    @property
    def _gap(self) -> int:
        return self._source.connector.capabilities.coalesce_gap_bytes

    async def _read(
        self,
        parts: Iterator[Range],
        blocks: Mapping[_Key, _Wanted],
        found: Found,
        failed: dict[bytes, str],
    ) -> None:
        """One of several readers: take ranges, and see that what they hold comes to the target."""
        for part in parts:
            reason = await self._range(part, blocks, found, failed)
            if reason and len(part.blocks) > 1:  # the others may be whole
                for b in part.blocks:
                    alone = Range(b.pack, b.offset, b.offset + b.stored_bytes, [b])
                    if lost := await self._range(alone, blocks, found, failed):
                        failed[b.pack] = lost
            elif reason:
                failed[part.pack] = reason

    async def _range(self, part: Range, blocks: Mapping[_Key, _Wanted], found: Found, failed: dict[bytes, str]) -> str:
        """Fetch a range, and hand on what it holds; return why it can't be fetched, or ""."""
        slab = await self._slabs.acquire()
        try:
            reason = await self._fetch(part, slab)
            if not reason:
                apart, end = [], part.begin
                for block in part.blocks:
                    # Else what the one is decrypted to would be overwritten by the other.
                    if block.offset < end:
                        failed[block.pack] = f"{pack_name(block.pack)}: index objects have its blocks overlap"
                    else:
                        apart.append(blocks[key_of(block)])
                        end = block.offset + block.stored_bytes
                for few in _by_size(apart):
                    await self._hand_on(part, few, slab, found, failed)
            return reason
        finally:
            slab.release()

    async def _fetch(self, part: Range, slab: Slab) -> str:
        """Fetch a range into a slab; return why that can't be done, or "".

        :raises ConnectorError: if the storage can't be asked, which is no damage
        """
        name, size_bytes = pack_name(part.pack), part.end - part.begin
        if size_bytes > self._slabs.half_bytes:
            return f"{name} has a block of {size_bytes} bytes, more than any"
        async with self._gets:
            try:
                await self._source.connector.get_into(name, part.begin, slab.view[:size_bytes])
            except LOST as error:
                return unreadable(name, error)
        return ""

    async def _hand_on(
        self,
        part: Range,
        wanted: Sequence[_Wanted],
        slab: Slab,
        found: Found,
        failed: dict[bytes, str],
    ) -> None:
        """Open blocks of a range, and hand on what the target lacks of them."""
        opened, lost = await to_thread.run_sync(self._open, part, wanted, slab.view, limiter=self._openers)
        failed.update(lost)
        for each in opened:
            for (_, chunk_id, length), (target_id, _) in zip(each.block.in_order(), iter_refs(each.refs), strict=True):
                await found.add(chunk_id, target_id)
                self._progress.read_bytes += length
        packed = [each for each in opened if each.packed is not None]
        fresh = iter(await self._known.claim(b"".join([each.refs for each in packed])) if packed else [])
        for each in packed:
            await self._whole(each, [next(fresh) for _ in each.block.chunks], slab)
        for each in opened:
            if each.packed is None:
                await self._run_outbox.send(Run(each.data, each.refs))

    async def _whole(self, opened: _Opened, fresh: list[bool], slab: Slab) -> None:
        """Send on a block of which all chunks are wanted: as it is, if the target lacks them all."""
        location = opened.block.location
        if all(fresh):
            slab.hold()
            block = RawBlock(False, [], [opened.refs], location.raw_bytes, [slab], opened.packed, location.codec)
            self._progress.added_bytes += block.raw_bytes
            await self._block_outbox.send(block)
        elif any(fresh):
            data, refs = await to_thread.run_sync(self._fresh_part, opened, fresh, limiter=self._openers)
            await self._run_outbox.send(Run(data, refs, claimed=True))

    # What follows runs in threads.

    def _open(self, part: Range, wanted: Sequence[_Wanted], view: memoryview) -> tuple[list[_Opened], dict[bytes, str]]:
        """Decrypt, decompress and verify the blocks of a range; tell which pack is damaged, if it is, and why."""
        opened: list[_Opened] = []
        failed: dict[bytes, str] = {}
        for block in wanted:
            location, at = block.location, block.location.offset - part.begin
            try:
                if location.raw_bytes > self._largest or location.codec not in (RAW, ZSTD):
                    raise Damaged("a block is larger or compressed otherwise than any that is made")
                cipher = self._fetcher.cipher(location.header)
                sealed = view[at : at + location.stored_bytes]
                body = cipher.open_into(sealed, location.offset, view[self._slabs.half_bytes + at :])
                opened.append(self._translate(block, body, self._unpack(location, body)))
            except Damaged as error:
                failed[location.pack] = f"{pack_name(location.pack)} at {location.offset}: {error}"
        return opened, failed

    def _unpack(self, location: Location, body: memoryview | bytes) -> memoryview:
        if location.codec == RAW:
            data = memoryview(body)
        else:
            if not hasattr(self._local, "zstd"):
                self._local.zstd = zstandard.ZstdDecompressor()
            try:
                if zstandard.frame_content_size(body) != location.raw_bytes:
                    raise Damaged("a block declares another length than its table")
                data = memoryview(self._local.zstd.decompress(body))
            except zstandard.ZstdError:
                raise Damaged("a block does not decompress") from None
        if len(data) != location.raw_bytes:
            raise Damaged("a block has another length than its table says")
        return data

    def _translate(self, block: _Wanted, body: memoryview, data: memoryview) -> _Opened:
        refs, parts = [], []
        for inner, chunk_id, length in block.in_order():
            piece = data[inner : inner + length]
            if len(piece) != length or blake3(piece, key=self._from).digest() != chunk_id:
                raise Damaged(f"chunk {chunk_id.hex()[:16]} does not have its id")
            target_id = chunk_id if self._from == self._to else blake3(piece, key=self._to).digest()
            refs.append(pack_ref(target_id, length))
            parts.append(piece)
        if block.whole and not self._repack:
            return _Opened(block, b"".join(refs), packed=body)
        return _Opened(block, b"".join(refs), data=b"".join(parts))

    def _fresh_part(self, opened: _Opened, fresh: Sequence[bool]) -> tuple[bytes, bytes]:
        """(bytes, refs) of those chunks of a whole block that are to be stored."""
        assert opened.packed is not None
        data = self._unpack(opened.block.location, opened.packed)
        parts, refs = [], []
        for number, (inner, _, length) in enumerate(opened.block.in_order()):
            if fresh[number]:
                parts.append(data[inner : inner + length])
                refs.append(opened.refs[number * REF_BYTES : (number + 1) * REF_BYTES])
        return b"".join(parts), b"".join(refs)

    # The target's dedup.

    async def _dedup(self) -> None:
        await dedup_stage(self._runs, self._dedup_outbox, known=self._known, index=self._index, progress=self._progress)


def key_of(location: Location) -> _Key:
    """What makes two locations one block: of a pack that index objects tell differently of there are several."""
    return location.pack, location.offset, location.stored_bytes, location.raw_bytes, location.codec


def _by_size(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Neighbouring blocks, so many that they stay small when they are opened, but one at least."""
    few: list[_Wanted] = []
    raw_bytes = 0
    for block in wanted:
        if few and raw_bytes + block.location.raw_bytes > _OPENED_BYTES:
            yield few
            few, raw_bytes = [], 0
        few.append(block)
        raw_bytes += block.location.raw_bytes
    if few:
        yield few
