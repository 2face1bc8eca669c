"""Make the golden repositories anew: `python -m tests.golden.make_repository`. See README.md beside this file.

Nothing here depends on the machine: ids, keys and salts come from a seed, times and metadata from `tree.py`. The same
libzstd gives the same bytes.
"""

from __future__ import annotations

import os
import stat
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import anyio
import zstandard
from blake3 import blake3
from tests.catalogs import cut, ordered
from tests.golden import tree

from coffret.connectors.memory import MemoryConnector
from coffret.engine import kdf, keyring, keys, sealing
from coffret.engine.attempt import Lease
from coffret.engine.catalog import Cutter, RefList, TreeBuilder, describe, split_path
from coffret.engine.chunker import Chunker
from coffret.engine.configuration import config_bytes, config_hash, new_config
from coffret.engine.entries import make_extra
from coffret.engine.index import adopted_tables, index_name
from coffret.engine.messages import MetaChunks
from coffret.engine.mirror import Location
from coffret.engine.packfile import PackBuilder, pack_name
from coffret.engine.records import (
    ChunkerConfig,
    Counts,
    End,
    Entry,
    IndexObject,
    Mark,
    PackTable,
    SnapshotHeader,
    SourceFault,
    encode,
    iter_refs,
    pack_ref,
)
from coffret.engine.sealing import RAW, ZSTD, Sealer, Secrets
from coffret.engine.snapshot import Snapshot, seal_snapshot, snapshot_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.golden.tree import Node

FOLDER = Path(__file__).parent / "version-1"
PASSPHRASES, REMOVED_PASSPHRASE = (b"golden", "zwölf".encode()), b"forgotten"
CREATED, TIME_NS = "2026-01-02T03:04:05Z", 1_767_323_045_000_000_000
CHUNKS = ChunkerConfig(min_bytes=64, avg_bytes=128, max_bytes=512)
_COST = kdf.Cost(memory_kib=64, passes=1, lanes=1)
_BLOCK_BYTES = 4096


def name_of(word: str) -> bytes:
    """The attempt or snapshot id that a word stands for."""
    return blake3(word.encode()).digest(length=16)


