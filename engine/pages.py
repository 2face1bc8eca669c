"""Pages: encode the catalog's pages as they become complete, in any order, and join them into its tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.engine.catalog import TreeBuilder, describe
from coffret.engine.progress import Item
from coffret.engine.records import Section, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from coffret.engine.flow import Channel, Sender
    from coffret.engine.messages import MetaChunks, Run, ScanPage
    from coffret.engine.progress import Progress
    from coffret.engine.records import Counts, PageRef


class CatalogWriter:
    """Takes complete pages in any order; only their refs wait for the pages before them."""

    def __init__(self, meta: MetaChunks, counts: Counts, progress: Progress) -> None:
        self._meta, self._counts, self._progress = meta, counts, progress
        self._tree = TreeBuilder(meta.store)
        self._waiting: dict[int, tuple[PageRef | None, int]] = {}
        self._next = 0
        self._level = 0
        self._new_directories = self._changed_directories = self._read_files = 0

    def add(self, page: ScanPage) -> None:
        """Take a page; refs of pages go into the tree in the order of the scan."""
        ref = page.kept or self._encode(page)
        self._waiting[page.number] = (ref, page.level)
        if ref is not None:
            self._count(page, ref.files, ref.size_bytes)
        if self._progress.on_item is not None:
            self._tell(page, self._progress.on_item)
        while self._next in self._waiting:
            following, level = self._waiting.pop(self._next)
            self._next += 1
            # A page whose files all vanished is not there: the next one takes its cut.
            self._level = max(self._level, level)
            if following is not None:
                self._tree.add(following, self._level)
                self._level = 0

    def finish(self) -> tuple[bytes, int]:
        """(root ref, depth) of the catalog."""
        return self._tree.finish()

    def _encode(self, page: ScanPage) -> PageRef | None:
        sections = []
        for directory, found in page.sections:
            entries = [entry for entry in found if entry is not None]
            if entries:
                sections.append(Section(directory, entries))
        return describe(sections, self._meta.store(encode(sections))) if sections else None

    def _count(self, page: ScanPage, files: int, size_bytes: int) -> None:
        counts, progress = self._counts, self._progress
        vanished = page.files - files
        counts.files += files
        counts.size_bytes += size_bytes
        counts.directories += page.directories
        counts.others += page.count - page.files - page.directories
        counts.new += page.new
        counts.changed += page.changed
        counts.unmodified += page.count - page.new - page.changed
        progress.files, progress.size_bytes = counts.files, counts.size_bytes
        progress.entries += page.count - vanished
        self._new_directories += page.new_directories
        self._changed_directories += page.changed_directories
        self._read_files += page.to_read
        new, changed = self._new_directories, self._changed_directories
        progress.new_directories, progress.changed_directories = new, changed
        progress.unmodified_directories = counts.directories - new - changed
        progress.new, progress.changed = counts.new - new, counts.changed - changed
        progress.unmodified = counts.unmodified - progress.unmodified_directories
        progress.read_files = self._read_files

    def _tell(self, page: ScanPage, on_item: Callable[[Item], None]) -> None:
        for directory, entries in page.sections:
            prefix = b"/" + directory + b"/" if directory else b"/"
            for entry in entries:
                if entry is not None:
                    on_item(Item(prefix + entry.name, page.status.get(id(entry.name), "unmodified"), entry.size))


async def catalog_stage(
    inbox: Channel[ScanPage], outbox: Sender[Run], *, writer: CatalogWriter, meta: MetaChunks
) -> tuple[bytes, int]:
    """Encode complete pages and send them to be stored like any chunks; return the catalog's (root ref, depth)."""
    with outbox:
        async for page in inbox:
            writer.add(page)
            for run in meta.runs():
                await outbox.send(run)
        root = writer.finish()
        for run in meta.runs():
            await outbox.send(run)
    return root
