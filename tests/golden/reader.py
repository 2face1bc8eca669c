"""A reader of repositories after docs/format.md alone: it shares no code with the engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from blake3 import blake3
from tests import format_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass
class Reader:
    """A repository as its objects by name; `chunks` are all that index objects locate, by id."""

    objects: Mapping[str, bytes]
    passphrase: bytes
    data_key: bytes = b""
    chunks: dict[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = json.loads(self.objects["config"])
        assert oracle.as_json(config) == self.objects["config"]
        assert config["version"] == 1
        assert config["repository_id"] == oracle.certified(config)
        self.repository_id = bytes.fromhex(config["repository_id"])
        if config["encryption"] == "none":
            self.id_key = bytes.fromhex(config["id_key"])
        else:
            keys = self._unlock(blake3(self.objects["config"]).digest())
            self.data_key, self.id_key = keys[:32], keys[32:64]
        self.ends = {name: self._open(name) for name in self._under("snapshots/")}
        self._index()

    def _under(self, prefix: str) -> list[str]:
        return [name for name in self.objects if name.startswith(prefix)]

    def _open(self, name: str) -> Any:
        return oracle.open_object(self.data_key, self.repository_id, name, self.objects[name])

    def _unlock(self, config_hash: bytes) -> bytes:
        removals = sorted(self._under("keys/removed-"), key=lambda name: int(name.rpartition("-")[2]))
        removed = []
        if removals:
            log = json.loads(self.objects[removals[-1]])
            assert (log["config"], log["number"]) == (config_hash.hex(), len(removals))
            removed = log["removed"]
        for name in self._under("keys/"):
            slot_id = name.removeprefix("keys/")
            if slot_id in removed or name in removals:
                continue
            assert slot_id == blake3(self.objects[name]).hexdigest()
            try:
                return oracle.open_slot(json.loads(self.objects[name]), self.passphrase, config_hash)
            except AssertionError:  # another passphrase's
                continue
        raise ValueError("the passphrase opens no slot")

    def _index(self) -> None:
        for name in self._under("index/"):
            end = self.ends.get(f"snapshots/{name[6:38]}", {})
            if end.get("outcome") == "revoked":
                continue
            for pack_id, header, size_bytes, blocks in self._open(name)["packs"]:
                stored = self.objects[f"packs/{pack_id.hex()[:2]}/{pack_id.hex()}"]
                assert blake3(stored).digest() == pack_id
                assert (len(stored), stored[:64]) == (size_bytes, header)
                raws = {row[0]: (row, raw) for row, raw in oracle.open_pack(self.data_key, self.repository_id, stored)}
                for block in blocks:
                    row, raw = raws[block[0]]
                    assert block[:4] == row[:4]
                    self._take(raw, block[4])

    def _take(self, raw: bytes, refs: bytes) -> None:
        at = 0
        for chunk_id, length in oracle.split_refs(refs):
            piece = raw[at : at + length]
            if chunk_id != bytes(32):
                assert oracle.chunk_id(self.id_key, piece) == chunk_id
                self.chunks[chunk_id] = piece
            at += length

    def snapshots(self) -> list[dict[str, Any]]:
        """Headers of the snapshots that are there, by time."""
        removed = {name.removeprefix("removed/") for name in self._under("removed/")}
        found = [
            end
            for name, end in self.ends.items()
            if "catalog" in end and f"{end['snapshot_id'].hex()}-{name[10:]}" not in removed
        ]
        return sorted(found, key=lambda header: header["time_ns"])

    def payload(self, refs: bytes) -> bytes:
        """What refs name."""
        pieces = [(self.chunks[chunk_id], length) for chunk_id, length in oracle.split_refs(refs)]
        assert all(len(piece) == length for piece, length in pieces)
        return b"".join(piece for piece, _ in pieces)

    def entries(self, refs: bytes, depth: int) -> Iterator[tuple[bytes, list[Any]]]:
        """(directory, entry) of a catalog, in its order."""
        record = msgspec.msgpack.decode(self.payload(refs))
        if depth == 0:
            for directory, entries in record:
                for entry in entries:
                    yield directory, entry
            return
        for directory, name, ref, count, files, size_bytes in record:
            below = list(self.entries(ref, depth - 1))
            assert (below[0][0], below[0][1][0], len(below)) == (directory, name, count)
            sizes = [entry[6] for _, entry in below if entry[1] & 0o170000 == 0o100000]
            assert (len(sizes), sum(sizes)) == (files, size_bytes)
            yield from below

    def content(self, entry: list[Any]) -> bytes:
        """What is stored of a file."""
        refs = entry[12]
        for _ in range(entry[13][3] if entry[13] else 0):
            refs = self.payload(refs)
        return self.payload(refs)

    def attributes(self, entry: list[Any]) -> tuple[list[list[bytes]], bytes]:
        """(xattrs, extents) of an entry."""
        if not entry[13]:
            return [], b""
        _, _, _, _, xattrs, xattrs_ref, extents, extents_ref = entry[13]
        return (
            msgspec.msgpack.decode(self.payload(xattrs_ref)) if xattrs_ref else xattrs,
            self.payload(extents_ref) if extents_ref else extents,
        )
