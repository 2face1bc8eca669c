"""Child processes: what they may know, how they end, and waiting for that without holding up the event loop."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    import subprocess

# Between two looks at a process where there is no descriptor to wait on (seconds).
_LOOK_S = 0.01


def environment() -> dict[str, str]:
    """The environment for a child: this process's, without the passphrases that were given in it."""
    return {name: value for name, value in os.environ.items() if not _secret(name)}


def _secret(name: str) -> bool:
    return name.startswith("COFFRET_") and "PASSPHRASE" in name


def how_ended(code: int) -> str:
    """A `Popen.returncode` in words that follow `was`, or `ended`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-code}"


async def exit_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process; return its code."""
    if process.poll() is None:
        try:
            fd = os.pidfd_open(process.pid)
        except OSError:  # no descriptor is left, or the system does not allow it
            while process.poll() is None:  # noqa: ASYNC110 - nothing here could tell
                await anyio.sleep(_LOOK_S)
        else:
            try:
                await anyio.wait_readable(fd)
            finally:
                os.close(fd)
    return process.wait()
