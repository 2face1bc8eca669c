"""Dedup: keep the chunks the repository lacks, and gather them into blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blake3 import blake3

from coffret.engine.records import REF_BYTES, iter_refs, pack_ref
from coffret.engine.settings import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coffret.engine.chunkpool import Slab
    from coffret.engine.flow import Channel, Sender
    from coffret.engine.known import KnownChunks
    from coffret.engine.progress import Progress

# A chunk this large is a block of its own; smaller ones are gathered.
_LARGE = BLOCK_BYTES // 2
# What is left of a slab is sealed from there when it is nearly a block; less is copied, so that the slab can go back.
_NEARLY = BLOCK_BYTES * 3 // 4


@dataclass(slots=True)
class Run:
    """Chunks that lie one behind the other in `view`: file contents in a slab, or catalog chunks (`meta`)."""

    view: memoryview | bytes
    refs: bytes
    slab: Slab | None = None
    meta: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes held in memory of its own; those in a slab are counted there."""
        return 0 if self.slab else len(self.view)


@dataclass(slots=True)
class RawBlock:
    """A block before sealing: parts to be joined, their chunks' refs, and the slabs they lie in."""

    meta: bool
    parts: list[memoryview | bytes] = field(default_factory=list)
    refs: list[bytes] = field(default_factory=list)
    raw_bytes: int = 0
    slabs: list[Slab] = field(default_factory=list)

    def release(self) -> None:
        """The parts are no longer needed."""
        self.parts.clear()
        for slab in self.slabs:
            slab.release()
        self.slabs.clear()


class Gatherer:
    """Cuts runs of chunks into blocks: contiguous new chunks are taken where they lie, without a copy."""

    def __init__(self, *, meta: bool) -> None:
        self._meta = meta
        self._open = RawBlock(meta)

    def add(self, run: Run, fresh: Iterable[bool]) -> list[RawBlock]:
        """The blocks that became full; `fresh` tells which of the run's chunks are wanted."""
        blocks: list[RawBlock] = []
        view, refs, block = memoryview(run.view), run.refs, self._open
        at = begin = 0  # the current part is view[begin:at]
        for number, ((_, length), wanted) in enumerate(zip(iter_refs(refs), fresh, strict=True)):
            if not wanted or length >= _LARGE or block.raw_bytes + length > BLOCK_BYTES:
                if begin < at:
                    block.parts.append(view[begin:at])
                begin = at
                if block.raw_bytes + length > BLOCK_BYTES and wanted and length < _LARGE:
                    blocks.append(self._hold(block, run))
                    block = RawBlock(self._meta)
            ref = refs[number * REF_BYTES : (number + 1) * REF_BYTES]
            if wanted and length >= _LARGE:
                single = RawBlock(self._meta, [view[at : at + length]], [ref], length)
                blocks.append(self._hold(single, run))
            elif wanted:
                block.refs.append(ref)
                block.raw_bytes += length
            at += length
            if not wanted or length >= _LARGE:
                begin = at
        if begin < at:
            block.parts.append(view[begin:at])
        if block.raw_bytes >= _NEARLY:
            blocks.append(self._hold(block, run))
            block = RawBlock(self._meta)
        elif run.slab is not None:
            block.parts = [bytes(part) if isinstance(part, memoryview) else part for part in block.parts]
        self._open = block
        return blocks

    def rest(self) -> list[RawBlock]:
        """The last block, when nothing more comes."""
        block, self._open = self._open, RawBlock(self._meta)
        return [block] if block.refs else []

    @staticmethod
    def _hold(block: RawBlock, run: Run) -> RawBlock:
        if run.slab is not None:
            run.slab.hold()
            block.slabs.append(run.slab)
        return block


class MetaChunks:
    """Chunks of the engine's own making (pages, lists, large attributes), on their way to dedup.

    `store` may be called in any thread; what it queues is taken by `runs`.
    """

    def __init__(self, id_key: bytes) -> None:
        self._id_key = id_key
        self._queue: list[Run] = []

    def store(self, payload: bytes) -> bytes:
        """Queue a payload, in pieces of at most a block; return their packed refs."""
        refs = []
        for at in range(0, len(payload), BLOCK_BYTES):
            piece = payload[at : at + BLOCK_BYTES]
            ref = pack_ref(blake3(piece, key=self._id_key).digest(), len(piece))
            refs.append(ref)
            self._queue.append(Run(piece, ref, meta=True))
        return b"".join(refs)

    def runs(self) -> list[Run]:
        """Take what is queued."""
        queue, self._queue = self._queue, []
        return queue


async def dedup_stage(inbox: Channel[Run], outbox: Sender[RawBlock], *, known: KnownChunks, progress: Progress) -> None:
    """Drop chunks that are known; send the others on in blocks. Slabs of which nothing is new go back at once."""
    data, meta = Gatherer(meta=False), Gatherer(meta=True)
    with outbox:
        async for run in inbox:
            fresh = await known.claim(run.refs)
            gatherer = meta if run.meta else data
            for block in gatherer.add(run, fresh):
                progress.added_bytes += block.raw_bytes
                await outbox.send(block)
            if run.slab is not None:
                run.slab.release()
        for block in (*data.rest(), *meta.rest()):
            progress.added_bytes += block.raw_bytes
            await outbox.send(block)
