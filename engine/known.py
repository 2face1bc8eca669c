"""Which chunks the repository has: the mirror's, and those this attempt has taken on and not yet indexed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from anyio import to_thread

from coffret.engine.records import iter_refs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from coffret.engine.mirror import Location, Mirror

# What is claimed and not indexed is remembered up to this many chunks (some 50 MB). Only a dry run, which indexes
# nothing, comes near: beyond it counts a chunk that comes again as new.
MAX_CLAIMED = 500_000


class KnownChunks:
    """Decides for each chunk whether it is to be stored; the first to ask for a chunk is to store it.

    `marked`: packs to be swept, or found to be bad: a chunk that lies only there is absent. Chunks located only by
    attempts that have not ended are relied on, and collected in `adopted`: the attempt's own index names their
    locations again.
    """

    def __init__(self, mirror: Mirror, *, marked: frozenset[bytes]) -> None:
        self._mirror, self._marked = mirror, marked
        self._claimed: set[bytes] = set()
        self._lock = threading.Lock()  # of `adopted`
        self.adopted: dict[bytes, Location] = {}

    async def claim(self, refs: bytes) -> list[bool]:
        """For each chunk of packed refs: whether the caller has to store it."""
        ids = [chunk_id for chunk_id, _ in iter_refs(refs)]
        if len(self._claimed) > MAX_CLAIMED:
            self._claimed.clear()
        claimed, fresh = self._claimed, []
        for chunk_id in ids:
            fresh.append(chunk_id not in claimed)
            claimed.add(chunk_id)
        if not self._mirror.objects or True not in fresh:
            return fresh
        asked = [position for position, new in enumerate(fresh) if new]
        sifted = await self._mirror.sift([ids[position] for position in asked], marked=self._marked)
        self.adopt({ids[asked[number]]: location for number, location in sifted.adopt})
        absent = {asked[number] for number in sifted.absent}
        for position in asked:
            if position not in absent:
                fresh[position] = False
                claimed.discard(ids[position])
        return fresh

    def absent(self, ids: Sequence[bytes]) -> set[bytes]:
        """Those of the chunks that the repository lacks, the others being relied on; for threads.

        What this attempt has stored and not yet indexed counts as absent.
        """
        sifted = self._mirror.sift_here(ids, marked=self._marked)
        self.adopt({ids[number]: location for number, location in sifted.adopt})
        return {ids[number] for number in sifted.absent}

    async def lacking(self, ids: Sequence[bytes]) -> set[bytes]:
        """Those of the chunks that have to be stored and nobody has claimed yet, the others being relied on."""
        asked = [chunk_id for chunk_id in ids if chunk_id not in self._claimed]
        if not self._mirror.objects or not asked:
            return set(asked)
        return await to_thread.run_sync(self.absent, asked)

    def adopt(self, locations: Mapping[bytes, Location]) -> None:
        """Have the attempt's own index name these; in any thread."""
        with self._lock:
            self.adopted.update(locations)

    def take_adopted(self) -> dict[bytes, Location]:
        """What is to be named now; in any thread."""
        with self._lock:
            taken, self.adopted = self.adopted, {}
        return taken

    def indexed(self, ids: Iterable[bytes]) -> None:
        """These are in the mirror now: they need not be remembered."""
        self._claimed.difference_update(ids)
