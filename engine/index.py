"""Index: publish which chunk lies where, in objects of bounded size, and keep the mirror in step."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from coffret.engine import sealing
from coffret.engine.errors import Damaged
from coffret.engine.mirror import MirrorBusy
from coffret.engine.objects import put_once
from coffret.engine.packfile import MAX_RAW_BYTES
from coffret.engine.records import (
    ID_BYTES,
    REF_BYTES,
    UNDECODABLE,
    UNNAMED,
    Block,
    IndexObject,
    PackTable,
    decode_index,
    encode,
    iter_refs,
    pack_ref,
    refs_length,
)
from coffret.engine.settings import INDEX_EVERY_BYTES, INDEX_EVERY_CHUNKS, INDEX_EVERY_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coffret.connectors.base import Connector
    from coffret.engine.known import KnownChunks
    from coffret.engine.mirror import Location, Mirror
    from coffret.engine.sealing import Sealer


# How often `IndexWriter.keep` looks whether it is time (s).
_LOOK_EVERY_S = 10.0
# What an interrupted run may take to save its work (s).
_SALVAGE_S = 20


def index_name(attempt: bytes, number: int) -> str:
    """The object name of an attempt's index object."""
    return f"index/{attempt.hex()}-{number}"


class IndexWriter:
    """Collects the tables of stored packs and puts index objects: when enough has come together, and at the end.

    What the attempt relies on without having stored it (`KnownChunks.adopted`) counts like what it has stored.

    An object is put only after the packs it names are durable, and merged into the mirror only after it is durable.
    Without a mirror (a dry run) nothing becomes known. `merging`: other index objects are to be replaced, so that only
    how full one gets counts. `config` and `slots` are copied into the first object.
    """

    def __init__(
        self,
        connector: Connector,
        sealer: Sealer,
        attempt: bytes,
        *,
        mirror: Mirror | None,
        known: KnownChunks,
        merging: bool = False,
        config: bytes = b"",
        slots: Mapping[str, bytes] | None = None,
    ) -> None:
        self._connector, self._sealer, self._attempt = connector, sealer, attempt
        self._mirror, self._known = mirror, known
        self._merging, self._config, self._slots = merging, config, dict(slots or {})
        self._tables: list[PackTable] = []
        self._chunks = self._bytes = self._number = 0
        self._last = monotonic()
        self._turn = anyio.Lock()

    @property
    def count(self) -> int:
        """How many index objects were put."""
        return self._number

    async def add(self, table: PackTable) -> None:
        """Take up the table of a pack that is durable."""
        self._tables.append(table)
        self._chunks += sum(len(block.refs) for block in table.blocks) // REF_BYTES
        self._bytes += table.size_bytes
        await self.relieve()

    def adopt(self, locations: Mapping[bytes, Location]) -> None:
        """Name these chunks, too, where they lie in packs that are durable."""
        self._known.adopt(locations)

    async def relieve(self) -> None:
        """Publish if enough has come together, or some time ago."""
        if (
            self._chunks + len(self._known.adopted) >= INDEX_EVERY_CHUNKS
            or (self._bytes >= INDEX_EVERY_BYTES and not self._merging)
            or (monotonic() - self._last >= INDEX_EVERY_S and not self._merging)
        ):
            await self.flush()

    async def keep(self) -> None:
        """Publish in time, until cancelled, also while no pack comes."""
        while True:
            await anyio.sleep(_LOOK_EVERY_S)
            await self.relieve()

    async def flush(self, *, last: bool = False) -> None:
        """Publish what has come together, and the locations that are relied on. `last`: nothing is claimed after it."""
        async with self._turn:
            adopted, tables = self._known.take_adopted(), self._tables
            self._tables, self._chunks, self._bytes, self._last = [], 0, 0, monotonic()
            if not tables and not adopted:
                return
            name = index_name(self._attempt, self._number)
            self._number += 1
            try:
                index, body = await to_thread.run_sync(self._seal, name, tables, adopted)
                await put_once(self._connector, name, body)
            except BaseException:
                # Another try, if there is one, takes them up, under a name of its own.
                self._tables = tables + self._tables
                self._known.adopt(adopted)
                raise
            if self._mirror is None:
                return
            try:
                await self._mirror.merge([(name, index)])
            except MirrorBusy:
                return  # then they are remembered in memory
            if not last:
                for table in tables:
                    for block in table.blocks:
                        self._known.indexed(chunk_id for chunk_id, _ in iter_refs(block.refs))

    async def salvage(self) -> None:
        """The run ends early: publish what is stored already, if that can be, so that the next one takes it up."""
        with suppress(Exception), anyio.move_on_after(_SALVAGE_S, shield=True):
            await self.flush()

    def _seal(self, name: str, tables: list[PackTable], adopted: Mapping[bytes, Location]) -> tuple[IndexObject, bytes]:
        index = IndexObject(tables + adopted_tables(adopted))
        if name == index_name(self._attempt, 0):
            index.config, index.slots = self._config, self._slots
        return index, self._sealer.seal(sealing.INDEX, name, self._attempt, encode(index), level=1)


def open_index(sealer: Sealer, name: str, data: bytes) -> IndexObject:
    """An index object from its stored bytes; for threads.

    :raises Damaged: if it is not what was stored, or says what can't be
    """
    _, payload = sealer.open(sealing.INDEX, name, data)
    try:
        index = decode_index(payload)
    except UNDECODABLE as error:
        raise Damaged(f"{name}: {error}") from None
    if not all(map(_possible_table, index.packs)):
        raise Damaged(f"{name}: holds impossible numbers")
    return index


def _possible_table(table: PackTable) -> bool:
    if len(table.pack) != ID_BYTES or len(table.header) != sealing.HEADER_BYTES or table.size_bytes >> 63:
        return False
    return all(_possible_block(block) for block in table.blocks)


def _possible_block(block: Block) -> bool:
    numbers = block.offset | block.stored_bytes | block.raw_bytes  # negative if one of them is
    if numbers >> 32 or block.raw_bytes > MAX_RAW_BYTES or block.codec not in (sealing.RAW, sealing.ZSTD):
        return False
    return len(block.refs) % REF_BYTES == 0 and refs_length(block.refs) <= block.raw_bytes


def covered(table: PackTable) -> int:
    """Up to which offset a table names all chunks of its pack: blocks follow one another, and nothing is unnamed.

    A table of what was adopted may name the first chunks of a block only.
    """
    at = sealing.HEADER_BYTES
    for block in table.blocks:
        whole = refs_length(block.refs) == block.raw_bytes
        if block.offset != at or not whole or any(chunk_id == UNNAMED for chunk_id, _ in iter_refs(block.refs)):
            break
        at += block.stored_bytes
    return at


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
