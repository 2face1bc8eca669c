"""How runs come to be: from index objects, and folded together from smaller runs."""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from operator import itemgetter
from typing import TYPE_CHECKING

from coffret.engine._rows import bucket_starts, rows_of, sort_rows
from coffret.engine.errors import Damaged
from coffret.engine.mirror_run import HEADER, HINT_AT, MAGIC, MAX_ROWS, PACK, ROW, BadRun, RunInfo, Span
from coffret.engine.records import ID_BYTES, UNNAMED
from coffret.engine.sealing import HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from pathlib import Path

    from coffret.engine.mirror_run import Run
    from coffret.engine.mirror_store import Manifest
    from coffret.engine.records import IndexObject, PackTable

# Rows gathered in memory before they are sorted and written as a run: 4 MB, and three times as much meanwhile.
FRESH_ROWS = 1 << 16
# Rows of a bucket, on average, are between half of this and this: one look-up in twenty of what is not there meets a
# hint that is right by chance. A bucket takes four bytes.
_BUCKET_ROWS = 16
# Folding goes piece by piece: at least so many buckets has every run, and so many rows, about, has a piece.
_MIN_BITS = 12
_PIECE_ROWS = 16_384
_WRITE_BYTES = 1 << 20
# Which runs are folded: those smaller than FOLD_ROWS together, always, and one that has less than FOLD_FACTOR times the
# rows of all smaller ones. Growing to 50 M chunks by 100,000 a merge (by 4,096), that leaves 3.0 (4.3) runs on average
# to look into, and a row is written 9 (14) times; with a factor of 1: 4.5 (6.2) and 6 (12); of 4: 2.7 (4.0), 10 (15).
_FOLD_ROWS, _FOLD_FACTOR = 1 << 14, 3
# A run is rewritten when more than this share of its rows is of index objects that are gone.
_GARBAGE_SHARE = 0.25

_split_rows = struct.Struct(f"{ROW.size}s").iter_unpack


class RunWriter:
    """Writes one run: rows in order, piece by piece, then packs and table. Nobody sees it before the manifest does."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._token = os.urandom(16)
        self._path = folder / f"{self._token.hex()}.run"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._bits = min(32, max(_MIN_BITS, (rows // _BUCKET_ROWS).bit_length()))
        self._table = array("I")
        self._rows, self._done = rows, 0

    def add(self, rows: bytes, piece: int = 0, bits: int = 0) -> None:
        """Append sorted rows: all those whose ids begin with the `bits` bits of `piece`."""
        step, first = self._bits - bits, HEADER.size + self._done
        self._table.frombytes(bucket_starts(rows, piece << step, (piece + 1) << step, 32 - self._bits, first))
        self._write(rows[HINT_AT :: ROW.size], first)
        self._write(rows, HEADER.size + self._rows + self._done * ROW.size)
        self._done += len(rows) // ROW.size

    def finish(self, packs: Iterable[bytes], spans: list[Span]) -> RunInfo:
        """Write what follows the rows. It is not durable yet: what is folded at once need never be.

        :raises BadRun: if there were not as many rows as were announced
        """
        if self._done != self._rows:
            raise BadRun(f"{self._done} rows where {self._rows} should be")
        sections = sum(span.sections for span in spans)
        self._write(HEADER.pack(MAGIC, self._token, self._rows, sections, self._bits), 0)
        at, held = HEADER.size + self._rows + self._rows * ROW.size, bytearray()
        for records in packs:
            held += records
            if len(held) > _WRITE_BYTES:
                at = self._write(held, at)
                held = bytearray()
        self._table.append(HEADER.size + self._rows)
        at = self._write(self._table.tobytes(), self._write(held, at))
        os.close(self._fd)
        return RunInfo(self._token, self._rows, at, spans)

    def discard(self) -> None:
        """Remove a file that is not finished."""
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def _write(self, data: bytes | bytearray, at: int) -> int:
        """Write all of it at an offset; return the offset behind it."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written
        return at


