"""Other copies of what a restore found to be damaged, and what it remembers of that until then."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from coffret.engine.errors import ChunkMissing

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from coffret.engine.metadata import Meta
    from coffret.engine.mirror import Location, Mirror
    from coffret.engine.restore_jobs import Chunk, LargeFile

# Where a chunk was sought: (pack, offset of the block, offset in it).
Spot = tuple[bytes, int, int]


class Failed(NamedTuple):
    """A small file of which a block was damaged, and where its chunks were sought until now."""

    directory: bytes
    name: bytes
    meta: Meta
    refs: list[tuple[bytes, int]]
    extents: bytes
    tried: frozenset[Spot]
    reason: str


class Part(msgspec.Struct, eq=False):
    """One chunk of a large file to be written: where, and where it was sought until now."""

    large: LargeFile
    offset: int
    length: int
    skip: int
    chunk_id: bytes
    chunk_bytes: int
    reason: str
    tried: set[Spot] = msgspec.field(default_factory=set)


class Copies:
    """Where chunks can be had elsewhere than was tried.

    Before one is lost, the repository is listed anew: as long as that shows other index objects than before, since each
    sweep may have moved it once more.
    """

    def __init__(self, mirror: Mirror, slab_bytes: int) -> None:
        self._mirror, self._slab_bytes = mirror, slab_bytes
        self._relisted = False

    async def others(self, refs: Sequence[tuple[bytes, int]], tried: frozenset[Spot] | set[Spot]) -> list[Chunk] | None:
        """Where chunks can be had, elsewhere than was tried; None if one can't be."""
        chunks: list[Chunk] = []
        for chunk_id, length in refs:
            location = await self._other(chunk_id, length, tried)
            if location is None:
                return None
            chunks.append((chunk_id, length, location))
        return chunks

    async def _other(self, chunk_id: bytes, length: int, tried: Set[Spot]) -> Location | None:
        while True:
            for found in await self._mirror.locate_all(chunk_id):
                if self.usable(found, length) and (found.pack, found.offset, found.inner) not in tried:
                    return found
            if self._mirror.relist is None or self._relisted:
                return None
            before = frozenset(self._mirror.objects)
            await self._mirror.relist()
            self._relisted = before == self._mirror.objects

    def usable(self, location: Location, length: int) -> bool:
        """Whether a chunk can be as a location says: of the length that its ref says, and no larger than any is."""
        return location.length == length and max(location.stored_bytes, length) <= self._slab_bytes


def unlocated(refs: Sequence[tuple[bytes, int]]) -> list[Chunk]:
    """There is nothing where these could be.

    :raises ChunkMissing: always
    """
    raise ChunkMissing(f"chunk {refs[0][0].hex()[:16]} is in no pack" if len(refs) == 1 else "a chunk is in no pack")
