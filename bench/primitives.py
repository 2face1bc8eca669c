"""What the primitives cost on one core, and the least each scenario can take with them.

The speeds are measured on a sample of the data set itself, so that zstd sees what it will see. The bound of a scenario
is the sum of the CPU time of what it can't do without, spread over all cores; an unchanged backup is one walk over the
tree and is not spread. Time for Python's own work, for waiting and for the kernel's writing is not in it.

    python -m bench.primitives [--dir DIR] [--scale S] big small million
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from bench.datasets import DEFAULT_SEED, NAMES, default_folder, load
from bench.results import DEFAULT_FILE, Primitives, append, this_run
from coffret.engine.chunker import FASTCDC_GEAR64, Chunker
from coffret.engine.records import ChunkerConfig, Entry, Section, decode_page, encode
from coffret.engine.settings import ARGON2_LANES, ARGON2_MEMORY_KIB, ARGON2_PASSES, BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bench.datasets import Dataset
    from bench.results import Run

_SAMPLE_BYTES = 96 << 20
_SAMPLE_FILES = 4_000
_REPEATS = 3
_KEY = bytes(range(32))


def measure_primitives(run: Run, dataset: Dataset, folder: Path) -> Primitives:
    """Measure all primitives by the CPU time of one thread; `folder` is where files may be made."""
    paths = _sample_paths(dataset)
    speeds, stored_share, packed_share = _speeds(_sample_blocks(paths), paths)
    costs = _costs(dataset, paths, folder)
    bounds = _bounds(dataset, speeds, costs, (stored_share, packed_share), len(os.sched_getaffinity(0)))
    return Primitives(
        run=run,
        dataset=dataset,
        megabytes_per_s={name: round(speed / 1e6, 1) for name, speed in speeds.items()},
        microseconds={name: round(cost * 1e6, 2) for name, cost in costs.items()},
        stored_share=round(stored_share, 4),
        bounds_s={name: significant(bound) for name, bound in bounds.items()},
    )


def significant(value: float) -> float:
    """A figure with three digits of its own, however small: rounded to milliseconds a small one is 0."""
    return float(f"{value:.3g}")


def _sample_paths(dataset: Dataset) -> list[Path]:
    """Files spread evenly over the data set, in its order."""
    paths = sorted(Path(directory) / name for directory, _, names in os.walk(dataset.path) for name in names)
    paths = [path for path in paths[:: max(1, len(paths) // _SAMPLE_FILES)] if path.is_file() and not path.is_symlink()]
    return [path for path in paths if path.stat().st_size]


def _sample_blocks(paths: Sequence[Path]) -> list[bytes]:
    """Blocks as a backup makes them: parts of large files, small files gathered."""
    each = _SAMPLE_BYTES // len(paths)
    blocks, gathered = [], bytearray()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < BLOCK_BYTES:
                gathered += file.read()
            else:
                count = max(1, min(each, size) // BLOCK_BYTES)
                for number in range(count):
                    file.seek(number * (size - BLOCK_BYTES) // count)
                    blocks.append(file.read(BLOCK_BYTES))
    blocks += [bytes(gathered[at : at + BLOCK_BYTES]) for at in range(0, len(gathered), BLOCK_BYTES)]
    return blocks[:: max(1, len(blocks) * BLOCK_BYTES // _SAMPLE_BYTES)]


def _speeds(blocks: Sequence[bytes], paths: Sequence[Path]) -> tuple[dict[str, float], float, float]:
    """Bytes a second of what handles bytes; the share of bytes that is stored, and the share that is compressed."""
    total = sum(map(len, blocks))
    joined = b"".join(blocks)
    cipher, target = AESGCM(_KEY), bytearray(BLOCK_BYTES + 16)
    packed = [zstandard.ZstdCompressor(level=1).compress(block) for block in blocks]
    # As in a repository: what does not shrink is kept as it is, and is not decompressed.
    shrunk = [(small, block) for small, block in zip(packed, blocks, strict=True) if len(small) < len(block)]
    sealed = [cipher.encrypt(_nonce(i), block, None) for i, block in enumerate(blocks)]
    sizes = ChunkerConfig()
    chunker = Chunker(FASTCDC_GEAR64, sizes.min_bytes, sizes.avg_bytes, sizes.max_bytes, _KEY)
    compressors = {level: zstandard.ZstdCompressor(level=level) for level in (1, 3)}
    view, decompressor = memoryview(target), zstandard.ZstdDecompressor()
    jobs: dict[str, Callable[[], object]] = {
        "gear": lambda: chunker.cut(joined, final=True),
        "blake3": lambda: _drain(blake3(block, key=_KEY).digest() for block in blocks),
        "zstd level 1": lambda: _drain(compressors[1].compress(block) for block in blocks),
        "zstd level 3": lambda: _drain(compressors[3].compress(block) for block in blocks),
        "aes-gcm seal": lambda: _drain(
            cipher.encrypt_into(_nonce(i), block, None, view[: len(block) + 16]) for i, block in enumerate(blocks)
        ),
        "aes-gcm open": lambda: _drain(
            cipher.decrypt_into(_nonce(i), block, None, view[: len(block) - 16]) for i, block in enumerate(sealed)
        ),
        "xxh3": lambda: _drain(xxhash.xxh3_128_digest(block) for block in blocks),
    }
    speeds = {name: total / _seconds(job) for name, job in jobs.items()}
    if shrunk:
        seconds = _seconds(lambda: _drain(decompressor.decompress(small) for small, _ in shrunk))
        speeds["zstd decompress"] = sum(len(block) for _, block in shrunk) / seconds
    speeds["read"] = _read_speed(max(paths, key=lambda path: path.stat().st_size))
    kept = sum(min(len(small), len(block)) for small, block in zip(packed, blocks, strict=True))
    return speeds, kept / total, sum(len(block) for _, block in shrunk) / total


def _drain(results: Iterable[object]) -> None:
    """Keep no result: memory that is reused is not faulted in again."""
    deque(results, maxlen=0)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _seconds(job: Callable[[], object]) -> float:
    """Median CPU time of this thread over a few repetitions, the first not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        begin = time.thread_time()
        job()
        times.append(time.thread_time() - begin)
    return statistics.median(times[1:])


