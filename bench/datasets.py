"""The data sets *big*, *small* and *million*: built once below a folder and kept.

Generated parts depend on the seed alone. Real parts are taken from what this machine has, in an order the seed gives;
what is missing is generated. Below 1 % of the full size everything is generated, so that tests see the same anywhere.
The fourth, *edits*, changes while it is used: `bench.edits`.

    python -m bench.datasets [--dir DIR] [--scale S] big small million
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from bench.content import GENERATOR, SourceText, random_blocks
from bench.trees import Tally, TreeCopier, units

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

DEFAULT_SEED = 1
_REAL_FROM_SCALE = 0.01
_UNIT_FILES = 2_000

# big: 3.2 GB, a third of it random. One file is far larger than the others, so that a program which gives each file to
# one core shows it.
_BIG_REAL = {"system-1.tar": 1_300_000_000, "system-2.tar": 600_000_000, "system-3.tar": 233_000_000}
_BIG_RANDOM = {"random-1.bin": 800_000_000, "random-2.bin": 267_000_000}
_BIG_ROOTS = [Path("/usr/lib"), Path("/usr/share")]

_SMALL_GOAL = Tally(files=75_000, directories=15_000, size_bytes=2_000_000_000)
_SMALL_MAX_BYTES = 2_300_000_000
# By how much of the goal files and directories may be ahead of the bytes.
_SMALL_SLACK = 0.05
_SMALL_ROOTS = [
    "~/.cargo/registry/src",
    "~/go/pkg/mod",
    "/usr/local/go",
    "/usr/include",
    "/usr/lib/python3",
    "/usr/lib/node_modules",
    "~/.pyenv/versions/3.12*",
    "~/.pyenv/versions/3.13*",
]

# million: a tenth in one directory, the others by the hundred.
_MILLION_FILES, _MILLION_DIRECTORY_FILES = 1_000_000, 100
_MILLION_SIZES = (200, 2_000)
_MILLION_POOL_BYTES = 64 << 20


class Dataset(msgspec.Struct, frozen=True):
    """A built data set. `root` is the tree to back up; sizes are those of its regular files."""

    name: str
    root: str
    seed: int
    scale: float
    files: int
    directories: int
    size_bytes: int
    unique_bytes: int
    real: bool
    generator: int = 1

    @property
    def path(self) -> Path:
        """The root as a path."""
        return Path(self.root)

    @property
    def entries(self) -> int:
        """Files and directories."""
        return self.files + self.directories

    @property
    def tree_bytes(self) -> int:
        """What a copy of it takes on a disk at least: every file and directory takes whole blocks."""
        return max(self.size_bytes, self.entries << 12)


def default_folder() -> Path:
    """Where data sets and repositories lie: $COFFRET_BENCH_DIR, else below /var/tmp."""
    return Path(os.environ.get("COFFRET_BENCH_DIR") or "/var/tmp/coffret-bench")


def load(name: str, folder: Path, *, scale: float = 1.0, seed: int = DEFAULT_SEED) -> Dataset:
    """The data set, built now if it is not there yet, or is of another `GENERATOR`.

    :raises KeyError: if there is no data set of this name
    """
    build = _BUILDERS[name]
    place = folder / "data" / _folder_name(name, scale, seed)
    manifest = place / "manifest.json"
    if manifest.exists():
        found = msgspec.json.decode(manifest.read_bytes(), type=Dataset)
        if found.generator == GENERATOR:
            return found
    shutil.rmtree(place, ignore_errors=True)
    tree = place / "tree"
    tree.mkdir(parents=True)
    real = scale >= _REAL_FROM_SCALE
    tally = build(tree, scale, f"{name} {seed}", real)
    counts = (tally.files, tally.directories, tally.size_bytes, tally.unique_bytes)
    dataset = Dataset(name, str(tree), seed, scale, *counts, real and name != "million", GENERATOR)
    manifest.write_bytes(msgspec.json.encode(dataset))
    return dataset


def _folder_name(name: str, scale: float, seed: int) -> str:
    return name if (scale, seed) == (1.0, DEFAULT_SEED) else f"{name}-{scale:g}-{seed}"


class _Full(Exception):
    """The files to fill have their sizes."""


class _Cutter(io.RawIOBase):
    """A sink that fills files of given sizes one after the other, then raises `_Full`."""

    def __init__(self, places: Sequence[tuple[Path, int]]) -> None:
        self._places = iter(places)
        self._file: IO[bytes] | None = None
        self._left_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        view = memoryview(data)
        while len(view):
            if self._file is None or self._left_bytes == 0:
                self.close_file()
                place = next(self._places, None)
                if place is None:
                    raise _Full
                self._file, self._left_bytes = place[0].open("wb"), place[1]
            taken = self._file.write(view[: self._left_bytes])
            self._left_bytes -= taken
            view = view[taken:]
        return memoryview(data).nbytes

    def close_file(self) -> None:
        """Close the file being filled, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _build_big(tree: Path, scale: float, seed: str, real: bool) -> Tally:
    sizes = {name: max(1, int(size * scale)) for name, size in _BIG_REAL.items()}
    cutter = _Cutter([(tree / name, size) for name, size in sizes.items()])
    try:
        if real:
            _tar_into(cutter, seed)
        text = SourceText(seed)
        while True:
            cutter.write(text.take(1 << 20))
    except _Full:
        cutter.close_file()
    for name, full_size in _BIG_RANDOM.items():
        sizes[name] = max(1, int(full_size * scale))
        with (tree / name).open("wb") as file:
            file.writelines(random_blocks(f"{seed} {name}", sizes[name]))
    total = sum(sizes.values())
    return Tally(len(sizes), 1, total, total)


