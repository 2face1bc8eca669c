"""Real directory trees of this machine, cut into units, and generated ones where there are not enough."""

from __future__ import annotations

import os
import random
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from bench.content import SourceText

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Larger files do not make a tree of small files.
_COPY_MAX_BYTES = 32 << 20
_GENERATED_FILES_PER_DIRECTORY = 5


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a real tree: a directory with all below it, or with its own files only."""

    path: Path
    whole: bool

    def walk(self) -> Iterator[tuple[Path, list[str]]]:
        """Directories with the sorted names of their files and links."""
        for directory, subdirectories, names in os.walk(self.path):
            links = [name for name in subdirectories if (Path(directory) / name).is_symlink()]
            if self.whole:
                subdirectories.sort()
            else:
                subdirectories.clear()
            yield Path(directory), sorted(names + links)

    def tally(self) -> Tally:
        """What a copy of it would hold; nothing is read, so it can't say how many bytes are unique."""
        found = Tally()
        for directory, names in self.walk():
            found.directories += 1
            for name in names:
                status = (directory / name).lstat()
                if stat.S_ISREG(status.st_mode) and status.st_size <= _COPY_MAX_BYTES:
                    found.files += 1
                    found.size_bytes += status.st_size
        return found


def units(roots: Sequence[Path], seed: str, most_files: int) -> list[Unit]:
    """Cut trees into subtrees of at most `most_files` files, shuffled by the seed."""
    found: list[Unit] = []
    for root in roots:
        if root.is_dir():
            parts, count = _split(root, most_files)
            found += parts if count > most_files else [Unit(root, True)]
    random.Random(seed).shuffle(found)
    return found


def _split(path: Path, most_files: int) -> tuple[list[Unit], int]:
    """The units below `path`, and how many files they hold; a subtree small enough stays whole."""
    try:
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        return [], 0
    own, below = 0, []
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            below.append((Path(entry.path), *_split(Path(entry.path), most_files)))
        else:
            own += 1
    count = own + sum(files for _, _, files in below)
    if count <= most_files:
        return [], count
    parts = [Unit(path, False)] if own else []
    for child, child_parts, files in below:
        parts += child_parts if files > most_files else [Unit(child, True)]
    return parts, count


@dataclass(slots=True)
class Tally:
    """What a tree holds. `unique_bytes` counts equal files once."""

    files: int = 0
    directories: int = 0
    size_bytes: int = 0
    unique_bytes: int = 0

    def reached(self, goal: Tally) -> bool:
        """Whether there is as much of everything as in `goal`."""
        return self.files >= goal.files and self.directories >= goal.directories and self.size_bytes >= goal.size_bytes


class TreeCopier:
    """Copies units into one tree without hard links, and counts. Unreadable and special files are left out."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.tally = Tally()
        self._seen: set[bytes] = set()

    def copy(self, unit: Unit) -> None:
        """Copy a unit to the same path below the target."""
        for directory, names in unit.walk():
            place = self.target / directory.relative_to("/")
            self._make(place)
            for name in names:
                self._copy(directory / name, place / name)

    def generate(self, goal: Tally, seed: str) -> None:
        """Add generated source-like files until the goal is reached."""
        text, generator = SourceText(seed), random.Random(seed)
        directory = self.target
        while not self.tally.reached(goal):
            files_left = max(1, goal.files - self.tally.files)
            mean = max(200, (goal.size_bytes - self.tally.size_bytes) // files_left)
            parent = directory if generator.random() < 0.3 else self.target / f"generated{generator.randrange(100):02}"
            directory = parent / f"part{self.tally.directories:05}"
            self._make(directory)
            for number in range(generator.randint(1, 2 * _GENERATED_FILES_PER_DIRECTORY - 1)):
                size = min(_COPY_MAX_BYTES, int(mean * generator.lognormvariate(-0.5, 1)))
                (directory / f"file{number}.py").write_bytes(text.take(size))
                self._count(size, None)

    def _make(self, directory: Path) -> None:
        if not directory.is_dir():
            self._make(directory.parent)
            directory.mkdir()
            self.tally.directories += 1

    def _copy(self, source: Path, place: Path) -> None:
        try:
            status = source.lstat()
            if stat.S_ISLNK(status.st_mode):
                place.symlink_to(source.readlink())
            elif stat.S_ISREG(status.st_mode) and status.st_size <= _COPY_MAX_BYTES:
                data = source.read_bytes()
                place.write_bytes(data)
                shutil.copystat(source, place)
                self._count(len(data), blake3(data).digest())
        except (PermissionError, FileNotFoundError):
            return

    def _count(self, size: int, digest: bytes | None) -> None:
        self.tally.files += 1
        self.tally.size_bytes += size
        if digest is None or digest not in self._seen:
            self.tally.unique_bytes += size
        if digest is not None:
            self._seen.add(digest)