def _read_speed(path: Path) -> float:
    """Bytes a second when reading what is cached into memory that has been touched."""
    size = min(path.stat().st_size, _SAMPLE_BYTES)
    buffer = mmap.mmap(-1, 8 << 20)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            left = size
            while left > 0 and (count := file.readinto(buffer)):
                left -= count

    return size / _seconds(read)


def _costs(dataset: Dataset, paths: Sequence[Path], folder: Path) -> dict[str, float]:
    """Seconds for one file or entry, of what is counted by files."""
    small = [path for path in paths if path.stat().st_size < BLOCK_BYTES]
    few = small[:1000] or list(paths[:1])
    entries = [_entry(path) for path in few]
    page = encode([Section(b"d", entries[at : at + 256]) for at in range(0, len(entries), 256)])
    buffer = bytearray(BLOCK_BYTES)
    costs = {
        "scan": _scan_cost(dataset.path),
        "encode entry": _seconds(lambda: encode([Section(b"d", entries)])) / len(entries),
        "decode entry": _seconds(lambda: decode_page(page)) / len(entries),
        "key derivation": _derivation_cost(),
    }
    if small:
        reading = _seconds(lambda: _drain(_read_one(path, buffer) for path in small))
        costs["open and read"] = reading / len(small)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            costs["create"] = _create_cost(Path(name), [path.read_bytes() for path in few])
    return costs


def _entry(path: Path) -> Entry:
    status = path.lstat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return Entry(path.name.encode(), status.st_mode, 0, 0, "root", "root", status.st_size, *times,
                 status.st_ino, status.st_dev, False, bytes(36))  # fmt: skip