def _tar_into(sink: _Cutter, seed: str) -> None:
    """Write a tar of the system's files, in an order of the seed's, until the sink is full."""
    # "w|" writes forward only and leaves the sink open.
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as archive:
        for unit in units(_BIG_ROOTS, seed, _UNIT_FILES):
            for directory, names in unit.walk():
                for name in names:
                    _tar_add(archive, directory / name)


def _tar_add(archive: tarfile.TarFile, path: Path) -> None:
    try:
        info = archive.gettarinfo(str(path))
        if info.isreg():
            with path.open("rb") as file:
                archive.addfile(info, file)
        else:
            archive.addfile(info)
    except (PermissionError, FileNotFoundError):
        return


def _build_small(tree: Path, scale: float, seed: str, real: bool) -> Tally:
    goal = Tally(
        *(max(1, int(n * scale)) for n in (_SMALL_GOAL.files, _SMALL_GOAL.directories, _SMALL_GOAL.size_bytes))
    )
    copier = TreeCopier(tree)
    roots = [path for pattern in _SMALL_ROOTS for path in _matching(pattern)] if real else []
    for unit in units(roots, seed, max(20, int(_UNIT_FILES * scale))):
        if copier.tally.reached(goal) or copier.tally.size_bytes > _SMALL_MAX_BYTES * scale:
            break
        if _in_proportion(copier.tally, unit.tally(), goal):
            copier.copy(unit)
    copier.generate(goal, seed)
    return copier.tally


def _in_proportion(done: Tally, more: Tally, goal: Tally) -> bool:
    """Whether there would not be more files and directories to the byte than in the goal; a little slack is given.

    Without this the mean size of a file would be that of whatever happens to be installed.
    """
    share = (done.size_bytes + more.size_bytes) / goal.size_bytes + _SMALL_SLACK
    return done.files + more.files <= goal.files * share and done.directories + more.directories <= (
        goal.directories * share
    )


def _matching(pattern: str) -> list[Path]:
    return sorted(Path("/").glob(str(Path(pattern).expanduser()).lstrip("/")))


def _build_million(tree: Path, scale: float, seed: str, real: bool) -> Tally:
    del real  # always generated
    count = max(20, int(_MILLION_FILES * scale))
    generator = random.Random(seed)
    pool = SourceText(seed).take(max(2 * _MILLION_SIZES[1], min(_MILLION_POOL_BYTES, count * 256)))
    tally = Tally(directories=1)
    directory = tree
    for number in range(count):
        size = generator.randint(*_MILLION_SIZES)
        start = generator.randrange(len(pool) - size)
        wanted = tree / _million_directory(number, count)
        if wanted != directory:
            directory = wanted
            tally.directories += _make_below(tree, directory)
        # The number makes each file unlike the others.
        head = b"file %d\n" % number
        with (directory / f"{number:07}.txt").open("wb", buffering=0) as file:
            file.write(head + pool[start : start + size - len(head)])
        tally.size_bytes += size
    tally.files, tally.unique_bytes = count, tally.size_bytes
    return tally


def _million_directory(number: int, count: int) -> str:
    group = number // _MILLION_DIRECTORY_FILES
    return "crowd" if number < count // 10 else f"{group // 100:03}/{group % 100:02}"


def _make_below(root: Path, directory: Path) -> int:
    """Make a directory and those above it; return how many were missing."""
    if directory == root or directory.is_dir():
        return 0
    made = _make_below(root, directory.parent)
    directory.mkdir()
    return made + 1


_BUILDERS: dict[str, Callable[[Path, float, str, bool], Tally]] = {
    "big": _build_big,
    "small": _build_small,
    "million": _build_million,
}
NAMES = tuple(_BUILDERS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build data sets and say where they are."""
    parser = argparse.ArgumentParser(prog="bench.datasets", description="Build benchmark data sets.")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="folder to keep them in")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("names", nargs="*", default=NAMES, help="of " + ", ".join(NAMES))
    options = parser.parse_args(arguments)
    for name in options.names:
        built = load(name, options.dir, scale=options.scale, seed=options.seed)
        print(
            f"{built.name}: {built.size_bytes / 1e6:.0f} MB ({built.unique_bytes / 1e6:.0f} MB unique), "
            f"{built.files} files, {built.directories} directories: {built.root}"
        )


if __name__ == "__main__":
    main()
