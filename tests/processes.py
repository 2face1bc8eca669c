"""Processes under test: which descend from one, and waiting until they are gone."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

_PATIENCE_S = 30.0
_SERVERS = ("versitygw", "sshd", "sftp-server")


def slept(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait, but not beyond the end of a process."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)


def below(pid: int) -> list[tuple[int, str]]:
    """The processes that descend from one, as (pid, start time): a pid may be used again."""
    found: list[tuple[int, str]] = []
    pending = [pid]
    while pending:
        children = ""
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pending[0]}/task").iterdir():
                children += " " + (task / "children").read_text()
        pending.pop(0)
        for child in map(int, children.split()):
            if start := _start_of(child):
                found.append((child, start))
                pending.append(child)
    return found


def shared_memory() -> set[str]:
    """What lies in /dev/shm, but for what tests that run meanwhile keep there."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("coffret-test-")}


def left_behind() -> list[int]:
    """What descends from this process, but for the servers that other tests use too."""
    return [child for child, _ in below(os.getpid()) if not any(name in _command(child) for name in _SERVERS)]


def await_end(processes: list[tuple[int, str]]) -> None:
    """Wait until processes are gone; zombies that nobody in this container reaps count as gone."""
    end = time.monotonic() + _PATIENCE_S
    left = processes
    while left := [(pid, start) for pid, start in left if _start_of(pid) == start]:
        assert time.monotonic() < end, f"still there: {[_command(pid) for pid, _ in left]}"
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    """The worker processes of a running command."""
    return [child for child, _ in below(pid) if "coffret.engine." in _command(child)]


def _start_of(pid: int) -> str:
    """When a process started, in ticks; "" if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "))
    return ""
