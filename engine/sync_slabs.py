"""The memory that a sync reads ranges of packs into, taken once and used again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from coffret.engine.chunkpool import Slab
from coffret.engine.flow import Waiters
from coffret.engine.memory import fresh_memory, give_back

if TYPE_CHECKING:
    import mmap


class Slabs:
    """A pool of memory for ranges: of each slab one half takes what is stored, the other what is decrypted."""

    def __init__(self, count: int, half_bytes: int) -> None:
        self.half_bytes = half_bytes
        self._spare = count
        self._maps: list[mmap.mmap] = []
        self._free: list[memoryview] = []
        self._returned = Waiters()

    async def acquire(self) -> Slab:
        """A free slab, waiting for one."""
        while not self._free and not self._spare:
            await self._returned.wait()
        if self._free:
            view = self._free.pop()
        else:
            self._spare -= 1
            self._maps.append(fresh_memory(2 * self.half_bytes))
            view = memoryview(self._maps[-1])
        return Slab(view, partial(self._return, view))

    def _return(self, view: memoryview) -> None:
        self._free.append(view)
        self._returned.wake()

    def close(self) -> None:
        """Give the memory back to the system."""
        for view in self._free:
            view.release()
        self._free.clear()
        give_back(self._maps)
        self._maps = []
