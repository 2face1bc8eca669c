"""Bytes in flight, over all requests together: who wants to move an object waits until there is room for it.

A body is not read before that, so that its sender is held up by TCP. Buffers are used again: fresh memory is dear.
"""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from coffret.engine.memory import fresh_memory

if TYPE_CHECKING:
    import mmap
    from collections.abc import AsyncIterator

# What is so small takes no room: a lease must be refreshed even where packs fill it. Connections bound how many.
SMALL_BYTES = 64 << 10
# Buffers that nobody uses are kept, since packs are much of a size.
_KEPT = 3
_STEP_BYTES = 1 << 20


class NoRoom(Exception):
    """There was no room for too long."""


class Room:
    """Room for `size_bytes`, given out first come first served."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free = size_bytes
        self._waiting: deque[tuple[int, anyio.Event]] = deque()
        self._idle: list[mmap.mmap] = []

    @property
    def used_bytes(self) -> int:
        """What is given out."""
        return self.size_bytes - self._free

    @asynccontextmanager
    async def taken(self, size_bytes: int, patience_s: float) -> AsyncIterator[None]:
        """Have room for so many bytes; they are never more than there is in all.

        :raises NoRoom: if there was none for `patience_s`
        """
        if size_bytes <= SMALL_BYTES:
            yield
            return
        await self._take(size_bytes, patience_s)
        try:
            yield
        finally:
            self._give(size_bytes)

    @asynccontextmanager
    async def buffer(self, size_bytes: int, patience_s: float) -> AsyncIterator[memoryview]:
        """A buffer of so many bytes, page-aligned if it is large, and nobody else's meanwhile.

        :raises NoRoom: if there was none for `patience_s`
        """
        async with self.taken(size_bytes, patience_s):
            if size_bytes <= SMALL_BYTES:
                yield memoryview(bytearray(size_bytes))
                return
            memory = self._memory(size_bytes)
            view = memoryview(memory)[:size_bytes]
            try:
                yield view
            finally:
                view.release()
                self._idle.append(memory)
                while len(self._idle) > _KEPT or sum(map(len, self._idle)) > self.size_bytes:
                    self._idle.pop(0)

    def _memory(self, size_bytes: int) -> mmap.mmap:
        """Memory that is idle, or fresh; what is idle counts as if it were used, so it may have to go."""
        fitting = [memory for memory in self._idle if size_bytes <= len(memory) <= size_bytes * 5 // 4 + _STEP_BYTES]
        if fitting:
            best = min(fitting, key=len)
            self._idle.remove(best)
            return best
        while self._idle and sum(map(len, self._idle)) > self._free:
            self._idle.pop(0)
        return fresh_memory(-(-size_bytes // _STEP_BYTES) * _STEP_BYTES)

    async def _take(self, size_bytes: int, patience_s: float) -> None:
        if not self._waiting and size_bytes <= self._free:
            self._free -= size_bytes
            return
        entry = (size_bytes, anyio.Event())
        self._waiting.append(entry)
        try:
            with anyio.move_on_after(patience_s):
                await entry[1].wait()
            if not entry[1].is_set():
                raise NoRoom
        except BaseException:
            if entry[1].is_set():
                self._give(size_bytes)
            else:
                self._waiting.remove(entry)
                self._give(0)
            raise

    def _give(self, size_bytes: int) -> None:
        self._free += size_bytes
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, event = self._waiting.popleft()
            self._free -= wanted
            event.set()
