"""The data set *edits*: a tree of small and large files that is edited from version to version, all by a seed.

It shows how well a program finds again what it has: inserts shift what follows, renames and moves change only names,
copies double whole directories, and small edits touch few bytes of large files.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from bench.content import SourceText

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSIONS = 10
_SMALL_FILES, _SMALL_MEAN_BYTES = 3_000, 12_000
_LARGE_FILES, _LARGE_BYTES = 8, (8 << 20, 24 << 20)
# Shares of the small files that a version changes, and what is done to the large ones.
_EDITED, _RENAMED, _DELETED, _ADDED = 0.03, 0.02, 0.005, 0.01
_MOVED_DIRECTORIES, _COPIED_DIRECTORIES, _COPIED_MOST_FILES = 2, 1, 50
_LARGE_EDITS = (0, 4)
_INSERT_MOST_BYTES, _REPLACE_MOST_BYTES = 5_000, 200


class EditedTree:
    """Version 0 is made at once, from `sample` (a tree of real files) or, without one, from generated text."""

    def __init__(self, root: Path, seed: int, *, scale: float = 1.0, sample: Path | None = None) -> None:
        self.root = root
        self.version = 0
        self._seed = f"edits {seed}"
        self._random = random.Random(self._seed)
        self._text = SourceText(self._seed)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        small, large = max(10, int(_SMALL_FILES * scale)), max(1, int(_LARGE_FILES * min(1, scale * 4)))
        sizes = [max(1, int(size * min(1, scale * 4))) for size in _LARGE_BYTES]
        sources = sorted(_files(sample)) if sample is not None else []
        if sources and sample is not None:
            self._copy_small(sample, self._random.sample(sources, min(small, len(sources))))
        else:
            self._generate_small(small)
        for number in range(large):
            self._make_large(root / f"large{number}.bin", self._random.randint(*sizes), sources)

    def advance(self) -> None:
        """Edit the tree into its next version."""
        self.version += 1
        self._random.seed(f"{self._seed} {self.version}")
        for path in sorted(self.root.glob("large*.bin")):
            self._edit_large(path)
        paths = [path for path in sorted(_files(self.root)) if path.parent != self.root]
        for path in self._some(paths, _EDITED):
            self._edit_small(path)
        for path in self._some(paths, _RENAMED):
            path.rename(path.with_name(f"renamed{self.version}-{path.name}"[:200]))
        for path in self._some([path for path in paths if path.exists()], _DELETED):
            path.unlink()
        for number in range(max(1, int(len(paths) * _ADDED))):
            self._write_text(self.root / f"new{self.version}" / f"file{number}.py")
        for _ in range(_MOVED_DIRECTORIES):
            self._move_directory()
        for _ in range(_COPIED_DIRECTORIES):
            self._copy_directory()

    def _copy_small(self, sample: Path, sources: Sequence[Path]) -> None:
        for source in sources:
            target = self.root / source.relative_to(sample)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())

    def _generate_small(self, count: int) -> None:
        for number in range(count):
            self._write_text(self.root / f"part{number // 60:03}" / f"unit{number // 6:04}" / f"file{number}.py")

    def _write_text(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._text.take(int(_SMALL_MEAN_BYTES * self._random.lognormvariate(-0.5, 1))))

    def _make_large(self, path: Path, size: int, sources: Sequence[Path]) -> None:
        with path.open("wb") as file:
            while (left := size - file.tell()) > 0:
                data = self._random.choice(sources).read_bytes() if sources else self._text.take(min(left, 1 << 20))
                file.write(data[:left])

    def _edit_large(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        edits = self._random.randint(*_LARGE_EDITS)
        for _ in range(edits):
            at = self._random.randrange(len(data))
            kind = self._random.choice(("insert", "delete", "replace"))
            if kind == "insert":
                data[at:at] = self._random.randbytes(self._random.randint(1, _INSERT_MOST_BYTES))
            elif kind == "delete":
                del data[at : at + self._random.randint(1, _INSERT_MOST_BYTES)]
            else:
                length = min(self._random.randint(1, _REPLACE_MOST_BYTES), len(data) - at)
                data[at : at + length] = self._random.randbytes(length)
        if edits:
            path.write_bytes(data)

    def _edit_small(self, path: Path) -> None:
        data = path.read_bytes()
        at = self._random.randint(0, len(data))
        path.write_bytes(data[:at] + b"edited %d\n" % self._random.randrange(10**6) + data[at:])

    def _some(self, paths: Sequence[Path], share: float) -> list[Path]:
        return self._random.sample(paths, min(len(paths), max(1, int(len(paths) * share))))

    def _directories(self) -> list[Path]:
        return sorted(Path(directory) / name for directory, names, _ in os.walk(self.root) for name in names)

    def _move_directory(self) -> None:
        directories = self._directories()
        moved = self._random.choice(directories)
        others = [path for path in directories if path != moved and moved not in path.parents]
        if others:
            moved.rename(self._random.choice(others) / f"moved{self.version}-{moved.name}"[:200])

    def _copy_directory(self) -> None:
        directories = self._directories()
        self._random.shuffle(directories)
        few = (path for path in directories if 1 <= len(_files(path)) <= _COPIED_MOST_FILES)
        if (copied := next(few, None)) is not None:
            shutil.copytree(copied, self.root / f"copy{self.version}")


def _files(root: Path) -> list[Path]:
    paths = (Path(directory) / name for directory, _, names in os.walk(root) for name in names)
    return [path for path in paths if path.is_file() and not path.is_symlink()]
