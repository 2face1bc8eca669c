"""What a process asks of the file system, noted while it does so: for the power losses of `tests.crash.power`.

Noted is, in the order in which it happened, what a power loss may take back, and what keeps it from that:

    make PATH INODE · folder PATH · link PATH PATH · move PATH PATH · remove PATH    of names, in folders
    data INODE BYTES                                                                  a file is flushed; what it holds
    names PATH                                                                        a folder is flushed

The bytes that are written need no note: before they are flushed anything may be left of them. All is seen that goes
through Python's `os`, as everything does that the connector, the mirror and the state folder do.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_open, _write, _read, _readlink, _lstat = os.open, os.write, os.pread, os.readlink, os.lstat


def record(log: str, root: str) -> None:
    """Note, from now on, what this process does below a folder: a line of JSON each, at the end of a file."""
    _Recorder(_open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), root).install()


class _Recorder:
    def __init__(self, log: int, root: str) -> None:
        self._log, self._root = log, root
        # Threads take turns, so that the order of the notes is that of the events.
        self._turn = threading.RLock()

    def install(self) -> None:
        for name, replacement in (
            ("open", self._opening(os.open)),
            ("mkdir", self._one_name("folder", os.mkdir)),
            ("unlink", self._one_name("remove", os.unlink)),
            ("remove", self._one_name("remove", os.remove)),
            ("rmdir", self._one_name("remove", os.rmdir)),
            ("link", self._two_names("link", os.link)),
            ("rename", self._two_names("move", os.rename)),
            ("replace", self._two_names("move", os.replace)),
            ("fsync", self._flushing(os.fsync)),
            ("fdatasync", self._flushing(os.fdatasync)),
        ):
            setattr(os, name, replacement)

    def _note(self, *event: str | int) -> None:
        if any(isinstance(part, str) and part.startswith(self._root) for part in event) or event[0] == "data":
            _write(self._log, json.dumps(event).encode() + b"\n")

    def _opening(self, call: Callable[..., int]) -> Callable[..., int]:
        def opening(path: Any, flags: int, *arguments: Any, dir_fd: int | None = None) -> int:
            if not flags & os.O_CREAT:
                return call(path, flags, *arguments, dir_fd=dir_fd)
            with self._turn:
                where = _absolute(path, dir_fd)
                there = _exists(where)
                fd = call(path, flags, *arguments, dir_fd=dir_fd)
                if not there:
                    self._note("make", where, os.fstat(fd).st_ino)
                return fd

        return opening

    def _one_name(self, what: str, call: Callable[..., None]) -> Callable[..., None]:
        def changing(path: Any, *arguments: Any, dir_fd: int | None = None) -> None:
            with self._turn:
                where = _absolute(path, dir_fd)
                call(path, *arguments, dir_fd=dir_fd)
                self._note(what, where)

        return changing

    def _two_names(self, what: str, call: Callable[..., None]) -> Callable[..., None]:
        def changing(
            source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, **options: Any
        ) -> None:
            with self._turn:
                names = _absolute(source, src_dir_fd), _absolute(target, dst_dir_fd)
                call(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **options)
                self._note(what, *names)

        return changing

    def _flushing(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def flushing(fd: int) -> None:
            with self._turn:
                call(fd)
                status = os.fstat(fd)
                if stat.S_ISDIR(status.st_mode):
                    self._note("names", _readlink(f"/proc/self/fd/{fd}"))
                else:
                    reader = _open(f"/proc/self/fd/{fd}", os.O_RDONLY)  # it may be open for writing only
                    data = _read(reader, status.st_size, 0)
                    os.close(reader)
                    self._note("data", status.st_ino, base64.b64encode(data).decode())

        return flushing


def _absolute(path: Any, folder: int | None) -> str:
    name = os.fsdecode(path)
    if not name.startswith("/"):
        name = os.path.join(os.getcwd() if folder is None else _readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.normpath(name)


def _exists(path: str) -> bool:
    try:
        _lstat(path)
    except FileNotFoundError:
        return False
    return True
