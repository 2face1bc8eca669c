"""What the index mirror costs as it grows: merging, looking up, disk; and beside it, the B-tree it was chosen over.

Made-up index objects of so many chunks, in packs of 30 chunks of 1 MiB, are merged one or several a call until the
mirror holds all chunks. At each step it is asked for chunks that it has and that it has not. One JSON line a step.

    python -m bench.mirror [--chunks 50e6] [--per-object 4096] [--per-merge 1] [--step 5e6] [--btree] [--dir DIR]

Needs 60 bytes a chunk of disk (twice that while it folds), the B-tree 120 to 210 and the package `lmdb`.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import msgspec

from bench.results import Run, this_run
from coffret.engine.mirror import Mirror
from coffret.engine.records import Block, IndexObject, PackTable, pack_ref

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_FILE = Path(__file__).parent / "mirror.jsonl"
_CHUNKS_PER_PACK, _CHUNK_BYTES = 30, 1 << 20
_KEPT_SHARE = 0.005  # of the ids, to ask for later
_ASKED = 20_000
_BATCH = 500  # ids a look-up call, as deduplication asks


class Step(msgspec.Struct, tag="mirror"):
    """One step: the chunks held at its end and what merging those that it added cost, per chunk; look-ups, per id."""

    run: Run
    kind: str
    per_object: int
    per_merge: int
    chunks: int
    merge_us: float
    merge_cpu_us: float
    longest_merge_s: float
    hit_us: float
    hit_cpu_us: float
    miss_us: float
    miss_cpu_us: float
    disk_bytes_per_chunk: float
    files: int
    anonymous_mb: float


class Subject(Protocol):
    """What is measured."""

    async def merge(self, items: Sequence[tuple[str, IndexObject]]) -> None: ...

    async def absent(self, ids: Sequence[bytes]) -> int:
        """How many of these are not there."""


class Ours:
    """The mirror as it is."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self.merge = mirror.merge

    async def absent(self, ids: Sequence[bytes]) -> int:
        return len((await self._mirror.sift(ids)).absent)


