"""Run one command and say what it took; and put the machine into a known state before."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.memory import Memory, MemorySampler

if TYPE_CHECKING:
    from collections.abc import Mapping

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_READ_BYTES = 4 << 20
_LOG_TAIL_BYTES = 20_000


class CommandFailed(Exception):
    """A command of a contender ended with another exit code than 0, or took too long."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute: argument vector, whole environment, working directory."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command took. `memory` is None when it was not sampled."""

    wall_s: float
    user_s: float
    system_s: float
    memory: Memory | None
    output: str


def run(command: Command, log: Path, *, sample: bool, sync_on: Path | None = None, timeout_s: float = 3600) -> Usage:
    """Execute a command to its end; its output goes to `log`.

    `sync_on`: bring the file system of this folder to disk before, and count the time to do so after. CPU seconds are
    those of the process and all descendants that were waited for.

    :raises CommandFailed: if its exit code is not 0, or it takes longer than `timeout_s` and is killed
    """
    os.sync()  # what the command before left to be written is not this one's
    if sync_on is not None:
        sync_filesystem(sync_on)
    with log.open("wb") as output:
        begin = time.perf_counter()
        # A session of its own, so that a run which hangs can be ended with all its children.
        process = subprocess.Popen(
            command.arguments, env=dict(command.environment), cwd=command.folder, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        sampler = MemorySampler(process.pid)
        with sampler if sample else contextlib.nullcontext():
            in_time = _wait(process.pid, timeout_s)
            _, status, used = os.wait4(process.pid, 0)
            wall_s = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
    text = _tail(log)
    if process.returncode != 0:
        reason = f"exit code {process.returncode}" if in_time else f"not done after {timeout_s:.0f} s"
        raise CommandFailed(f"{' '.join(command.arguments)}: {reason}\n{text}")
    if sync_on is not None:
        begin = time.perf_counter()
        sync_filesystem(sync_on)
        wall_s += time.perf_counter() - begin
    return Usage(wall_s, used.ru_utime, used.ru_stime, sampler.peak if sample else None, text)


def _wait(pid: int, timeout_s: float) -> bool:
    """Wait for the end of a process without reaping it; kill its session when it takes too long."""
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        in_time = bool(poll.poll(timeout_s * 1000))
        if not in_time:
            os.killpg(pid, signal.SIGKILL)
        return in_time
    except BaseException:
        os.killpg(pid, signal.SIGKILL)
        raise
    finally:
        os.close(descriptor)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def sync_filesystem(folder: Path) -> None:
    """Write everything of the file system that `folder` lies on to disk (syncfs).

    :raises OSError: if that fails
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed", str(folder))
    finally:
        os.close(descriptor)


def can_drop_caches() -> bool:
    """Whether this process may empty the page cache."""
    return os.access(_DROP_CACHES, os.W_OK)


def drop_caches() -> None:
    """Empty the page cache, the inode and the dentry cache of the machine (root only)."""
    os.sync()
    _DROP_CACHES.write_text("3\n")


def warm(folder: Path, *, contents: bool = True) -> None:
    """Bring a tree into the caches: its inodes, and what its files hold if `contents`."""
    buffer = bytearray(_READ_BYTES)
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            if not contents or os.path.islink(path):
                os.lstat(path)
                continue
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a million of them
                while file.readinto(buffer):
                    pass


def stored_bytes(folder: Path) -> int:
    """Sum of the sizes of the regular files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