class FreshRuns:
    """Turns index objects into runs of bounded size, in order of their sections."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._rows: list[bytes] = []  # several in each
        self._count = 0
        self._packs: list[bytes] = []
        self._spans: list[Span] = []

    def add(self, name: str, index: IndexObject) -> Iterator[RunInfo]:
        """Enter an index object into the manifest; iterate over the runs that became full."""
        first = self._manifest.next_section
        start, rows_before = first, self._count
        try:
            for section, table in enumerate(index.packs, first):
                self._rows.append(rows_of(table.blocks, section, UNNAMED))
                self._count += len(self._rows[-1]) // ROW.size
                self._packs.append(_pack_record(table))
                if self._count >= FRESH_ROWS or section == first + len(index.packs) - 1:
                    self._spans.append(Span(first, start, section + 1 - start, self._count - rows_before))
                    if self._count >= FRESH_ROWS:
                        yield from self.flush()
                    start, rows_before = section + 1, self._count
        except (ValueError, OverflowError, struct.error) as error:
            raise Damaged(f"{name} holds impossible numbers: {error}") from None
        # An index object without packs has a number too: it tells one merging from the next.
        sections = max(1, len(index.packs))
        self._manifest.objects[name] = (first, sections)
        self._manifest.next_section += sections

    def flush(self) -> list[RunInfo]:
        """Write what was gathered as a run, if there is anything."""
        if not self._spans:
            return []
        writer = RunWriter(self._folder, self._count)
        try:
            writer.add(sort_rows(b"".join(self._rows)))
            info = writer.finish(self._packs, self._spans)
        except BaseException:
            writer.discard()
            raise
        self._rows, self._count, self._packs, self._spans = [], 0, [], []
        return [info]


def _pack_record(table: PackTable) -> bytes:
    if len(table.pack) != ID_BYTES or len(table.header) != HEADER_BYTES:
        raise ValueError("an id of another length")
    return PACK.pack(table.pack, table.header, table.size_bytes)


def runs_to_fold(runs: Sequence[Run], live: Callable[[Span], bool]) -> list[Run]:
    """The runs to be folded into one now, none or several (or one that is largely garbage)."""
    sized = sorted(((sum(s.rows for s in run.info.spans if live(s)), run) for run in runs), key=itemgetter(0))
    count = smaller = 0
    for n, (rows, _) in enumerate(sized):
        if n and rows < max(_FOLD_ROWS, _FOLD_FACTOR * smaller) and rows + smaller <= MAX_ROWS:
            count = n + 1
        smaller += rows
    wasteful = [run for rows, run in sized[count:] if rows < (1 - _GARBAGE_SHARE) * run.info.rows]
    return [run for _, run in sized[:count]] + wasteful


def fold(folder: Path, runs: Sequence[Run], live: Callable[[Span], bool]) -> Generator[None, None, RunInfo]:
    """Merge runs into a new one without the spans that are not live; it yields after each piece of work."""
    kept = sorted(
        ((span, run, n) for run in runs for n, span in enumerate(run.info.spans) if live(span)),
        key=lambda item: item[0].first,
    )
    total = sum(span.rows for span, _, _ in kept)
    bits = min(_MIN_BITS, (total // _PIECE_ROWS).bit_length())
    writer = RunWriter(folder, total)
    sources: list[_Source] = []
    try:
        sources += (_Source(folder, run, live) for run in runs)
        for piece in range(1 << bits):
            rows: list[bytes] = []
            for source in sources:
                rows += source.rows(piece, bits)
            rows.sort()  # sorted parts already: this merges them
            writer.add(b"".join(rows), piece, bits)
            yield
        spans = [span for span, _, _ in kept]
        return writer.finish((run.packs(n) for _, run, n in kept), spans)
    except BaseException:
        writer.discard()
        raise
    finally:
        for source in sources:
            source.close()


class _Source:
    """Reads a run in sequence for folding: not through the map, whose pages would each cost a fault."""

    def __init__(self, folder: Path, run: Run, live: Callable[[Span], bool]) -> None:
        self._run = run
        try:
            self._fd = os.open(folder / run.info.file_name, os.O_RDONLY)
        except FileNotFoundError:
            raise BadRun(f"{run.info.file_name} is missing") from None
        self._firsts = [span.first for span in run.info.spans]
        self._live = [live(span) for span in run.info.spans]
        self._all_live = all(self._live)

    def rows(self, piece: int, bits: int) -> list[bytes]:
        """The live rows of a piece, sorted."""
        start, end = self._run.rows_between(piece, bits)
        data = os.pread(self._fd, end - start, start)
        if len(data) != end - start:
            raise BadRun(f"{self._run.info.file_name} is shorter than its table says")
        rows = [row for (row,) in _split_rows(data)]
        if self._all_live:
            return rows
        firsts, live = self._firsts, self._live
        return [row for row in rows if live[bisect_right(firsts, int.from_bytes(row[32:36], "big")) - 1]]

    def close(self) -> None:
        os.close(self._fd)
