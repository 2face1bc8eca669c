"""Runs: immutable sorted files of chunk locations, what the index mirror is made of.

    header | hints | rows, sorted by chunk id | packs | table

A *row* says where a chunk lies. It names its pack by a *section*: each pack of each index object has a number of its
own in the mirror, so that an index object is a range of sections, and forgetting it is forgetting that range. *packs*
holds one record a section, in the order of the run's spans. A *bucket* is the ids that begin with the same `bits` bits;
ids are keyed hashes, so buckets are even. *table* has where the hints of each bucket start, as u32. A *hint* is one
byte of the id, the fifth, for each row: most look-ups of what is not there end at the hints, which are few enough to
stay in the processor's caches, while a row is nearly always a walk through page tables and a wait for memory.

Chosen over an LMDB B-tree by measurement (`bench/mirror.py`, a busy machine of two cores). Growing to 50 M chunks by
index objects of 100,000, a chunk took 10.3 µs of CPU there, and from 10 at first to 21 µs in time, since nearly every
row dirties a page of its own, and 120 to 210 bytes of disk. Here it takes 4.2 µs of CPU and 62 bytes: rows move in
sequence only, nine times in their life. Now and then a merge rewrites nearly everything: 20 s of CPU at 50 M.

Numbers in rows are big-endian so that rows compare as bytes; the rest is native: a run never leaves its machine.
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

from coffret.engine.records import ID_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

# Chunk id; section; offset, stored and raw bytes and codec of the block; where in the raw block, and how long.
ROW = struct.Struct(">32sIIIIIIB")
PACK = struct.Struct(">32s64sQ")  # pack id, its clear header, its size
HEADER = struct.Struct("=Q16sQQQ16x")  # magic, token, rows, sections, bits
MAGIC = 0x0130_6E75_5254_4643  # read as another number where the byte order differs
HINT_AT = 4
_COUNT = struct.Struct("=I")
# Hints are addressed by u32.
MAX_ROWS = (1 << 32) - 1 - HEADER.size


class BadRun(Exception):
    """A run's file is missing, cut short, or not the one that was written."""


