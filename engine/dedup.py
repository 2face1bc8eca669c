"""Dedup: keep the chunks the repository lacks, and gather them into blocks."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

from coffret.engine.messages import RawBlock
from coffret.engine.records import REF_BYTES, ref_lengths
from coffret.engine.settings import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    def add(self, run: Run, fresh: Sequence[bool]) -> list[RawBlock]:
        """The blocks that became full; `fresh` tells which of the run's chunks are wanted."""
        blocks: list[RawBlock] = []
        view, refs, lengths = memoryview(run.view), run.refs, ref_lengths(run.refs)
        ends = [0, *accumulate(lengths)]  # chunk n lies from ends[n] to ends[n + 1]
        # Between these lie stretches of small chunks that are wanted, which are taken as a whole.
        stops = [
            n for n, (wanted, length) in enumerate(zip(fresh, lengths, strict=True)) if not wanted or length >= _LARGE
        ]
        begin = 0
        for stop in (*stops, len(lengths)):
            while begin < stop:
                room = BLOCK_BYTES - self._open.raw_bytes
                end = bisect_right(ends, ends[begin] + room, begin, stop + 1) - 1
                self._take(view, refs, ends, begin, end)
                if end < stop:
                    blocks.append(self._hold(self._open, run))
                    self._open = RawBlock(self._meta)
                begin = end
            if stop < len(lengths) and fresh[stop]:
                at, length = ends[stop], lengths[stop]
                single = RawBlock(self._meta, [view[at : at + length]], [_refs_between(refs, stop, stop + 1)], length)
                blocks.append(self._hold(single, run))
            begin = stop + 1
        block = self._open
        if block.raw_bytes >= _NEARLY:
            blocks.append(self._hold(block, run))
            self._open = RawBlock(self._meta)
        else:
            # A copy: what is kept of a run holds neither its slab nor the rest of it.
            block.parts = [bytes(part) if isinstance(part, memoryview) else part for part in block.parts]
        return blocks

    def _take(self, view: memoryview, refs: bytes, ends: list[int], begin: int, end: int) -> None:
        """Put chunks `begin` to `end` of a run into the open block."""
        if begin < end:
            self._open.parts.append(view[ends[begin] : ends[end]])
            self._open.refs.append(_refs_between(refs, begin, end))
            self._open.raw_bytes += ends[end] - ends[begin]

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


def _refs_between(refs: bytes, begin: int, end: int) -> bytes:
    return refs[begin * REF_BYTES : end * REF_BYTES]


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
