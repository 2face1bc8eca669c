"""Dedup: keep the chunks the repository lacks, and gather them into blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.engine.messages import RawBlock
from coffret.engine.records import REF_BYTES, iter_refs
from coffret.engine.settings import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coffret.engine.flow import Channel, Sender
    from coffret.engine.index import IndexWriter
    from coffret.engine.known import KnownChunks
    from coffret.engine.messages import Run
    from coffret.engine.progress import Progress

# A chunk this large is a block of its own; smaller ones are gathered.
_LARGE = BLOCK_BYTES // 2
# What is left of a slab is sealed from there when it is nearly a block; less is copied, so that the slab can go back.
_NEARLY = BLOCK_BYTES * 3 // 4


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
        else:
            # A copy: what is kept of a run holds neither its slab nor the rest of it.
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


async def dedup_stage(
    inbox: Channel[Run], outbox: Sender[RawBlock], *, known: KnownChunks, index: IndexWriter, progress: Progress
) -> None:
    """Drop chunks that are known; send the others on in blocks. Slabs of which nothing is new go back at once.

    What is adopted is held in memory until it is indexed, though no pack comes.
    """
    data, meta = Gatherer(meta=False), Gatherer(meta=True)
    with outbox:
        async for run in inbox:
            fresh = [True] * (len(run.refs) // REF_BYTES) if run.claimed else await known.claim(run.refs)
            gatherer = meta if run.meta else data
            for block in gatherer.add(run, fresh):
                progress.added_bytes += block.raw_bytes
                await outbox.send(block)
            if run.slab is not None:
                run.slab.release()
            if known.adopted:
                await index.relieve()
        for block in (*data.rest(), *meta.rest()):
            progress.added_bytes += block.raw_bytes
            await outbox.send(block)
