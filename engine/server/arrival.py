"""A body on its way in: the storage writes what is there of it, while the rest is still being received."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from coffret.connectors.base import Arriving
from coffret.connectors.threads import outlast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine


class Arrival(Arriving):
    """Fills `view`; `grow` tells how far. `check` is asked once all is there, and raises if it must not be stored."""

    def __init__(self, view: memoryview) -> None:
        self.view, self.size_bytes = view, 0
        self.check: Callable[[], Awaitable[None]] | None = None
        self._grown = asyncio.Event()

    def grow(self, piece: bytes) -> None:
        """Take in what has come."""
        self.view[self.size_bytes : self.size_bytes + len(piece)] = piece
        self.size_bytes += len(piece)
        self._grown.set()

    async def reach(self, size_bytes: int) -> None:
        while self.size_bytes < size_bytes:
            self._grown.clear()
            await self._grown.wait()

    async def accept(self) -> None:
        await super().accept()
        if self.check is not None:
            await self.check()


@asynccontextmanager
async def meanwhile(call: Coroutine[None, None, None]) -> AsyncIterator[asyncio.Task[None]]:
    """A call that goes on beside what the caller does; at the end it is over, cancelled if need be."""
    task = asyncio.create_task(call)
    try:
        yield task
    finally:
        if not task.done():
            task.cancel()
        await outlast(asyncio.gather(task, return_exceptions=True))
