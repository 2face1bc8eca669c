"""Change 1 % of a data set for a while, and put it back.

What was there before is kept in a journal beside the tree, so that a run that was killed is put right by the next.
"""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.datasets import Dataset

SHARE = 0.01
# Files of this mean size are overwritten in runs of 1 MiB, as a database or a disk image is; of smaller ones, a
# hundredth gets a few bytes replaced and a line at its end.
_LARGE_BYTES = 4 << 20
_RUN_BYTES = 1 << 20


class Patch(msgspec.Struct, array_like=True):
    """What one place of a file was: `old` at `offset`, and the whole file's size and time."""

    path: str
    offset: int
    old: bytes
    size: int
    mtime_ns: int


@contextlib.contextmanager
def one_percent(dataset: Dataset, seed: str) -> Iterator[int]:
    """Change 1 % of the data set; the body is given how many places were changed. Afterwards all is as before."""
    undo(dataset)
    generator = random.Random(f"one percent {seed}")
    paths = sorted(_files(dataset.path))
    large = dataset.size_bytes / max(1, dataset.files) >= _LARGE_BYTES
    patches = [_patch(*place) for place in (_runs(paths, generator) if large else _spots(paths, generator))]
    _journal(dataset).write_bytes(msgspec.msgpack.encode(patches))
    for patch in patches:
        with Path(patch.path).open("r+b") as file:
            file.seek(patch.offset)
            file.write(generator.randbytes(len(patch.old)))
            if not large:
                file.seek(0, os.SEEK_END)
                file.write(b"a line more: %d\n" % generator.randrange(10**6))
    try:
        yield len(patches)
    finally:
        undo(dataset)


def undo(dataset: Dataset) -> None:
    """Put back what was changed, if anything was."""
    journal = _journal(dataset)
    if not journal.exists():
        return
    for patch in reversed(msgspec.msgpack.decode(journal.read_bytes(), type=list[Patch])):
        with Path(patch.path).open("r+b") as file:
            file.seek(patch.offset)
            file.write(patch.old)
            file.truncate(patch.size)
        os.utime(patch.path, ns=(patch.mtime_ns, patch.mtime_ns))
    journal.unlink()


def _journal(dataset: Dataset) -> Path:
    return dataset.path.parent / "undo.msgpack"


def _files(root: Path) -> Iterator[str]:
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                yield path


def _runs(paths: list[str], generator: random.Random) -> Iterator[tuple[str, int, int]]:
    """Runs of bytes to overwrite, 1 % of each file: (path, offset, length)."""
    for path in paths:
        size = Path(path).stat().st_size
        length = min(_RUN_BYTES, max(1, int(size * SHARE)))
        for _ in range(max(1, round(size * SHARE / length))):
            yield path, generator.randrange(size - length + 1), length


def _spots(paths: list[str], generator: random.Random) -> Iterator[tuple[str, int, int]]:
    """A few bytes in 1 % of the files: (path, offset, length)."""
    for path in generator.sample(paths, max(1, round(len(paths) * SHARE))):
        size = Path(path).stat().st_size
        length = min(size, 16)
        yield path, generator.randrange(size - length + 1), length


def _patch(path: str, offset: int, length: int) -> Patch:
    with Path(path).open("rb") as file:
        status = os.fstat(file.fileno())
        return Patch(path, offset, os.pread(file.fileno(), length, offset), status.st_size, status.st_mtime_ns)