def _scan_cost(root: Path) -> float:
    """Seconds for an entry of a walk by scandir that has each one's status."""

    def walk() -> int:
        count, stack = 0, [str(root)]
        while stack and count < 200_000:
            with os.scandir(stack.pop()) as listing:
                for entry in listing:
                    entry.stat(follow_symlinks=False)
                    count += 1
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
        return count

    return _seconds(walk) / walk()


def _read_one(path: Path, buffer: bytearray) -> int:
    """Read a small file as the pool does; return how many bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    os.fstat(descriptor)
    count = os.readv(descriptor, [buffer])
    os.close(descriptor)
    return count


def _create_cost(folder: Path, contents: Sequence[bytes]) -> float:
    """Seconds to make a file with content, mode and time; in fresh directories of a hundred."""
    begin = time.thread_time()
    for number, content in enumerate(contents):
        directory = folder / str(number // 100)
        if number % 100 == 0:
            directory.mkdir()
        descriptor = os.open(directory / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(descriptor, content)
        os.fchmod(descriptor, 0o644)
        os.utime(descriptor, ns=(0, 0))
        os.close(descriptor)
    return (time.thread_time() - begin) / len(contents)


def _derivation_cost() -> float:
    """Seconds to turn a passphrase into a key; its lanes are threads."""
    begin = time.perf_counter()
    Argon2id(salt=_KEY, length=32, iterations=ARGON2_PASSES, lanes=ARGON2_LANES, memory_cost=ARGON2_MEMORY_KIB).derive(
        _KEY
    )
    return time.perf_counter() - begin


def _bounds(
    dataset: Dataset, speeds: dict[str, float], costs: dict[str, float], shares: tuple[float, float], cores: int
) -> dict[str, float]:
    """Seconds that each scenario takes at least."""
    size, unique = dataset.size_bytes, dataset.unique_bytes
    stored, packed = unique * shares[0], unique * shares[1]
    # A tree of small files is not cut and costs by the file; large files cost by the byte alone.
    if "create" in costs:
        reading, creating = dataset.files * costs["open and read"], dataset.files * costs["create"]
    else:
        reading, creating = size / speeds["read"] + size / speeds["gear"], 0.0
    listing = dataset.entries * costs["scan"]
    sealing = unique / speeds["zstd level 1"] + stored / speeds["aes-gcm seal"]
    first = reading + size / speeds["blake3"] + sealing + listing + dataset.entries * costs["encode entry"]
    opening = stored / speeds["read"] + stored / speeds["aes-gcm open"] + unique / speeds["blake3"]
    if "zstd decompress" in speeds:
        opening += packed / speeds["zstd decompress"]
    unchanged = costs["key derivation"] + listing + dataset.entries * costs["decode entry"]
    return {
        "first": first / cores,
        "unchanged": unchanged,
        "one-percent": unchanged + 0.01 * first / cores,
        "restore": (opening + creating) / cores,
        "check": opening / cores,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and append a line for each data set."""
    parser = argparse.ArgumentParser(prog="bench.primitives", description="Measure what the primitives cost.")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where the data sets lie")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--results", type=Path, default=DEFAULT_FILE, help="file to append lines to")
    parser.add_argument("names", nargs="*", default=NAMES)
    options = parser.parse_args(arguments)
    run = this_run(options.dir)
    for name in options.names:
        dataset = load(name, options.dir, scale=options.scale, seed=DEFAULT_SEED)
        line = measure_primitives(run, dataset, options.dir)
        append(options.results, [line])
        print(f"{name}: {line.stored_share:.0%} stored")
        print("  MB/s of one core: " + ", ".join(f"{k} {v:.0f}" for k, v in line.megabytes_per_s.items()))
        print("  µs for one: " + ", ".join(f"{k} {v:.1f}" for k, v in line.microseconds.items()))
        print("  least seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in line.bounds_s.items()))


if __name__ == "__main__":
    main()
