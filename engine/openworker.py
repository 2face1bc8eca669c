"""A worker of the open pool: decrypts, decompresses and verifies blocks; writes files of a restore, or checks packs.

`python -m coffret.engine.openworker SOCKET MEMORY NUMBER SLABS SLAB_BYTES`, started by `openpool`. The parent fetches
stored ranges into slabs; everything that costs CPU happens here. Every chunk id is verified before a byte is used.

    to the worker     one byte, with descriptors: where to mark what is at work, and, for a restore, the target
                      ("keys", data_key, id_key, repository_id, owner, sparse, wary, unlock, slabs)
                      ("files", job, slab, blocks, groups)   ("piece", job, slab, blocks, place, writes)
                      ("finish", job, directory, name, temporary, identity, meta)   ("nodes", job, nodes)
                      ("kept", job, entries)   ("directories", job, directories)
                      ("pack", job, slab, length, header, table)
    from the worker   ("done", job, faults)   with faults = [(key, reason, …)]   ("error", reason)

`blocks` = [(header, at, stored, position, raw, codec), or why it could not be read], a part = (block, inner, length,
chunk id); see `restore_jobs` and `restore_writer`.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import zstandard
from blake3 import blake3

from coffret.engine.errors import Damaged
from coffret.engine.frames import put_frame, take_frames
from coffret.engine.packfile import MAX_RAW_BYTES, PackReader, verify_chunks
from coffret.engine.restore_writer import LOST, DamagedPart, Mark, Writer, reason_of
from coffret.engine.sealing import PACK, ZSTD, BlockCipher, Sealer, Secrets
from coffret.engine.workermain import run_worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.records import Block

# The key of a fault that says what is wrong with an index's table of a pack.
TABLE = -2
# Larger than a sealed block is as a rule.
_SCRATCH_BYTES = 8 << 20


class Blocks:
    """The blocks of one job, opened when first wanted; what was verified once is not verified again."""

    def __init__(self, worker: OpenWorker, view: memoryview, blocks: list[tuple[Any, ...] | str]) -> None:
        self._worker, self._view, self._blocks = worker, view, blocks
        self._opened: dict[int, memoryview | Damaged] = {}
        self._verified: dict[tuple[int, int, int, bytes], memoryview] = {}

    def part(self, part: tuple[int, int, int, bytes]) -> memoryview:
        """A chunk, verified.

        :raises DamagedPart: if the block does not open, or the chunk has another id
        """
        data = self._verified.get(part)
        if data is not None:
            return data
        number, inner, length, chunk_id = part
        block = self._opened.get(number)
        if block is None:
            block = self._opened[number] = self._open(number)
        if isinstance(block, Damaged):
            raise DamagedPart(str(block), number)
        data = block[inner : inner + length]
        if blake3(data, key=self._worker.id_key).digest() != chunk_id:
            raise DamagedPart(f"chunk {chunk_id.hex()[:16]} does not have its id", number)
        self._verified[part] = data
        return data

    def _open(self, number: int) -> memoryview | Damaged:
        block = self._blocks[number]
        if isinstance(block, str):
            return Damaged(block)
        try:
            return self._worker.open(self._view, block)
        except Damaged as error:
            return error


class OpenWorker:
    """The state of one worker process."""

    def __init__(self, sock: int, memory: int, number: int, slabs: int, slab_bytes: int) -> None:
        self._socket, self._number, self._slab_bytes = sock, number, slab_bytes
        self._view = memoryview(mmap.mmap(memory, slabs * slab_bytes))
        self._jobs: list[tuple[Any, ...]] = []
        self._input = bytearray()
        self._ciphers: dict[bytes, BlockCipher] = {}
        self._zstd = zstandard.ZstdDecompressor()
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))

    def run(self) -> None:
        """Serve until the socket ends."""
        descriptors = self._receive()
        while True:
            while not self._jobs:
                data = os.read(self._socket, 1 << 18)
                if not data:
                    raise EOFError
                self._input += data
                self._jobs += take_frames(self._input)
            message = self._jobs.pop(0)
            if message[0] == "keys":
                self._hello(message, descriptors)
            else:
                put_frame(self._socket, ("done", message[1], self._do(message)))

    def _receive(self) -> list[int]:
        """What comes before the messages: descriptors."""
        channel = socket.socket(fileno=self._socket)
        try:
            data, descriptors, _, _ = socket.recv_fds(channel, 1, 2)
        finally:
            channel.detach()
        if not data:
            raise EOFError
        return list(descriptors)

    def _hello(self, message: tuple[Any, ...], descriptors: list[int]) -> None:
        _, data_key, self.id_key, repository_id, owner, sparse, wary, unlock, _ = message
        self._sealer = Sealer(Secrets(data_key, self.id_key, b""), repository_id)
        if len(descriptors) > 1:
            os.umask(0)  # each file gets its mode when it is made
            words = memoryview(mmap.mmap(descriptors[0], 0)).cast("Q")
            self._writer = Writer(
                descriptors[1],
                Mark(words, self._number),
                owner=owner,
                sparse=sparse,
                wary=wary,
                unlock=unlock,
                buffer_bytes=2 * self._slab_bytes,
            )

    def _do(self, message: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Do a job; whatever goes wrong is a fault of this job alone."""
        kind, job, *rest = message
        try:
            if kind == "pack":
                return self._pack(*rest)
            if kind in ("files", "piece"):
                slab, blocks, *rest = rest
                opened = Blocks(self, self.slab(slab), blocks).part
                return self._writer.files(job, opened, *rest) if kind == "files" else self._writer.piece(opened, *rest)
            if kind == "nodes":
                return self._writer.nodes(job, *rest)
            if kind == "finish":
                return self._writer.finish(*rest)
            return self._writer.refresh(*rest) if kind == "kept" else self._writer.directories(*rest)
        except Exception as error:
            return [(-1 if kind == "pack" else b"", reason_of(error), LOST)]

    def slab(self, number: int) -> memoryview:
        """The bytes of a slab."""
        return self._view[number * self._slab_bytes : (number + 1) * self._slab_bytes]

    def open(self, view: memoryview, block: tuple[Any, ...]) -> memoryview:
        """Decrypt and decompress one block.

        :raises Damaged: if it is not what was stored
        """
        header, at, stored, position, raw_bytes, codec = block
        if raw_bytes > MAX_RAW_BYTES:
            raise Damaged("a block is larger than any that is made")
        cipher = self._ciphers.get(header)
        if cipher is None:
            if len(self._ciphers) > 256:
                self._ciphers.clear()
            cipher = self._ciphers[header] = self._sealer.cipher(header, PACK)
        sealed = view[at : at + stored]
        body: bytes | memoryview
        if codec == ZSTD and stored <= len(self._scratch):
            body = cipher.open_into(sealed, position, self._scratch)
        else:
            body = cipher.open(sealed, position)
        if codec == ZSTD:
            try:
                if zstandard.frame_content_size(body) != raw_bytes:
                    raise Damaged("a block declares another length than its table")
                body = self._zstd.decompress(body)
            except zstandard.ZstdError:
                raise Damaged("a block does not decompress") from None
        if len(body) != raw_bytes:
            raise Damaged("a block has another length than its table says")
        return memoryview(body)

    def _pack(
        self, slab: int, length: int, header: bytes, table: list[tuple[int, int, int, int, bytes]]
    ) -> list[tuple[int, str]]:
        """Verify a whole pack against its own block table, and compare that with an index's (sorted by offset).

        The keys of faults: the offset of a block; -1, the whole pack; TABLE, what the index says of it.
        """
        view = self.slab(slab)[:length]
        try:
            reader = PackReader(view, self._sealer)
            blocks = reader.open_footer(view, length)
        except Damaged as error:
            return [(-1, str(error))]
        faults = compare_tables(reader.header, blocks, header, table)
        for block in blocks:
            at = (reader.header, block.offset, block.stored_bytes, block.offset, block.raw_bytes, block.codec)
            try:
                verify_chunks(self.open(view, at), block.refs, self.id_key)
            except Damaged as error:
                faults.append((block.offset, str(error)))
        return faults


