"""Packs: immutable objects of many sealed blocks, named by the hash of their bytes.

    header (64 bytes, clear) | block | block | … | footer: the block table, sealed | trailer (16 bytes, clear)

Pure: bytes in, bytes out; no storage and no event loop.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import zstandard
from blake3 import blake3

from coffret.engine.errors import Damaged
from coffret.engine.records import ATTEMPT_BYTES, REF_BYTES, UNDECODABLE, Block, decode_blocks, encode, iter_refs
from coffret.engine.sealing import FOOTER, HEADER_BYTES, MAX_OBJECT_BYTES, PACK, RAW, TAG_BYTES, ZSTD, decompress

if TYPE_CHECKING:
    from coffret.engine.sealing import BlockCipher, Sealer

TRAILER = struct.Struct("<II8s")
TRAILER_MAGIC = b"COFFREND"
# A block holds one chunk, 64 MiB if a config allows that, or several of 1 MiB together: no table can exhaust memory.
MAX_RAW_BYTES = 64 << 20
# Per block and per chunk in the footer before compression: 5 integers and array heads; 36 bytes and a share of them.
_BLOCK_COST, _REF_COST = 32, 36
_FOOTER_SLACK = 1024


def pack_name(pack_id: bytes) -> str:
    """The object name of a pack."""
    digits = pack_id.hex()
    return f"packs/{digits[:2]}/{digits}"


class PackBuilder:
    """Fills one buffer with sealed blocks. `reserve` calls must not race; `seal` may run in many threads.

    `buffer` is reused from pack to pack; its length bounds the pack's.
    """

    def __init__(self, buffer: memoryview, sealer: Sealer, attempt: bytes) -> None:
        self.buffer = buffer
        self.attempt = attempt
        self.header = sealer.header(PACK, attempt)
        self._cipher = sealer.cipher(self.header, PACK)
        self._footer_cipher = sealer.cipher_like(self.header, FOOTER)
        self.used = HEADER_BYTES
        self._footer_bytes = _FOOTER_SLACK
        self.blocks: list[Block] = []
        self.sealing = 0  # blocks reserved and not sealed yet
        self.full = False
        self.meta = False  # of catalogs
        buffer[:HEADER_BYTES] = self.header

    @staticmethod
    def fits(body_bytes: int, refs_bytes: int, pack_bytes: int) -> bool:
        """Whether a block fits into an empty pack: its length before sealing, that of its refs, that of the pack."""
        footer = _FOOTER_SLACK + _BLOCK_COST + refs_bytes
        return HEADER_BYTES + body_bytes + TAG_BYTES + footer <= pack_bytes

    def reserve(self, body_bytes: int, raw_bytes: int, codec: int, refs: bytes) -> int | None:
        """Make room for a block of `body_bytes` before sealing; return its offset, or None when it does not fit."""
        stored = body_bytes + TAG_BYTES
        footer = self._footer_bytes + _BLOCK_COST + len(refs)
        if self.full or self.used + stored + footer > len(self.buffer):
            return None
        offset = self.used
        self.used += stored
        self._footer_bytes = footer
        self.sealing += 1
        self.blocks.append(Block(offset, stored, raw_bytes, codec, refs))
        return offset

    def seal(self, body: bytes | memoryview, offset: int) -> None:
        """Seal a block into the place reserved for it."""
        self._cipher.seal_into(body, offset, self.buffer[offset : offset + len(body) + TAG_BYTES])

    def stored(self, block: Block) -> memoryview:
        """The sealed bytes of one of its blocks."""
        return self.buffer[block.offset : block.offset + block.stored_bytes]

    def finish(self) -> tuple[bytes, int]:
        """Write footer and trailer; return (pack id, length in bytes). The pack is `buffer[:length]`."""
        table = zstandard.ZstdCompressor(level=3).compress(encode(self.blocks))
        stored = len(table) + TAG_BYTES
        end = self.used + stored
        self._footer_cipher.seal_into(table, self.used, self.buffer[self.used : end])
        self.buffer[end : end + TRAILER.size] = TRAILER.pack(stored, len(self.blocks), TRAILER_MAGIC)
        end += TRAILER.size
        return blake3(self.buffer[:end]).digest(), end


class PackReader:
    """Opens the blocks of one pack, given its header. The caller fetches the bytes."""

    def __init__(self, header: bytes | memoryview, sealer: Sealer) -> None:
        self.header = bytes(header[:HEADER_BYTES])
        self._sealer = sealer
        self._cipher = sealer.cipher(self.header, PACK)

    @property
    def attempt(self) -> bytes:
        """The attempt that wrote the pack."""
        return self.header[12 : 12 + ATTEMPT_BYTES]

    def open_block(self, stored: bytes | memoryview, offset: int, raw_bytes: int, codec: int) -> bytes | memoryview:
        """Decrypt and decompress one block; its chunk ids are the caller's to verify.

        :raises Damaged: if it is not exactly what was sealed there
        """
        return open_block(self._cipher, stored, offset, raw_bytes, codec)

    def open_footer(self, tail: bytes | memoryview, size_bytes: int) -> list[Block]:
        """The block table, from the last bytes of a pack of `size_bytes`; see `footer_length`.

        :raises Damaged: if it is not what was written, or the blocks do not fill the pack exactly
        """
        length = footer_length(tail)
        start = size_bytes - TRAILER.size - length
        if len(tail) < length + TRAILER.size or start < HEADER_BYTES:
            raise Damaged("a pack is cut short, or claims a longer block table than it has")
        footer = memoryview(tail)[-TRAILER.size - length : -TRAILER.size]
        table = self._sealer.cipher_like(self.header, FOOTER).open(footer, start)
        try:
            blocks = decode_blocks(decompress(table, MAX_OBJECT_BYTES))
        except UNDECODABLE as error:
            raise Damaged(f"a block table does not decode: {error}") from None
        at = HEADER_BYTES
        for block in blocks:
            if block.offset != at or block.stored_bytes < TAG_BYTES or len(block.refs) % REF_BYTES:
                raise Damaged("the blocks of a pack do not follow one another")
            if block.raw_bytes > MAX_RAW_BYTES or block.codec not in (RAW, ZSTD):
                raise Damaged("a pack has a block larger or compressed otherwise than any that is made")
            at += block.stored_bytes
        _, count, _ = TRAILER.unpack_from(tail, len(tail) - TRAILER.size)
        if at != start or len(blocks) != count:
            raise Damaged("the blocks of a pack do not fill it")
        return blocks


def open_block(
    cipher: BlockCipher, stored: bytes | memoryview, offset: int, raw_bytes: int, codec: int
) -> bytes | memoryview:
    """Decrypt and decompress one block.

    :raises Damaged: if it is not exactly what was sealed there
    """
    if raw_bytes > MAX_RAW_BYTES or codec not in (RAW, ZSTD):
        raise Damaged("a block is larger or compressed otherwise than any that is made")
    body = cipher.open(stored, offset)
    data = decompress(body, raw_bytes) if codec == ZSTD else body
    if len(data) != raw_bytes:
        raise Damaged("a block has another length than its table says")
    return data


def footer_length(tail: bytes | memoryview) -> int:
    """Stored length of the footer, from the last bytes (16 or more) of a pack.

    :raises Damaged: if they are no trailer
    """
    if len(tail) < TRAILER.size:
        raise Damaged("a pack is cut short")
    length, _, magic = TRAILER.unpack_from(tail, len(tail) - TRAILER.size)
    if magic != TRAILER_MAGIC or not TAG_BYTES <= length <= MAX_OBJECT_BYTES:
        raise Damaged("a pack has no valid trailer")
    return int(length)


def verify_chunks(data: bytes | memoryview, refs: bytes, id_key: bytes) -> None:
    """Check that a block holds exactly the chunks of its table.

    :raises Damaged: if an id or a length differs
    """
    view, at = memoryview(data), 0
    for chunk_id, length in iter_refs(refs):
        if blake3(view[at : at + length], key=id_key).digest() != chunk_id:
            raise Damaged(f"chunk {chunk_id.hex()[:16]} does not have its id")
        at += length
    if at != len(view):
        raise Damaged("a block holds more than its chunks")
