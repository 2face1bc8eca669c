"""What must never be seen: a snapshot of which a chunk can't be reached, by the bytes that lie in the storage now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.engine import sealing
from coffret.engine.catalog_walk import UNKNOWN, open_node, open_page
from coffret.engine.index import open_index
from coffret.engine.packfile import PackReader, pack_name, verify_chunks
from coffret.engine.records import REF_BYTES, UNNAMED, PageRef, iter_refs
from coffret.engine.snapshot import open_end, open_snapshot, removal_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.attempts.storage import Storage

    from coffret.engine.catalog_walk import LoadedPage
    from coffret.engine.records import IndexObject
    from coffret.engine.sealing import Sealer
    from coffret.engine.snapshot import Snapshot


class Oracle:
    """Looks at a storage in memory directly, and reads it with nothing but the format."""

    def __init__(self, storage: Storage, sealer: Sealer) -> None:
        self._objects, self._sealer, self._id_key = storage.memory._objects, sealer, storage.secrets.id_key
        self._index: dict[str, tuple[IndexObject, dict[bytes, frozenset[bytes]]]] = {}
        self._ends: dict[str, tuple[bytes, Snapshot | str]] = {}
        self._needs: dict[str, frozenset[bytes]] = {}
        self.made: set[str] = set()  # attempts that were reported to have made a snapshot

    def snapshots(self) -> list[Snapshot]:
        """Those that are there, and not removed."""
        ends = [end for _, end in self._all_ends()]
        return [
            end
            for end in ends
            if not isinstance(end, str) and removal_name(end.header.snapshot_id, end.attempt) not in self._objects
        ]

    def violation(self) -> str:
        """What is wrong, or ""."""
        for attempt in self.made:
            end = self._end(f"snapshots/{attempt}")
            if end in ("", "revoked", "maintained"):
                return f"snapshot of {attempt} was reported as made, and is not there"
        snapshots = self.snapshots()
        reachable = self._reachable()
        for snapshot in snapshots:
            name = snapshot.attempt.hex()
            if name not in self._needs:
                self._needs[name] = frozenset(self._walk(snapshot))
            if lost := self._needs[name] - reachable:
                return f"{len(lost)} chunks of snapshot {snapshot.short_id} of {name[:8]} are lost"
        return ""

    def content(self, snapshot: Snapshot) -> dict[bytes, bytes]:
        """All files of a snapshot, by path, every chunk verified."""
        found: dict[bytes, bytes] = {}
        for page in self._pages(snapshot):
            for section in page.sections:
                for entry in section.entries:
                    if entry.mode & 0o170000 == 0o100000:
                        depth = entry.extra.depth if entry.extra else 0
                        path = b"/".join(part for part in (section.directory, entry.name) if part)
                        found[path] = b"".join(self._chunks(refs) for refs in self._leaves(entry.content, depth))
        return found

    def _walk(self, snapshot: Snapshot) -> Iterator[bytes]:
        """The ids of all chunks that a snapshot needs."""
        waiting = [(snapshot.header.depth, PageRef(b"", b"", snapshot.header.catalog, UNKNOWN, 0, 0))]
        while waiting:
            level, ref = waiting.pop()
            yield from self._ids(ref.ref)
            if level:
                waiting += [(level - 1, child) for child in open_node(ref, self._chunks(ref.ref))[1]]
                continue
            for section in open_page(ref, self._chunks(ref.ref)).sections:
                for entry in section.entries:
                    extra, refs = entry.extra, entry.content
                    yield from self._ids(refs)
                    for _ in range(extra.depth if extra else 0):
                        refs = b"".join(
                            self._chunks(refs[at : at + REF_BYTES]) for at in range(0, len(refs), REF_BYTES)
                        )
                        yield from self._ids(refs)
                    if extra:
                        yield from self._ids(extra.xattrs_ref + extra.extents_ref)

    def _pages(self, snapshot: Snapshot) -> Iterator[LoadedPage]:
        waiting = [(snapshot.header.depth, PageRef(b"", b"", snapshot.header.catalog, UNKNOWN, 0, 0))]
        while waiting:
            level, ref = waiting.pop()
            if level:
                waiting += [(level - 1, child) for child in open_node(ref, self._chunks(ref.ref))[1]]
            else:
                yield open_page(ref, self._chunks(ref.ref))

    def _leaves(self, refs: bytes, depth: int) -> Iterator[bytes]:
        if not depth:
            yield refs
            return
        for at in range(0, len(refs), REF_BYTES):
            yield from self._leaves(self._chunks(refs[at : at + REF_BYTES]), depth - 1)

    @staticmethod
    def _ids(refs: bytes) -> Iterator[bytes]:
        return (chunk_id for chunk_id, _ in iter_refs(refs))

    def _chunks(self, refs: bytes) -> bytes:
        return b"".join(self._chunk(chunk_id) for chunk_id in self._ids(refs))

    def _chunk(self, wanted: bytes) -> bytes:
        for index, _ in self._believed():
            for table in index.packs:
                if pack_name(table.pack) not in self._objects:
                    continue
                for block in table.blocks:
                    at = 0
                    for chunk_id, length in iter_refs(block.refs):
                        if chunk_id == wanted:
                            data = self._objects[pack_name(table.pack)][0]
                            stored = data[block.offset : block.offset + block.stored_bytes]
                            reader = PackReader(data, self._sealer)
                            raw = reader.open_block(stored, block.offset, block.raw_bytes, block.codec)
                            chunk = bytes(raw[at : at + length])
                            verify_chunks(chunk, wanted + length.to_bytes(4, "little"), self._id_key)
                            return chunk
                        at += length
        raise LookupError(f"chunk {wanted.hex()[:8]} is nowhere")

    def _reachable(self) -> set[bytes]:
        packs = {name.rpartition("/")[2] for name in self._objects if name.startswith("packs/")}
        found: set[bytes] = set()
        for _, tables in self._believed():
            for pack, ids in tables.items():
                if pack.hex() in packs:
                    found |= ids
        return found

    def _believed(self) -> Iterator[tuple[IndexObject, dict[bytes, frozenset[bytes]]]]:
        """The index objects of attempts that have committed."""
        for name in [name for name in self._objects if name.startswith("index/")]:
            end = self._end(f"snapshots/{name.partition('/')[2].partition('-')[0]}")
            if end in ("", "revoked"):
                continue
            if name not in self._index:
                index = open_index(self._sealer, name, self._objects[name][0])
                tables: dict[bytes, frozenset[bytes]] = {}
                for table in index.packs:
                    ids = {chunk_id for block in table.blocks for chunk_id in self._ids(block.refs)} - {UNNAMED}
                    tables[table.pack] = tables.get(table.pack, frozenset()) | ids
                self._index[name] = index, tables
            yield self._index[name]

    def _all_ends(self) -> list[tuple[str, Snapshot | str]]:
        return [(name, self._end(name)) for name in list(self._objects) if name.startswith("snapshots/")]

    def _end(self, name: str) -> Snapshot | str:
        """What stands there: a snapshot, or how the attempt ended else; "" if it has not."""
        if name not in self._objects:
            return ""
        data = self._objects[name][0]
        if self._ends.get(name, (b"", ""))[0] is not data:
            if sealing.kind_of(data) == sealing.END:
                self._ends[name] = data, open_end(self._sealer, name, data).outcome
            else:
                self._ends[name] = data, open_snapshot(self._sealer, name, data)
        return self._ends[name][1]
