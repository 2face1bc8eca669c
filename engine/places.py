"""Places in a restore target: directories opened step by step, so that no link can lead a write elsewhere.

Every component is opened by its parent's descriptor without following links; names come from a verified catalog and
are single components. Directories that are missing are made, private until their own metadata is set.
"""

from __future__ import annotations

import contextlib
import os

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Descriptors kept of a path's last directories: a tree may be deeper than a process may have files open.
_KEPT = 64


class Places:
    """The directory below `root` (a descriptor) that is being written to. Neighbours cost few system calls."""

    def __init__(self, root: int) -> None:
        # (name, descriptor), -1 where it was closed to make room for deeper ones.
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
        self._leave(depth)
        while stack[depth][1] < 0:  # walk again from where there is a descriptor, at worst from the root
            stack.pop()
            depth -= 1
        for part in parts[depth:]:
            parent = stack[-1][1]
            try:
                fd = os.open(part, _DIRECTORY, dir_fd=parent)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=parent)
                fd = os.open(part, _DIRECTORY, dir_fd=parent)
            stack.append((part, fd))
            if (spare := len(stack) - 1 - _KEPT) > 0 and stack[spare][1] >= 0:
                os.close(stack[spare][1])
                stack[spare] = (stack[spare][0], -1)
        return stack[-1][1]

    def close(self) -> None:
        """Close what was opened; the root stays open."""
        self._leave(0)

    def _leave(self, depth: int) -> None:
        """Forget the directories below a depth."""
        while len(self._stack) > depth + 1:
            _, fd = self._stack.pop()
            if fd >= 0:
                os.close(fd)