def compare_tables(
    header: bytes, blocks: Sequence[Block], indexed_header: bytes, table: Sequence[tuple[int, int, int, int, bytes]]
) -> list[tuple[int, str]]:
    """What an index says otherwise of a pack than its own header and block table do, as faults."""
    if header != indexed_header:
        return [(TABLE, "has another header than it has")]
    by_offset = {block.offset: block for block in blocks}
    for offset, stored, raw_bytes, codec, refs in table:
        block = by_offset.get(offset)
        own = (block.stored_bytes, block.raw_bytes, block.codec) if block else None
        if block is None or own != (stored, raw_bytes, codec) or not same_refs(refs, block.refs):
            return [(TABLE, f"has another block at {offset} than its own table")]
    return []


def same_refs(indexed: bytes, stored: bytes) -> bool:
    """Whether an index's refs of a block agree with the block's own; unnamed stretches agree with anything."""
    if indexed == stored:
        return True
    mine, at = {}, 0
    for chunk_id, length in struct.iter_unpack("<32sI", stored):
        mine[at] = (chunk_id, length)
        at += length
    at = 0
    for chunk_id, length in struct.iter_unpack("<32sI", indexed):
        if chunk_id != bytes(32) and mine.get(at) != (chunk_id, length):
            return False
        at += length
    return True


if __name__ == "__main__":
    run_worker(OpenWorker)
