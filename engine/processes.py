"""Child processes: what they may know, how they end, and waiting for that without holding up the event loop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What ends a program. It goes to all of its group; of a closed terminal the kernel tells, and the shell once more.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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


async def all_ended(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    """Wait until processes have ended; kill those that take longer than `patience_s`, or once the task is cancelled.

    However often it is cancelled, none is left unkilled, and none unreaped but what has not ended `patience_s` after
    it was killed: that is stuck in a system call.

    :raises asyncio.CancelledError: afterwards, if the task was cancelled by asyncio's own means
    """
    cancelled: BaseException | None = None
    killed, deadline = False, anyio.current_time() + patience_s
    try:
        # The shield keeps off anyio's cancellation, not `Task.cancel`.
        with anyio.CancelScope(shield=True):
            while left := [process for process in processes if process.poll() is None]:
                if killed and anyio.current_time() >= deadline:
                    break
                try:
                    with anyio.CancelScope(deadline=deadline):
                        for process in left:
                            await exit_of(process)
                        continue
                except anyio.get_cancelled_exc_class() as error:
                    cancelled = error
                if not killed:
                    for process in left:
                        process.kill()
                    killed, deadline = True, anyio.current_time() + patience_s
    except BaseException:  # the loop itself is torn down: nothing can be awaited any more
        _end_now(processes, patience_s)
        raise
    if cancelled is not None:
        raise cancelled


def _end_now(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
