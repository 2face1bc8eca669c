"""Places in a restore target: directories opened step by step, so that no link can lead a write elsewhere.

Every component is opened by its parent's descriptor without following links; names come from a verified catalog and
are single components. Directories that are missing are made, private until their own metadata is set.
"""

from __future__ import annotations

import contextlib
import os
import stat

from coffret.engine.metadata import drop_acls, inherits

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Descriptors kept of a path's last directories: a tree may be deeper than a process may have files open.
_KEPT = 64
_WRITABLE = 0o700


class Places:
    """The directory below `root` (a descriptor) that is being written to. Neighbours cost few system calls.

    `wary`: directories that are there already may hand down ACLs. If not, all below the root is made by this restore,
    and nothing is looked at twice. `unlock`: directories of one's own that are read-only may be made writable; their
    own mode is set at the end.
    """

    def __init__(self, root: int, *, wary: bool = False, unlock: bool = False) -> None:
        self._wary, self._unlock = wary, unlock and os.geteuid() != 0
        # (name, descriptor, whether what is made there inherits an ACL); the descriptor is -1 where it was closed to
        # make room for deeper ones.
        self._stack: list[tuple[bytes, int, bool]] = [(b"", root, self._look(root))]

    @property
    def inherits(self) -> bool:
        """Whether what is made in the directory entered last gets an ACL that is not its own."""
        return self._stack[-1][2]

    def enter(self, directory: bytes, *, make: bool = True) -> int:
        """A descriptor of a directory, given by its path below the root; made if it is missing. It stays owned here.

        :raises OSError: if a component is no directory (a link, say), can't be made, or is not to be made
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
            stack.append((part, *self._step(part, make)))
            if (spare := len(stack) - 1 - _KEPT) > 0 and stack[spare][1] >= 0:
                os.close(stack[spare][1])
                stack[spare] = (stack[spare][0], -1, stack[spare][2])
        return stack[-1][1]

    def close(self) -> None:
        """Close what was opened; the root stays open."""
        self._leave(0)

    def _step(self, part: bytes, make: bool) -> tuple[int, bool]:
        """Open a directory in the one entered last, or make it."""
        _, parent, inherited = self._stack[-1]
        try:
            fd = os.open(part, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=parent)
            fd = os.open(part, _DIRECTORY, dir_fd=parent)
            if inherited:
                drop_acls(fd)
        except PermissionError:
            if not self._unlock:
                raise
            fd = _open_locked(part, parent)
        return fd, self._look(fd)

    def _look(self, fd: int) -> bool:
        """See to a directory that may have been there before; whether it hands down an ACL."""
        if not self._wary:
            return False
        if self._unlock:
            _make_writable(b"/proc/self/fd/%d" % fd, os.fstat(fd))
        return inherits(fd)

    def _leave(self, depth: int) -> None:
        """Forget the directories below a depth."""
        while len(self._stack) > depth + 1:
            _, fd, _ = self._stack.pop()
            if fd >= 0:
                os.close(fd)


def _open_locked(name: bytes, parent: int) -> int:
    """Open a directory of one's own that may not even be read."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        _make_writable(b"/proc/self/fd/%d" % handle, os.fstat(handle))
        return os.open(b"/proc/self/fd/%d" % handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(handle)


def _make_writable(path: bytes, status: os.stat_result) -> None:
    if status.st_uid == os.geteuid() and status.st_mode & _WRITABLE != _WRITABLE:
        with contextlib.suppress(OSError):
            os.chmod(path, stat.S_IMODE(status.st_mode) | _WRITABLE)