class Span(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Sections `first` … `first + sections - 1`, all or a part of one index object's, and how many rows they have.

    `owner` is the index object's own first section, which tells it from all others.
    """

    owner: int
    first: int
    sections: int
    rows: int


class RunInfo(msgspec.Struct, array_like=True, frozen=True):
    """A run as the manifest names it; `spans` are sorted."""

    token: bytes
    rows: int
    size_bytes: int
    spans: list[Span]

    @property
    def file_name(self) -> str:
        """The run's file in the mirror's folder."""
        return f"{self.token.hex()}.run"

    def lies_in(self, folder: Path) -> bool:
        """Whether the file is (still) there, with its size."""
        try:
            return (folder / self.file_name).stat().st_size == self.size_bytes
        except FileNotFoundError:
            return False


# What is looked for in a run: the first 32 bits of the id, its hint, the id, and its position.
Sought = tuple[int, bytes, bytes, int]
_split = struct.Struct(f">I1s{ID_BYTES - HINT_AT - 1}x").iter_unpack


def sought(ids: Sequence[bytes]) -> list[Sought]:
    """Prepare ids for looking them up in several runs."""
    return [(*parts, chunk, n) for n, (parts, chunk) in enumerate(zip(_split(b"".join(ids)), ids, strict=True))]


class Run:
    """A run, mapped into memory. Look-ups may be made in any thread; the file may be unlinked meanwhile."""

    __slots__ = ("_bases", "_firsts", "_map", "_packs_at", "_rows_at", "_rows_less", "_shift", "_table", "bits", "info")

    def __init__(self, folder: Path, info: RunInfo) -> None:
        """Map the run's file. Touching a page beyond its end would kill the process, so its size is checked first.

        :raises BadRun: if it is not what was written
        """
        self.info = info
        try:
            with (folder / info.file_name).open("rb") as file:
                if os.fstat(file.fileno()).st_size != info.size_bytes or info.size_bytes < HEADER.size:
                    raise BadRun(f"{info.file_name} has another size than was written")
                self._map = mmap.mmap(file.fileno(), info.size_bytes, prot=mmap.PROT_READ)
        except FileNotFoundError:
            raise BadRun(f"{info.file_name} is missing") from None
        magic, token, rows, sections, bits = HEADER.unpack_from(self._map)
        self._bases = list(accumulate((span.sections for span in info.spans), initial=0))
        # The row of a hint at `at` lies at `at * ROW.size + self._rows_less`.
        self._rows_less = HEADER.size + rows - HEADER.size * ROW.size
        self._rows_at = HEADER.size + rows
        self._packs_at = self._rows_at + rows * ROW.size
        table_at = self._packs_at + sections * PACK.size
        if (magic, token, rows, sections) != (MAGIC, info.token, info.rows, self._bases[-1]) or bits > 32:
            raise BadRun(f"{info.file_name} is not the run that was written")
        if table_at + ((1 << bits) + 1) * _COUNT.size != info.size_bytes:
            raise BadRun(f"{info.file_name} has no valid table")
        # Look-ups must not read all rows into memory, as read-around does: where nothing is cached, a hit takes 500 to
        # 700 µs with it and 150 to 300 without. For hints and table, which are small, it is right.
        start = -(-(HEADER.size + rows) // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < self._packs_at:
            self._map.madvise(mmap.MADV_RANDOM, start, self._packs_at - start)
        self._table = memoryview(self._map)[table_at:].cast("I")
        self._firsts = [span.first for span in info.spans]
        self.bits = int(bits)
        self._shift = 32 - self.bits

    def without(self, items: Iterable[Sought]) -> list[Sought]:
        """Those that are not in this run.

        A match that is not at the start of a row would be a coincidence of seven bytes or more of a keyed hash with
        the next, and of the rest with numbers; where the row matters `find` makes sure.
        """
        find, table, shift, row_bytes, less = self._map.find, self._table, self._shift, ROW.size, self._rows_less
        return [
            item
            for item in items
            if (at := find(item[1], table[bucket := item[0] >> shift], end := table[bucket + 1])) < 0
            or find(item[2], at * row_bytes + less, end * row_bytes + less) < 0
        ]

    def first(self, chunk_id: bytes) -> tuple[bytes, int, int, int, int, int, int, int] | None:
        """The first row of a chunk, unpacked: as a rule there is only one."""
        bucket = int.from_bytes(chunk_id[:4], "big") >> self._shift
        table, less = self._table, self._rows_less
        first = table[bucket] * ROW.size + less
        at = self._map.find(chunk_id, first, table[bucket + 1] * ROW.size + less)
        if at < 0:
            return None
        if (at - first) % ROW.size:
            return next(self.find(chunk_id), None)
        return ROW.unpack_from(self._map, at)

    def find(self, chunk_id: bytes) -> Iterator[tuple[bytes, int, int, int, int, int, int, int]]:
        """Iterate over the rows of a chunk, unpacked."""
        for _, row in self.numbered(chunk_id):
            yield row

    def numbered(self, chunk_id: bytes) -> list[tuple[int, tuple[bytes, int, int, int, int, int, int, int]]]:
        """The rows of a chunk as (number of the row in this run, row)."""
        bucket = int.from_bytes(chunk_id[:4], "big") >> self._shift
        hints, hints_end = self._table[bucket], self._table[bucket + 1]
        if self._map.find(chunk_id[HINT_AT : HINT_AT + 1], hints, hints_end) < 0:
            return []
        rows = []
        at = first = hints * ROW.size + self._rows_less
        end = hints_end * ROW.size + self._rows_less
        while (at := self._map.find(chunk_id, at, end)) >= 0:
            if (at - first) % ROW.size:
                at += 1
                continue
            rows.append(((at - self._rows_at) // ROW.size, ROW.unpack_from(self._map, at)))
            at += ROW.size
        return rows

    def row(self, number: int) -> tuple[bytes, int, int, int, int, int, int, int]:
        """The row with this number, unpacked."""
        row: tuple[bytes, int, int, int, int, int, int, int] = ROW.unpack_from(
            self._map, self._rows_at + number * ROW.size
        )
        return row

    def span(self, section: int) -> Span | None:
        """The span that a section belongs to; None if it is not one of this run's, as where the disk has failed."""
        at = bisect_right(self._firsts, section) - 1
        span = self.info.spans[at]
        return span if at >= 0 and section < span.first + span.sections else None

    @property
    def sections(self) -> int:
        """How many sections it has."""
        return self._bases[-1]

    def position(self, section: int) -> int:
        """Which of the run's sections one is, from 0 on; -1 if it is none."""
        at = bisect_right(self._firsts, section) - 1
        if at < 0 or section - self._firsts[at] >= self.info.spans[at].sections:
            return -1
        return self._bases[at] + section - self._firsts[at]

    def pack(self, section: int) -> tuple[bytes, bytes, int]:
        """The pack of one of this run's sections: its id, its clear header, its size in bytes."""
        span = bisect_right(self._firsts, section) - 1
        at = self._packs_at + (self._bases[span] + section - self._firsts[span]) * PACK.size
        pack, header, size_bytes = PACK.unpack_from(self._map, at)
        return pack, header, size_bytes

    def packs(self, span: int) -> bytes:
        """The pack records of the span with this number, as stored."""
        at = self._packs_at + self._bases[span] * PACK.size
        return self._map[at : at + self.info.spans[span].sections * PACK.size]

    def rows_between(self, piece: int, bits: int) -> tuple[int, int]:
        """Where in the file the rows lie whose ids begin with the `bits` bits of `piece`; at most `self.bits`.

        :raises BadRun: if the table says what can't be
        """
        step = self.bits - bits
        first, last = self._table[piece << step], self._table[(piece + 1) << step]
        start, end = first * ROW.size + self._rows_less, last * ROW.size + self._rows_less
        if not HEADER.size <= first <= last or end > self._packs_at:
            raise BadRun(f"{self.info.file_name} has an altered table")
        return start, end
