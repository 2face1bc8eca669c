"""Packs: what is built is read back, what is altered anywhere is noticed, and no table is obeyed blindly."""

from __future__ import annotations

import msgspec
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from coffret.engine.errors import Damaged
from coffret.engine.packfile import (
    MAX_RAW_BYTES,
    TRAILER,
    TRAILER_MAGIC,
    PackBuilder,
    PackReader,
    footer_length,
    open_block,
    pack_name,
    verify_chunks,
)
from coffret.engine.records import REF_BYTES, UNNAMED, Block, encode, pack_ref
from coffret.engine.sealing import FOOTER, HEADER_BYTES, PACK, RAW, TAG_BYTES, ZSTD, Sealer, Secrets

ATTEMPT = b"a" * 16
ID_KEY = b"i" * 32
ENCRYPTED = Sealer(Secrets(b"d" * 32, ID_KEY, b"c" * 32), b"r" * 32)
CLEAR = Sealer(Secrets(b"", ID_KEY, b"c" * 32), b"r" * 32)
both = pytest.mark.parametrize("sealer", [ENCRYPTED, CLEAR], ids=["encrypted", "clear"])
# Blocks: lists of chunks, and whether the block is compressed.
blocks_drawn = st.lists(
    st.tuples(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=5), st.booleans()), max_size=6
)


def ref(chunk: bytes) -> bytes:
    return pack_ref(blake3(chunk, key=ID_KEY).digest(), len(chunk))


def build(sealer: Sealer, blocks: list[tuple[list[bytes], bool]], room: int = 1 << 16) -> tuple[bytes, PackBuilder]:
    """The bytes of a pack with these blocks."""
    builder = PackBuilder(memoryview(bytearray(room)), sealer, ATTEMPT)
    for chunks, compressed in blocks:
        raw = b"".join(chunks)
        body = zstandard.compress(raw) if compressed else raw
        offset = builder.reserve(len(body), len(raw), ZSTD if compressed else RAW, b"".join(map(ref, chunks)))
        assert offset is not None
        builder.seal(body, offset)
    pack_id, length = builder.finish()
    pack = bytes(builder.buffer[:length])
    assert pack_id == blake3(pack).digest()
    return pack, builder


def read(sealer: Sealer, pack: bytes) -> list[bytes]:
    """The raw blocks of a pack, everything verified."""
    reader = PackReader(pack, sealer)
    raws = []
    for block in reader.open_footer(pack, len(pack)):
        stored = pack[block.offset : block.offset + block.stored_bytes]
        raw = reader.open_block(stored, block.offset, block.raw_bytes, block.codec)
        verify_chunks(raw, block.refs, ID_KEY)
        raws.append(bytes(raw))
    return raws


SAMPLE = [([b"alpha", b"beta"], False), ([b"gamma " * 20], True)]


@both
@given(blocks=blocks_drawn)
def test_packs_come_back(sealer: Sealer, blocks: list[tuple[list[bytes], bool]]) -> None:
    pack, builder = build(sealer, blocks)
    assert read(sealer, pack) == [b"".join(chunks) for chunks, _ in blocks]
    reader = PackReader(pack, sealer)
    assert reader.attempt == ATTEMPT
    assert reader.open_footer(pack, len(pack)) == builder.blocks


def test_a_footer_opens_from_the_end_alone() -> None:
    pack, builder = build(ENCRYPTED, SAMPLE)
    tail = pack[-TRAILER.size - footer_length(pack) :]
    assert PackReader(pack[:HEADER_BYTES], ENCRYPTED).open_footer(tail, len(pack)) == builder.blocks
    with pytest.raises(Damaged, match="longer block table"):
        PackReader(pack, ENCRYPTED).open_footer(tail[1:], len(pack))


@both
def test_any_byte_matters(sealer: Sealer) -> None:
    """By what is inside alone; that the bytes are those of the name tells even without a key."""
    pack, _ = build(sealer, SAMPLE)
    for at in range(len(pack)):
        altered = pack[:at] + bytes([pack[at] ^ 1 << at % 8]) + pack[at + 1 :]
        with pytest.raises(Damaged):
            read(sealer, altered)


@both
def test_any_length_but_the_right_one_is_damage(sealer: Sealer) -> None:
    pack, _ = build(sealer, SAMPLE)
    for cut in (*(pack[:length] for length in range(len(pack))), pack + b"\0", pack[:64] + pack):
        with pytest.raises(Damaged):
            read(sealer, cut)


def test_blocks_can_not_be_swapped() -> None:
    (one, builder), (two, _) = build(ENCRYPTED, SAMPLE), build(ENCRYPTED, SAMPLE)
    first = builder.blocks[0]
    end = first.offset + first.stored_bytes
    swapped = one[: first.offset] + two[first.offset : end] + one[end:]
    with pytest.raises(Damaged, match="authenticate"):
        read(ENCRYPTED, swapped)


@given(st.lists(st.integers(0, 40), max_size=300), st.integers(2000, 8000))
def test_a_full_pack_has_room_for_its_table(chunk_counts: list[int], room: int) -> None:
    """Refs do not compress: what `reserve` lets in must fit whatever they are."""
    builder = PackBuilder(memoryview(bytearray(room)), CLEAR, ATTEMPT)
    for number, count in enumerate(chunk_counts):
        body = bytes(3)
        refs = blake3(number.to_bytes(4, "little")).digest(length=count * REF_BYTES)
        if (offset := builder.reserve(len(body), 3, RAW, refs)) is not None:
            builder.seal(body, offset)
    _, length = builder.finish()
    assert length <= room
    pack = bytes(builder.buffer[:length])
    assert PackReader(pack, CLEAR).open_footer(pack, length) == builder.blocks


