"""Index: publish which chunk lies where, in objects of bounded size, and keep the mirror in step."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from coffret.engine import sealing
from coffret.engine.records import REF_BYTES, UNNAMED, Block, IndexObject, PackTable, encode, iter_refs, pack_ref
from coffret.engine.settings import INDEX_EVERY_BYTES, INDEX_EVERY_CHUNKS, INDEX_EVERY_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coffret.connectors.base import Connector
    from coffret.engine.known import KnownChunks
    from coffret.engine.mirror import Location, Mirror
    from coffret.engine.sealing import Sealer


def index_name(attempt: bytes, number: int) -> str:
    """The object name of an attempt's index object."""
    return f"index/{attempt.hex()}-{number}"


class IndexWriter:
    """Collects the tables of stored packs and puts index objects: when enough has come together, and at the end.

    An object is put only after the packs it names are durable, and merged into the mirror only after it is durable.
    Without a mirror (a dry run) nothing becomes known.
    """

    def __init__(
        self, connector: Connector, sealer: Sealer, attempt: bytes, *, mirror: Mirror | None, known: KnownChunks
    ) -> None:
        self._connector, self._sealer, self._attempt = connector, sealer, attempt
        self._mirror, self._known = mirror, known
        self._tables: list[PackTable] = []
        self._chunks = self._bytes = self._number = 0
        self._last = monotonic()
        self._turn = anyio.Lock()

    async def add(self, table: PackTable) -> None:
        """Take up the table of a pack that is durable."""
        self._tables.append(table)
        self._chunks += sum(len(block.refs) for block in table.blocks) // REF_BYTES
        self._bytes += table.size_bytes
        if (
            self._chunks >= INDEX_EVERY_CHUNKS
            or self._bytes >= INDEX_EVERY_BYTES
            or monotonic() - self._last >= INDEX_EVERY_S
        ):
            await self.flush()

    async def flush(self) -> None:
        """Publish what has come together, with the locations that are relied on."""
        async with self._turn:
            adopted, self._known.adopted = self._known.adopted, {}
            tables = self._tables + adopted_tables(adopted)
            self._tables, self._chunks, self._bytes, self._last = [], 0, 0, monotonic()
            if not tables:
                return
            name = index_name(self._attempt, self._number)
            self._number += 1
            index = IndexObject(tables)
            try:
                body = await to_thread.run_sync(self._seal, name, index)
                await self._connector.put(name, [body], if_absent=True)
            except BaseException:
                # Another try, if there is one, takes them up, under a name of its own.
                self._tables = tables + self._tables
                raise
            if self._mirror is None:
                return
            await self._mirror.merge([(name, index)])
            for table in tables:
                for block in table.blocks:
                    self._known.indexed(chunk_id for chunk_id, _ in iter_refs(block.refs))

    def _seal(self, name: str, index: IndexObject) -> bytes:
        return self._sealer.seal(sealing.INDEX, name, self._attempt, encode(index), level=1)


def adopted_tables(adopted: Mapping[bytes, Location]) -> list[PackTable]:
    """Pack tables that name relied-on chunks, and nothing else of their blocks."""
    packs: dict[bytes, dict[int, list[tuple[bytes, Location]]]] = {}
    for chunk_id, location in adopted.items():
        packs.setdefault(location.pack, {}).setdefault(location.offset, []).append((chunk_id, location))
    tables = []
    for pack, by_offset in packs.items():
        blocks: list[Block] = []
        for offset in sorted(by_offset):
            refs, at = [], 0
            for chunk_id, location in sorted(by_offset[offset], key=lambda item: item[1].inner):
                if location.inner > at:
                    refs.append(pack_ref(UNNAMED, location.inner - at))
                refs.append(pack_ref(chunk_id, location.length))
                at = location.inner + location.length
            blocks.append(Block(offset, location.stored_bytes, location.raw_bytes, location.codec, b"".join(refs)))
        tables.append(PackTable(pack, location.header, location.pack_bytes, blocks))
    return tables
