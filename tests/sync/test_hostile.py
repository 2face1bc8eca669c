"""Sources that lie: index objects made by somebody with the keys, who would have a target hold what is not so."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3
from tests.sync.sides import SMALL, Side, is_whole

from coffret.engine import sealing
from coffret.engine.attempt import Attempt
from coffret.engine.errors import Damaged, reported
from coffret.engine.index import IndexWriter, index_name
from coffret.engine.known import KnownChunks
from coffret.engine.packfile import pack_name
from coffret.engine.pipeline import Limits
from coffret.engine.progress import Progress
from coffret.engine.records import UNNAMED, Block, IndexObject, PackTable, encode, pack_ref
from coffret.engine.sync_move import Mover

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coffret.engine.sealing import BlockCipher

pytestmark = pytest.mark.anyio
RAW = sealing.RAW


class Liar:
    """A source whose index says whatever a test wants of one pack."""

    def __init__(self, side: Side) -> None:
        self.side = side

    async def begin(self) -> tuple[bytes, BlockCipher]:
        """The header of a pack, and what seals its blocks."""
        self._sealer = (await self.side.open()).sealer
        header = self._sealer.header(sealing.PACK, os.urandom(16))
        return header, self._sealer.cipher(header, sealing.PACK)

    def id_of(self, chunk: bytes) -> bytes:
        return blake3(chunk, key=self.side.secrets.id_key).digest()

    async def put(self, pack: bytes, *tables: list[Block]) -> None:
        """Store the pack, and an index object for each table of it."""
        attempt, pack_id = os.urandom(16), blake3(pack).digest()
        await self.side.memory.put(pack_name(pack_id), [pack])
        for number, blocks in enumerate(tables):
            index = IndexObject([PackTable(pack_id, pack[:64], len(pack), blocks)])
            name = index_name(attempt, number)
            await self.side.memory.put(name, [self._sealer.seal(sealing.INDEX, name, attempt, encode(index))])


async def move(source: Side, target: Side, wanted: Mapping[bytes, int]) -> None:
    """Move chunks, and see that the target can read what it was given."""
    mine, other = await source.open(), await target.open()
    await mine.commits()
    attempt = Attempt(other.connector, other.sealer, other.mirror, what="sync")
    await attempt.announce()
    await attempt.begin()
    known = KnownChunks(attempt.mirror, marked=frozenset())
    index = IndexWriter(other.connector, other.sealer, attempt.id, mirror=attempt.mirror, known=known)
    noted: dict[bytes, bytes] = {}

    async def note(found: Mapping[bytes, bytes]) -> None:
        noted.update(found)

    mover = Mover(
        mine,
        other,
        attempt=attempt.id,
        known=known,
        index=index,
        level=1,
        repack=False,
        limits=Limits(),
        progress=Progress(),
    )
    try:
        async with mover.at_work():
            await mover.move(wanted, note)
    finally:
        await index.flush()
        await attempt.end()
        reader = await target.open()
        await reader.commits()
        for source_id, target_id in noted.items():
            [data] = await reader.fetcher().chunks([target_id])
            assert len(data) == wanted[source_id]


async def test_blocks_that_overlap() -> None:
    """The one would be decrypted over the other, after that was verified."""
    liar, target = Liar(Side.made()), Side.made()
    header, cipher = await liar.begin()
    first, length = os.urandom(5000), 5000
    pack = bytearray(64 + length + 16)
    pack[:64] = header
    cipher.seal_into(first, 64, memoryview(pack)[64:])
    at = 64 + 2000
    # Of AES-GCM's counter mode a second plaintext can be chosen that has the same ciphertext where the two overlap.
    wanted = bytes(pack[at:]) + os.urandom(length - (len(pack) - at))
    stream = bytearray(length + 16)
    cipher.seal_into(bytes(length), at, memoryview(stream))
    second = bytes(x ^ y for x, y in zip(wanted, stream, strict=False))
    sealed = bytearray(length + 16)
    cipher.seal_into(second, at, memoryview(sealed))
    assert bytes(sealed[:length]) == wanted
    one, two = liar.id_of(first), liar.id_of(second)
    blocks = [
        Block(64, length + 16, length, RAW, pack_ref(one, length)),
        Block(at, length + 16, length, RAW, pack_ref(two, length)),
    ]
    await liar.put(bytes(pack[:at]) + bytes(sealed), blocks)
    # Each is a chunk by itself, so each may be had; both as they were verified.
    await move(liar.side, target, {one: length, two: length})
    assert await is_whole(target)


async def test_index_objects_that_disagree() -> None:
    """A chunk that hangs over the end of its block, as only one of them has it."""
    liar, target = Liar(Side.made()), Side.made()
    header, cipher = await liar.begin()
    data = os.urandom(1000)
    pack = bytearray(64 + 1016)
    pack[:64] = header
    cipher.seal_into(data, 64, memoryview(pack)[64:])
    one, two = liar.id_of(data[:400]), liar.id_of(data[990:])
    await liar.put(
        bytes(pack),
        [Block(64, 1016, 1000, RAW, pack_ref(one, 400))],
        [Block(64, 1016, 2000, RAW, pack_ref(UNNAMED, 990) + pack_ref(two, 20))],
    )
    with pytest.raises(Exception) as raised:
        await move(liar.side, target, {one: 400, two: 20})
    assert isinstance(reported(raised.value), Damaged)
    assert await is_whole(target)


async def test_a_block_larger_than_any_pack() -> None:
    """It is refused, not tried in one new pack after the other."""
    liar, target = Liar(Side.made(chunker=SMALL)), Side.made(chunker=SMALL)
    header, cipher = await liar.begin()
    data = os.urandom(3 << 20)
    pack = bytearray(64 + len(data) + 16)
    pack[:64] = header
    cipher.seal_into(data, 64, memoryview(pack)[64:])
    one = liar.id_of(data)
    await liar.put(bytes(pack), [Block(64, len(data) + 16, len(data), RAW, pack_ref(one, len(data)))])
    with pytest.raises(Exception) as raised:
        await move(liar.side, target, {one: len(data)})
    assert isinstance(reported(raised.value), Damaged)
    assert await target.names("packs/") == []