class Maker:
    """One golden repository in the making: what is put into `connector`."""

    def __init__(self, *, encrypted: bool) -> None:
        self.connector = MemoryConnector()
        self.seed = b"encrypted" if encrypted else b"clear"
        self._drawn = 0
        self.secrets = Secrets(*(self.entropy(32) if wanted else b"" for wanted in (encrypted, True, True)))
        self.config = new_config(
            self.secrets, chunker=CHUNKS, pack_bytes=2 << 20, entropy=self.entropy, created=CREATED
        )
        self.sealer = Sealer(self.secrets, bytes.fromhex(self.config.repository_id))
        sizes = (CHUNKS.min_bytes, CHUNKS.avg_bytes, CHUNKS.max_bytes)
        self._chunker = Chunker(CHUNKS.name, *sizes, self.secrets.chunker_key)
        self._known: set[bytes] = set()

    def entropy(self, length: int) -> bytes:
        """Stands for the system's."""
        self._drawn += 1
        return blake3(b"%s %d" % (self.seed, self._drawn)).digest(length=length)

    async def make(self) -> None:
        """Put everything."""
        await self.connector.put("config", [config_bytes(self.config)])
        if self.sealer.encrypted:
            await self._keys()
        first = await self._backup("first", tree.FIRST)
        # It has stored a chunk that nobody wants, and then those that the next backup adopts.
        interrupted = await self._store("interrupted", [b"of a file that is gone", *self.chunks_of(tree.ADOPTED)])
        await self._index("interrupted", [interrupted])
        await self._backup("second", tree.SECOND, parent="first", adopts=[interrupted])
        # Maintenance has put one index object in the place of the first attempt's, and has been at work before.
        await self._index("merged", first)
        await self.connector.delete(index_name(name_of("first"), 0))
        await self._end("merged", "maintained")
        await self._end("gone", "swept")
        # Who was taken for dead names a pack that is there no more, for a chunk that is needed.
        self._known.clear()
        lost = await self._store("revoked", self.chunks_of(b"Hello, world!\n"))
        await self._index("revoked", [lost])
        await self._end("revoked", "revoked")
        await self.connector.delete(pack_name(lost.pack))
        await self._seal(
            sealing.LEASE, f"leases/{name_of('second').hex()}", "second", encode(Lease("host", 7, "backup", TIME_NS))
        )
        removed = await self._backup("removed", tree.REMOVED)
        removal = f"removed/{name_of('snapshot removed').hex()}-{name_of('removed').hex()}"
        await self._seal(sealing.REMOVED, removal, "rm", encode({"host": "host", "user": "me", "time_ns": TIME_NS}))
        await self._marks(lost, removed[0])

    async def _keys(self) -> None:
        digest, ids = config_hash(config_bytes(self.config)), []
        for passphrase in (*PASSPHRASES, REMOVED_PASSPHRASE):
            slot_id, data = keys.wrap(
                self.secrets, passphrase, digest, label="golden", cost=_COST, entropy=self.entropy, created=CREATED
            )
            await keyring.put_slot(self.connector, slot_id, data)
            ids.append(slot_id)
        assert await keyring.log_removal(self.connector, await keyring.read_keyring(self.connector), ids[-1], digest)

    async def _marks(self, swept: PackTable, doomed: PackTable) -> None:
        await self._seal(sealing.MARK, "trash/1", "gone", encode(Mark(swept.pack)))
        await self._seal(sealing.MARK, "trash/1-seen", "gone", encode({"attempts": name_of("revoked")}))
        await self._seal(sealing.MARK, "trash/1-done", "merged", encode({"time_ns": TIME_NS}))
        await self._seal(sealing.MARK, "trash/2", "merged", encode(Mark(doomed.pack)))

    async def _backup(
        self, attempt: str, nodes: Sequence[Node], parent: str = "", adopts: Sequence[PackTable] = ()
    ) -> list[PackTable]:
        meta = MetaChunks(self.secrets.id_key)
        entries = {split_path(node.path): self._entry(node, meta) for node in nodes}
        builder = TreeBuilder(meta.store)
        for sections, level in cut(Cutter(self.secrets.chunker_key), ordered(entries)):
            builder.add(describe(sections, meta.store(encode(sections))), level)
        root, depth = builder.finish()
        files = [chunk for node in nodes for chunk in self.chunks_of(node.content)]
        tables = [await self._store(attempt, files)]
        tables.append(await self._store(attempt, [bytes(run.view) for run in meta.runs()]))
        await self._index(attempt, [*tables, *adopted(adopts)])
        header = SnapshotHeader(
            snapshot_id=name_of(f"snapshot {attempt}"),
            time_ns=TIME_NS + len(parent),
            duration_ns=1_500_000_000,
            host="host",
            user="me",
            roots=[b"/" + tree.ROOT],
            catalog=root,
            depth=depth,
            counts=Counts(files=sum(stat.S_ISREG(node.mode) for node in nodes), errors=len(adopts)),
            tags=["golden", attempt],
            faults=[SourceFault(b"/\xff", "Permission denied") for _ in adopts],
            parent=name_of(f"snapshot {parent}") if parent else b"",
            program="coffret 1",
        )
        snapshot = Snapshot(name_of(attempt), header)
        await self.connector.put(
            snapshot_name(snapshot.attempt), [seal_snapshot(self.sealer, snapshot)], if_absent=True
        )
        return tables

    def chunks_of(self, content: bytes) -> list[bytes]:
        """A file's chunks."""
        chunks, at = [], 0
        for length in self._chunker.cut(content, final=True):
            chunks.append(content[at : at + length])
            at += length
        return chunks

    def id_of(self, chunk: bytes) -> bytes:
        """A chunk's id."""
        return blake3(chunk, key=self.secrets.id_key).digest()

    def _entry(self, node: Node, meta: MetaChunks) -> Entry:
        refs = RefList(meta.store)
        for chunk in self.chunks_of(node.content):
            refs.add(self.id_of(chunk), len(chunk))
        content, depth = refs.finish()
        extra = make_extra(
            meta.store,
            target=node.target,
            rdev=node.rdev,
            nlink=node.nlink,
            depth=depth,
            xattrs=list(node.xattrs),
            extents=node.packed_extents,
        )
        return Entry(
            split_path(node.path)[1],
            node.mode,
            1000,
            100,
            "golden",
            "",
            node.size,
            node.mtime_ns,
            node.mtime_ns + 1,
            node.inode,
            2049,
            content=content,
            extra=extra,
        )

    async def _store(self, attempt: str, chunks: Sequence[bytes]) -> PackTable:
        """Put a pack of those chunks that are not stored yet."""
        builder = PackBuilder(memoryview(bytearray(1 << 20)), self.sealer, name_of(attempt))
        blocks: list[list[bytes]] = [[]]
        for chunk in chunks:
            if chunk not in self._known:
                self._known.add(chunk)
                if sum(map(len, blocks[-1])) + len(chunk) > _BLOCK_BYTES and blocks[-1]:
                    blocks.append([])
                blocks[-1].append(chunk)
        for block in filter(None, blocks):
            raw = b"".join(block)
            packed = zstandard.ZstdCompressor(level=19).compress(raw)
            body, codec = (packed, ZSTD) if len(packed) < len(raw) else (raw, RAW)
            refs = b"".join(pack_ref(self.id_of(chunk), len(chunk)) for chunk in block)
            offset = builder.reserve(len(body), len(raw), codec, refs)
            assert offset is not None
            builder.seal(body, offset)
        pack, length = builder.finish()
        await self.connector.put(pack_name(pack), [builder.buffer[:length]])
        return PackTable(pack, builder.header, length, builder.blocks)

    async def _index(self, attempt: str, tables: list[PackTable]) -> None:
        name = index_name(name_of(attempt), 0)
        await self._seal(sealing.INDEX, name, attempt, encode(IndexObject(tables)))

    async def _end(self, attempt: str, outcome: str) -> None:
        end = End(outcome, TIME_NS)  # type: ignore[arg-type]
        await self._seal(sealing.END, snapshot_name(name_of(attempt)), "maintenance", encode(end))

    async def _seal(self, kind: bytes, name: str, attempt: str, payload: bytes) -> None:
        body = self.sealer.seal(kind, name, name_of(attempt), payload)
        await self.connector.put(name, [body], if_absent=True)


