"""Where trees are restored to, and when they are removed: never between two measurements, if the disk can hold them."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# ext4 without a journal does not use an inode again for 60 s after its deletion (recently_deleted in fs/ext4/ialloc.c)
# and looks through all such ones at each creation: seconds of CPU time for whoever creates files next.
_FORGOTTEN_S = 65


class RestoredTrees:
    """Empty folders to restore to. They stay until the end of the run, or until the disk has no room for two more."""

    def __init__(self, folder: Path, room_bytes: int) -> None:
        self._folder = folder
        self._room_bytes = room_bytes
        self._made = 0

    def make_target(self) -> Path:
        """A new empty folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._made and shutil.disk_usage(self._folder).free < 2 * self._room_bytes:
            shutil.rmtree(self._folder)
            self._folder.mkdir()
            os.sync()
            time.sleep(_FORGOTTEN_S)
        self._made += 1
        target = self._folder / str(self._made)
        target.mkdir()
        return target
