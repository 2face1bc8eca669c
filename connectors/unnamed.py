"""A new object of a local repository before it has its name: a file of its own in `tmp/`.

Blocking, for threads.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from coffret.connectors import localfiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.connectors.base import Buffer


class Unnamed:
    """A file below the repository's folder; `close` it, however far it came."""

    def __init__(self) -> None:
        self._path = f"tmp/{secrets.token_hex(16)}"
        self._root = self._fd = -1
        self._size_bytes = 0

    def open(self, root: int) -> None:
        """Make it, empty; `root` is the descriptor of the repository's folder."""
        self._root = root
        try:
            self._fd = self._create()
        except FileNotFoundError:
            localfiles.make_folders("tmp", root)
            self._fd = self._create()

    @property
    def made_s(self) -> float:
        """When it was last written to, by the file system's clock (s since 1970)."""
        return os.fstat(self._fd).st_mtime

    def append(self, body: Sequence[Buffer]) -> None:
        """Write the concatenation of `body`; what comes in several calls goes past the page cache in whole blocks."""
        self._size_bytes += localfiles.write(self._fd, body)

    def give_name(self, name: str, if_absent: bool) -> bool:
        """Make it durable, then name it; False if `if_absent` and the name is taken. The name is not durable yet."""
        localfiles.settle(self._fd, self._size_bytes)
        try:
            try:
                localfiles.give_name(self._path, name, self._root, if_absent)
            except FileNotFoundError:
                localfiles.make_folders(name.rpartition("/")[0], self._root)
                localfiles.give_name(self._path, name, self._root, if_absent)
        except FileExistsError:
            return False
        return True

    def close(self) -> None:
        """Leave nothing in `tmp/`; it may have been closed already."""
        if self._fd < 0:
            return
        with suppress(OSError):
            os.unlink(self._path, dir_fd=self._root)
        os.close(self._fd)
        self._fd = -1

    def _create(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return os.open(self._path, flags, 0o600, dir_fd=self._root)