class BTree:
    """The same rows in an LMDB B-tree, sorted within each transaction, in the thread of the event loop: no hop."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self._environment: Any = lmdb.open(str(folder), map_size=1 << 40, readahead=False, meminit=False)
        self._section = 0

    async def merge(self, items: Sequence[tuple[str, IndexObject]]) -> None:
        rows, value = [], struct.Struct("=IIIIIB").pack
        for _, index in items:
            for table in index.packs:
                self._section += 1
                section = self._section.to_bytes(4, "big")
                for block in table.blocks:
                    where = value(block.offset, block.stored_bytes, block.raw_bytes, 0, block.raw_bytes, block.codec)
                    rows.append((block.refs[:32] + section, where))
        rows.sort()
        with self._environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(rows)

    async def absent(self, ids: Sequence[bytes]) -> int:
        with self._environment.begin() as transaction:
            cursor = transaction.cursor()
            seek, key = cursor.set_range, cursor.key
            return sum(not (seek(chunk_id) and key()[:32] == chunk_id) for chunk_id in ids)


def made_up(chunks: int, kept: list[bytes]) -> IndexObject:
    """An index object of random chunk ids, of which some are remembered."""
    ids, tables = os.urandom(32 * chunks), []
    for first in range(0, chunks, _CHUNKS_PER_PACK):
        blocks = []
        for number in range(first, min(first + _CHUNKS_PER_PACK, chunks)):
            ref = pack_ref(ids[32 * number : 32 * number + 32], _CHUNK_BYTES)
            offset = 64 + (number - first) * (_CHUNK_BYTES + 16)
            blocks.append(Block(offset, _CHUNK_BYTES + 16, _CHUNK_BYTES, 0, ref))
        tables.append(PackTable(os.urandom(32), bytes(64), _CHUNKS_PER_PACK * _CHUNK_BYTES, blocks))
    kept += (ids[32 * n : 32 * n + 32] for n in random.sample(range(chunks), max(1, int(chunks * _KEPT_SHARE))))
    return IndexObject(tables)


async def grow(subject: Subject, folder: Path, options: argparse.Namespace, run: Run) -> None:
    """Merge until all chunks are there; report each step."""
    chunks, number, kept = 0, 0, list[bytes]()
    while chunks < options.chunks:
        added, wall_s, cpu_s, longest_s = 0, 0.0, 0.0, 0.0
        while added < min(options.step, options.chunks - chunks):
            items = []
            for _ in range(options.per_merge):
                items.append((f"index/{number:032x}-0", made_up(options.per_object, kept)))
                number += 1
            wall, cpu = time.perf_counter(), time.process_time()
            await subject.merge(items)
            took_s = time.perf_counter() - wall
            wall_s, cpu_s, longest_s = wall_s + took_s, cpu_s + time.process_time() - cpu, max(longest_s, took_s)
            added += options.per_object * options.per_merge
        chunks += added
        hits = random.choices(kept, k=_ASKED)
        hit_us, hit_cpu_us = await ask(subject, hits, 0)
        miss_us, miss_cpu_us = await ask(subject, [os.urandom(32) for _ in hits], _BATCH)
        sizes = [entry.stat() for entry in os.scandir(folder)]
        step = Step(
            run,
            "B-tree" if options.btree else "runs",
            options.per_object,
            options.per_merge,
            chunks,
            round(wall_s / added * 1e6, 2),
            round(cpu_s / added * 1e6, 2),
            round(longest_s, 2),
            round(hit_us, 2),
            round(hit_cpu_us, 2),
            round(miss_us, 2),
            round(miss_cpu_us, 2),
            round(sum(size.st_blocks * 512 for size in sizes) / chunks, 1),
            len(sizes),
            round(anonymous_mb(), 1),
        )
        print(
            f"{chunks / 1e6:6.1f} M  merge {step.merge_us:6.2f} µs (CPU {step.merge_cpu_us:.2f}), longest "
            f"{step.longest_merge_s:.2f} s  hit {hit_us:.2f} µs (CPU {hit_cpu_us:.2f})  miss {miss_us:.2f} µs "
            f"(CPU {miss_cpu_us:.2f})  "
            f"{step.disk_bytes_per_chunk} B/chunk in {step.files} files  {step.anonymous_mb} MB anonymous",
            flush=True,
        )
        with options.file.open("ab") as file:
            file.write(msgspec.json.encode(step) + b"\n")


async def ask(subject: Subject, ids: list[bytes], absent: int) -> tuple[float, float]:
    """Look ids up, of which `absent` a batch are not there; the second time counts. µs an id, wall and CPU."""
    wall_s = cpu_s = 0.0
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        for at in range(0, len(ids), _BATCH):
            if await subject.absent(ids[at : at + _BATCH]) != absent:
                raise AssertionError("a look-up gave a wrong answer")
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return wall_s / len(ids) * 1e6, cpu_s / len(ids) * 1e6


def anonymous_mb() -> float:
    """Memory that is this process's own, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--chunks", 50e6), ("--step", 5e6), ("--per-object", 4096), ("--per-merge", 1)):
        parser.add_argument(option, type=lambda text: int(float(text)), default=int(default))
    parser.add_argument("--btree", action="store_true", help="measure an LMDB B-tree instead")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--file", type=Path, default=DEFAULT_FILE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="coffret-bench-mirror-", dir=options.dir) as name:
        folder, run = Path(name), this_run(options.dir)
        if options.btree:
            await grow(BTree(folder), folder, options, run)
            return
        async with await Mirror.open(folder, "bench") as mirror:
            # Every attempt is settled, as in a repository at rest.
            numbers = range(options.chunks // options.per_object + options.per_merge + 1)
            await mirror.reconcile([], settled=[f"{number:032x}" for number in numbers])
            await grow(Ours(mirror), folder, options, run)
        start = time.perf_counter()
        async with await Mirror.open(folder, "bench") as mirror:
            names = [f"index/{number:032x}-0" for number in numbers]
            await mirror.reconcile(names, settled=[f"{number:032x}" for number in numbers])
            print(f"opened in {time.perf_counter() - start:.3f} s, with {len(mirror.objects)} index objects")


if __name__ == "__main__":
    anyio.run(main)