def test_a_pack_that_is_closed_takes_nothing() -> None:
    builder = PackBuilder(memoryview(bytearray(1 << 12)), CLEAR, ATTEMPT)
    assert builder.reserve(10, 10, RAW, ref(b"x")) == HEADER_BYTES
    builder.full = True
    assert builder.reserve(10, 10, RAW, ref(b"x")) is None


def test_names() -> None:
    assert pack_name(b"\x0f" * 32) == "packs/0f/" + "0f" * 32


class TestTables:
    """Tables that a writer with the keys has made up."""

    @staticmethod
    def pack_with(payload: bytes, count: int = 1, body: bytes = b"data") -> bytes:
        """A pack of one block, with this block table."""
        header = ENCRYPTED.header(PACK, ATTEMPT)
        block, footer = bytearray(len(body) + TAG_BYTES), bytearray(len(payload) + TAG_BYTES)
        ENCRYPTED.cipher(header, PACK).seal_into(body, HEADER_BYTES, memoryview(block))
        at = HEADER_BYTES + len(block)
        ENCRYPTED.cipher_like(header, FOOTER).seal_into(payload, at, memoryview(footer))
        return header + block + footer + TRAILER.pack(len(footer), count, TRAILER_MAGIC)

    def test_one_that_is_right(self) -> None:
        table = encode([Block(64, 20, 4, RAW, ref(b"data"))])
        assert read(ENCRYPTED, self.pack_with(zstandard.compress(table))) == [b"data"]

    @pytest.mark.parametrize(
        "blocks",
        [
            [],
            [Block(63, 21, 4, RAW, ref(b"data"))],
            [Block(64, 21, 4, RAW, ref(b"data"))],
            [Block(64, 19, 4, RAW, ref(b"data"))],
            [Block(64, 20, 4, RAW, ref(b"data")[:-1])],
            [Block(64, 20, 4, 2, ref(b"data"))],
            [Block(64, 20, 5, RAW, ref(b"data"))],
            [Block(64, 20, MAX_RAW_BYTES + 1, ZSTD, ref(b"data"))],
            [Block(64, 40, 4, RAW, ref(b"data")), Block(104, -20, 0, RAW, b"")],
            [Block(64, 20, 4, RAW, b"")],
            [Block(64, 20, 4, RAW, ref(b"dat") + ref(b"a") * 2)],
            [Block(64, 20, 4, RAW, pack_ref(UNNAMED, 4))],
        ],
    )
    def test_one_that_lies(self, blocks: list[Block]) -> None:
        with pytest.raises(Damaged):
            read(ENCRYPTED, self.pack_with(zstandard.compress(encode(blocks)), count=len(blocks)))

    def test_one_of_another_length_than_the_trailer_says(self) -> None:
        table = zstandard.compress(encode([Block(64, 20, 4, RAW, ref(b"data"))]))
        with pytest.raises(Damaged, match="do not fill"):
            read(ENCRYPTED, self.pack_with(table, count=2))

    @pytest.mark.parametrize(
        "table",
        [
            b"",
            b"\x91",
            b"\xc1",
            msgspec.msgpack.encode({"a": 1}),
            msgspec.msgpack.encode([[64, 20, 4]]),
            msgspec.msgpack.encode([[64, 20, 4, 0, "text"]]),
            b"\x91\x96\x40\x14\x04\x00\xc4\x00" + b"\x91" * 100_000 + b"\x90",
        ],
        ids=["empty", "cut short", "no type", "a map", "a short row", "text", "deeply nested"],
    )
    def test_one_that_does_not_decode(self, table: bytes) -> None:
        with pytest.raises(Damaged, match="decode"):
            read(ENCRYPTED, self.pack_with(zstandard.compress(table)))

    def test_one_that_is_not_compressed(self) -> None:
        with pytest.raises(Damaged):
            read(ENCRYPTED, self.pack_with(encode([Block(64, 20, 4, RAW, ref(b"data"))])))


@pytest.mark.parametrize(
    "tail",
    [b"", b"x" * 15, b"x" * 16, TRAILER.pack(15, 0, TRAILER_MAGIC), TRAILER.pack((1 << 30) + 1, 0, TRAILER_MAGIC)],
)
def test_trailers_that_are_none(tail: bytes) -> None:
    with pytest.raises(Damaged):
        footer_length(tail)


@pytest.mark.parametrize(
    ("body", "raw_bytes", "codec"),
    [
        (b"data", 3, RAW),
        (b"data", 5, RAW),
        (b"data", -1, RAW),
        (b"data", 4, ZSTD),
        (b"data", 4, 7),
        (zstandard.compress(b"x" * 10), 9, ZSTD),
        (zstandard.compress(b"x" * 10), 11, ZSTD),
        (zstandard.compress(b"x" * 10), MAX_RAW_BYTES + 1, ZSTD),
    ],
)
def test_blocks_that_are_not_what_the_index_says(body: bytes, raw_bytes: int, codec: int) -> None:
    cipher = ENCRYPTED.cipher(ENCRYPTED.header(PACK, ATTEMPT), PACK)
    stored = bytearray(len(body) + TAG_BYTES)
    cipher.seal_into(body, 64, memoryview(stored))
    with pytest.raises(Damaged):
        open_block(cipher, bytes(stored), 64, raw_bytes, codec)
