"""Places in a restore target: directories opened step by step, so that no link can lead a write elsewhere.

Every component is opened by its parent's descriptor without following links; names come from a verified catalog and
are single components. Directories that are missing are made, private until their own metadata is set.
"""

from __future__ import annotations

import contextlib
import os

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Places:
    """The directory below `root` (a descriptor) that is being written to. Neighbours cost few system calls."""

    def __init__(self, root: int) -> None:
        self._stack: list[tuple[bytes, int]] = [(b"", root)]

    def enter(self, directory: bytes) -> int:
        """A descriptor of a directory, given by its path below the root; made if it is missing. It stays owned here.

        :raises OSError: if a component is no directory (a link, say) or can't be made
        """
        parts = directory.split(b"/") if directory else []
        stack = self._stack
        depth = 0
        while depth < len(parts) and depth + 1 < len(stack) and stack[depth + 1][0] == parts[depth]:
            depth += 1
        while len(stack) > depth + 1:
            os.close(stack.pop()[1])
        for part in parts[depth:]:
            parent = stack[-1][1]
            try:
                fd = os.open(part, _DIRECTORY, dir_fd=parent)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=parent)
                fd = os.open(part, _DIRECTORY, dir_fd=parent)
            stack.append((part, fd))
        return stack[-1][1]

    def close(self) -> None:
        """Close what was opened; the root stays open."""
        while len(self._stack) > 1:
            os.close(self._stack.pop()[1])
