"""Keep: what snapshots need of a doomed pack and nobody can read, as it is; a later repair may want it.

The pack's name is marked, and goes. So its bytes get another, that of these bytes and the attempt's id behind them.
Blocks stay where they were in it, and open as before or as little. Its table is not at its end any more: for who looks
at it whole it is damaged, which it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.engine.packfile import pack_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coffret.connectors.base import Connector
    from coffret.engine.index import IndexWriter
    from coffret.engine.mirror import Location
    from coffret.engine.progress import Progress


class DamagedPacks:
    """Keeps them for one attempt. `kept`: by what a pack was called what it is called now."""

    def __init__(self, connector: Connector, *, attempt: bytes, index: IndexWriter, progress: Progress) -> None:
        self._connector, self._attempt, self._index, self._progress = connector, attempt, index, progress
        self._turn = anyio.Lock()
        self.kept: dict[bytes, bytes] = {}

    async def keep(self, location: Location, chunks: Iterable[tuple[int, bytes, int]], reason: str) -> None:
        """Keep a block's pack, and name there what is needed of the block: (where in it, which chunk, how long).

        :raises ConnectorError: if the pack can't be had
        """
        async with self._turn:
            if location.pack not in self.kept:
                self.kept[location.pack] = await self._put(location, reason)
        now = msgspec.structs.replace(
            location, pack=self.kept[location.pack], pack_bytes=location.pack_bytes + len(self._attempt)
        )
        self._index.adopt(
            {chunk_id: msgspec.structs.replace(now, inner=inner, length=length) for inner, chunk_id, length in chunks}
        )
        await self._index.relieve()

    async def _put(self, location: Location, reason: str) -> bytes:
        """Put the pack under another name; return its id."""
        body = await self._connector.get(pack_name(location.pack), length=location.pack_bytes) + self._attempt
        pack: bytes = await to_thread.run_sync(lambda: blake3(body).digest())
        await self._connector.put(pack_name(pack), [body])
        self._progress.stored_bytes += len(body)
        self._progress.fault(
            pack_name(location.pack).encode(),
            f"is damaged at {location.offset}: {reason}; what snapshots need of it is kept as it is, in"
            f" {pack_name(pack)}",
        )
        return pack
