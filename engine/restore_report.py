"""What a restore tells: files done, faults and kept entries, by the paths they have in the snapshot."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from coffret.engine.errors import OutOfSpace
from coffret.engine.progress import Item

if TYPE_CHECKING:
    from coffret.engine.progress import Progress
    from coffret.engine.records import Entry

_FULL = {os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)}


class Report:
    """Passes on what happens to paths below the target; `base` is where the target lies in the snapshot."""

    def __init__(self, progress: Progress, base: bytes) -> None:
        self.progress, self._base = progress, b"/" + base if base else b""
        #: How many entries there were that were left as they are.
        self.kept = 0

    def shown(self, path: bytes) -> bytes:
        """A path below the target as it is shown: absolute, as it was on the host."""
        return self._base + b"/" + path if path else self._base or b"/"

    def fault(self, path: bytes, reason: str) -> None:
        """Something could not be restored as it should.

        :raises OutOfSpace: if there is no room: it would be the same for all that follows
        """
        if reason in _FULL:
            raise OutOfSpace(f"{os.fsdecode(self.shown(path))}: {reason}", remedy="choose a target with more space")
        self.progress.fault(self.shown(path), reason)

    def file(self, path: bytes, size_bytes: int) -> None:
        """A regular file was restored."""
        self.progress.files += 1
        self.progress.size_bytes += size_bytes
        self.item(path, size_bytes)

    def linked(self, path: bytes, entry: Entry) -> None:
        """Another link to something was made: it counts as what it is."""
        if stat.S_ISREG(entry.mode):
            self.file(path, entry.size)
        else:
            self.item(path)

    def files(self, count: int, size_bytes: int) -> None:
        """So many were, and nobody wants to know which."""
        self.progress.files += count
        self.progress.size_bytes += size_bytes

    def item(self, path: bytes, size_bytes: int = 0) -> None:
        """Something was restored."""
        if self.progress.on_item is not None:
            self.progress.on_item(Item(self.shown(path), "restored", size_bytes))

    @property
    def wants_items(self) -> bool:
        """Whether each path is to be told."""
        return self.progress.on_item is not None
