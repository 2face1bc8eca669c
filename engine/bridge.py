"""A bridge from the scan's thread to the event loop: it asks for chunks there, and waits.

Not `anyio.from_thread.run`: a call that came in while its task was being cancelled was sometimes never answered (one
interrupted backup in fourteen hung), and its thread is one that cancelling waits for. Here whoever serves the bridge
answers every call before it ends, with an error if need be.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from anyio.abc import TaskStatus


class Stopped(Exception):
    """The event loop answers no more: the run is being cancelled."""


class LoadBridge:
    """`load` for a thread, served by the event loop it was made in."""

    def __init__(self, load: Callable[[Sequence[bytes]], Awaitable[list[bytes]]]) -> None:
        self._load = load
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._calls: deque[tuple[Sequence[bytes], Future[list[bytes]]]] = deque()
        self._called = anyio.Event()
        self._closed = False

    def __call__(self, refs: Sequence[bytes]) -> list[bytes]:
        """Call `load` in the event loop; to be used in a thread.

        :raises Stopped: if nobody serves any more
        """
        answer: Future[list[bytes]] = Future()
        with self._lock:
            if self._closed:
                raise Stopped
            self._calls.append((refs, answer))
            self._loop.call_soon_threadsafe(self._wake)
        return answer.result()

    async def serve(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Answer calls until cancelled; to be begun by `TaskGroup.start`, so that it can't end before it began."""
        answer: Future[list[bytes]] | None = None
        try:
            task_status.started()
            while True:
                while not self._calls:
                    self._called = anyio.Event()
                    await self._called.wait()
                refs, answer = self._calls.popleft()
                try:
                    found = await self._load(refs)
                except Exception as error:
                    answer.set_exception(error)
                else:
                    answer.set_result(found)
                answer = None
        finally:
            with self._lock:
                self._closed = True
                for _, waiting in self._calls:
                    waiting.set_exception(Stopped())
            if answer is not None:
                answer.set_exception(Stopped())

    def _wake(self) -> None:
        self._called.set()
