"""Build a catalog out of what is left of another: pages as they are, pages without what is lost, and what stands in."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from coffret.engine.catalog import Cutter, TreeBuilder, describe, directory_key, key_of
from coffret.engine.records import Entry, Section, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from coffret.engine.catalog import Key
    from coffret.engine.records import Counts, PageRef

# Entries of a page of directories that stand in for lost ones.
_STAND_INS = 512


class CatalogRebuild:
    """Takes pages in order; `store` takes payloads and returns their refs. What is in them is counted in `counts`."""

    def __init__(self, chunker_key: bytes, store: Callable[[bytes], bytes], counts: Counts) -> None:
        self._cutter, self._store, self._counts = Cutter(chunker_key), store, counts
        self._tree = TreeBuilder(store)
        self._level = 0

    def add(self, page: PageRef, sections: Sequence[Section], *, changed: bool) -> None:
        """The next page; if it is `changed`, `sections` are what is left of it, possibly nothing."""
        # Cuts stay where the names have put them, so that pages and nodes are shared with other snapshots.
        level = max(1, self._cutter.level(self._cutter.seed(page.directory), page.name))
        self._level = max(self._level, level)
        if changed:
            if not sections:
                return  # the next page takes its cut
            page = describe(sections, self._store(encode(sections)))
        self._count(sections)
        self._tree.add(page, self._level)
        self._level = 0

    def add_directories(self, found: Sequence[tuple[bytes, Entry]]) -> None:
        """Directories' entries, in order, each with the directory it is in, in the place of lost ones."""
        for at in range(0, len(found), _STAND_INS):
            sections: list[Section] = []
            for directory, entry in found[at : at + _STAND_INS]:
                if not sections or sections[-1].directory != directory:
                    sections.append(Section(directory, []))
                sections[-1].entries.append(entry)
            self._count(sections)
            self._tree.add(describe(sections, self._store(encode(sections))), 1)

    def finish(self) -> tuple[bytes, int]:
        """(root ref, depth) of the catalog."""
        return self._tree.finish()

    def _count(self, sections: Iterable[Section]) -> None:
        counts = self._counts
        for section in sections:
            for entry in section.entries:
                counts.unmodified += 1
                if stat.S_ISREG(entry.mode):
                    counts.files += 1
                    counts.size_bytes += entry.size
                elif stat.S_ISDIR(entry.mode):
                    counts.directories += 1
                else:
                    counts.others += 1


class LostDirectories:
    """Finds the directories whose own entries are lost while something in them is not."""

    def __init__(self, ranges: Sequence[tuple[Key, Key | None]]) -> None:
        self._ranges = sorted(ranges, key=lambda each: each[0])
        self._found: set[bytes] = set()
        if self._lost((b"", b"")):
            self._found.add(b"")

    def see(self, directory: bytes) -> None:
        """Something is in this directory, which lies in all those above it."""
        while directory and directory not in self._found:
            above, _, name = directory.rpartition(b"/")
            if not self._lost(key_of(above, name)):
                return  # it is listed, and so are those above it, or they were seen with it
            self._found.add(directory)
            directory = above

    def entries(self, time_ns: int) -> list[tuple[bytes, Entry]]:
        """What stands in for them, in order: nobody's but the restorer's, since nothing is known of them."""
        parts = [(b"", b"") if not path else path.rpartition(b"/")[::2] for path in self._found]
        ordered = sorted(parts, key=lambda part: (directory_key(part[0]), part[1]))
        return [
            (above, Entry(name, stat.S_IFDIR | 0o700, 0, 0, "", "", 0, time_ns, time_ns, 0, 0, racy=True))
            for above, name in ordered
        ]

    def _lost(self, key: Key) -> bool:
        return any(first <= key and (behind is None or key < behind) for first, behind in self._ranges)
