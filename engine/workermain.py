"""How the process of a worker begins and ends; imports next to nothing, as the workers do."""

from __future__ import annotations

import gc
import os
import sys

from coffret.engine.frames import put_frame

TYPE_CHECKING = False  # see `chunkworker`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def run_worker(make: Callable[..., Any]) -> None:
    """Run a worker until its parent is gone or has closed the socket.

    `make` gets the numbers of the command line: SOCKET MEMORY NUMBER SLABS SLAB_BYTES. What goes wrong is told to the
    parent as ("error", text); the traceback goes to standard error, which is nowhere as a rule.
    """
    gc.disable()  # nothing here is cyclic
    numbers = [int(word) for word in sys.argv[1:6]]
    try:
        make(*numbers).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        try:  # noqa: SIM105 - see `chunkworker`
            put_frame(numbers[0], ("error", reason))
        except OSError:
            pass
        raise