def adopted(tables: Sequence[PackTable]) -> list[PackTable]:
    """What names all chunks of each block but the first."""
    locations = {}
    for table in tables:
        for block in table.blocks:
            inner = 0
            for number, (chunk_id, length) in enumerate(iter_refs(block.refs)):
                if number:
                    locations[chunk_id] = Location(
                        table.pack,
                        table.size_bytes,
                        table.header,
                        block.offset,
                        block.stored_bytes,
                        block.raw_bytes,
                        block.codec,
                        inner,
                        length,
                    )
                inner += length
    return adopted_tables(locations)


@contextmanager
def repeatable(maker: Maker) -> Iterator[None]:
    """What is random or now comes from the maker."""
    with patch.object(os, "urandom", maker.entropy), patch.object(keyring, "utc_now", lambda: CREATED):
        yield


async def make(*, encrypted: bool) -> dict[str, bytes]:
    """The objects of a golden repository, by name."""
    maker = Maker(encrypted=encrypted)
    with repeatable(maker):
        await maker.make()
    names = sorted([info.name async for info in maker.connector.list("")])
    return {name: await maker.connector.get(name) for name in names}


def main(folder: Path) -> None:
    """Write both repositories below a folder."""
    for encrypted in (True, False):
        for name, data in anyio.run(partial(make, encrypted=encrypted)).items():
            path = folder / ("encrypted" if encrypted else "clear") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
