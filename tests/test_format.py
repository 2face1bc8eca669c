"""docs/format.md is true: its vectors by an independent implementation, and the engine by the vectors."""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from tests import format_oracle as oracle

from coffret.connectors.memory import MemoryConnector
from coffret.engine import catalog, catalog_reader, catalog_walk, chunker, configuration, kdf, keys, packfile, sealing
from coffret.engine.catalog import Cutter, RefList, describe
from coffret.engine.chunker import FASTCDC_GEAR64, Chunker
from coffret.engine.configuration import config_bytes, config_hash, new_config, parse_config
from coffret.engine.kdf import Cost
from coffret.engine.keyring import read_keyring
from coffret.engine.keys import endorsed, parse_slot, unlock, wrap
from coffret.engine.packfile import PackReader, pack_name, verify_chunks
from coffret.engine.records import (
    UNNAMED,
    decode_index,
    decode_mark,
    decode_page,
    encode,
    iter_refs,
    pack_ref,
)
from coffret.engine.removal import open_removal, seal_removal
from coffret.engine.sealing import Sealer, Secrets
from coffret.engine.snapshot import open_end, open_snapshot, removal_name

VECTORS = oracle.vectors()
KEYS = VECTORS["slot"]
SECRETS = Secrets(KEYS["data_key"], KEYS["id_key"], KEYS["chunker_key"])
REPOSITORY = VECTORS["config"]["repository_id"]
SEALER = Sealer(SECRETS, REPOSITORY)
CLEAR = Sealer(Secrets(b"", SECRETS.id_key, SECRETS.chunker_key), REPOSITORY)


def entropy(vector: dict[str, Any], *names: str) -> Any:
    """What a vector says was random, in the order it is asked for."""
    values = [vector[name] for name in names]

    def give(length: int) -> bytes:
        value: bytes = values.pop(0)
        assert len(value) == length
        return value

    return give


def opened(name: str) -> Any:
    """The record in the object of a vector, by the document."""
    vector = VECTORS[name]
    return oracle.open_object(SECRETS.data_key, REPOSITORY, vector["name"], vector["stored"])


def test_every_vector_is_used() -> None:
    source = (oracle.DOCUMENT.parent.parent / "tests" / "test_format.py").read_text()
    assert all(f'"{name}"' in source for name in VECTORS)


def test_config() -> None:
    vector = VECTORS["config"]
    stored = config_bytes(new_config(SECRETS, entropy=entropy(vector, "nonce"), created=vector["created"]))
    by_document = json.loads(stored)
    assert oracle.as_json(by_document) == stored
    assert by_document["repository_id"] == oracle.certified(by_document) == vector["repository_id"].hex()
    assert parse_config(stored).repository_id == vector["repository_id"].hex()
    assert config_hash(stored) == blake3(stored).digest() == vector["config_hash"]


def test_slot() -> None:
    vector, cost = KEYS, Cost(KEYS["memory_kib"], KEYS["passes"], KEYS["lanes"])
    passphrase, digest = vector["passphrase"].encode(), VECTORS["config"]["config_hash"]
    given = entropy(vector, "salt", "nonce")
    slot_id, stored = wrap(
        SECRETS, passphrase, digest, label=vector["label"], cost=cost, entropy=given, created=vector["created"]
    )
    assert slot_id == blake3(stored).hexdigest() == vector["slot_id"].hex()
    fields = json.loads(stored)
    for name in ("commitment", "wrapped", "endorsement"):
        assert fields[name] == b64encode(vector[name]).decode()
    assert oracle.as_json(fields) == stored
    assert oracle.open_slot(fields, passphrase, digest) == b"".join(KEYS[f"{n}_key"] for n in ("data", "id", "chunker"))
    assert unlock({slot_id: stored}, passphrase, digest) == (slot_id, SECRETS)
    assert endorsed(parse_slot(slot_id, stored), SECRETS, digest)


@pytest.mark.anyio
async def test_removal_log() -> None:
    vector = VECTORS["removal"]
    fields = {"version": 1, "created": vector["created"], "number": vector["number"]}
    fields |= {"config": vector["config"].hex(), "nonce": b64encode(vector["nonce"]).decode()}
    fields |= {"removed": vector["removed"], "checksum": ""}
    assert blake3(oracle.as_json(fields)[:-1]).digest() == vector["checksum"]
    fields["checksum"] = b64encode(vector["checksum"]).decode()
    connector = MemoryConnector()
    await connector.put("keys/removed-1", [oracle.as_json(fields)])
    assert vector["config"] == VECTORS["config"]["config_hash"]
    keyring = await read_keyring(connector, vector["config"])
    assert keyring.removed == set(vector["removed"]) == {VECTORS["slot"]["slot_id"].hex()}
    assert not keyring.log_damaged


def test_keys_of_an_object() -> None:
    vector = VECTORS["key"]
    header = bytes(32) + vector["salt"]
    assert vector["repository_id"] == REPOSITORY
    for purpose, name in ((b"P", "pack_key"), (b"F", "footer_key"), (b"S", "snapshot_key")):
        assert oracle.part_key(vector["data_key"], header, purpose) == vector[name]
    target = memoryview(bytearray(16))
    by_vector = sealing.BlockCipher(vector["footer_key"], header + b"F" + REPOSITORY + b"\0")
    by_vector.seal_into(b"", 7, target)
    assert SEALER.cipher_like(header, b"F").open(target, 7) == b""


@pytest.mark.parametrize(("name", "sealer"), [("block", SEALER), ("block-in-clear", CLEAR)])
def test_block(name: str, sealer: Sealer) -> None:
    vector = VECTORS[name]
    header, at = vector["header"], vector["position"]
    key = SECRETS.data_key if sealer.encrypted else b""
    assert oracle.associated(header, b"P", REPOSITORY, "", at) == vector.get(
        "associated", header + b"P" + REPOSITORY + b"\0" + struct.pack("<QI", at, 0)
    )
    assert oracle.open_part(key, header, b"P", REPOSITORY, "", at, vector["stored"]) == vector["data"]
    cipher = sealer.cipher(header, sealing.PACK)
    assert bytes(cipher.open(vector["stored"], at)) == vector["data"]
    target = bytearray(len(vector["stored"]))
    cipher.seal_into(vector["data"], at, memoryview(target))
    assert target == vector["stored"]


def test_whole_object(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = VECTORS["object"]
    stored, attempt = vector["stored"], vector["stored"][12:28]
    assert opened("object") == msgspec.msgpack.decode(vector["payload"])
    assert SEALER.open(sealing.LEASE, vector["name"], stored) == (attempt, vector["payload"])
    monkeypatch.setattr("os.urandom", lambda length: stored[32:64])
    assert SEALER.seal(sealing.LEASE, vector["name"], attempt, vector["payload"]) == stored


def test_pack() -> None:
    vector = VECTORS["pack"]
    stored, chunks = vector["stored"], [chunk.encode() for chunk in vector["chunks"]]
    rows = oracle.open_pack(SECRETS.data_key, REPOSITORY, stored)
    assert [raw for _, raw in rows] == [chunks[0] + chunks[1], chunks[2]]
    refs = [ref for row, _ in rows for ref in oracle.split_refs(row[4])]
    assert refs == [(oracle.chunk_id(SECRETS.id_key, chunk), len(chunk)) for chunk in chunks]
    assert blake3(stored).digest() == vector["pack_id"]
    assert pack_name(vector["pack_id"]) == f"packs/{vector['pack_id'].hex()[:2]}/{vector['pack_id'].hex()}"
    reader = PackReader(stored, SEALER)
    blocks = reader.open_footer(stored, len(stored))
    assert [[b.offset, b.stored_bytes, b.raw_bytes, b.codec, b.refs] for b in blocks] == [row for row, _ in rows]
    for block in blocks:
        part = stored[block.offset : block.offset + block.stored_bytes]
        verify_chunks(reader.open_block(part, block.offset, block.raw_bytes, block.codec), block.refs, SECRETS.id_key)


def test_chunk_id() -> None:
    vector = VECTORS["chunk-id"]
    assert oracle.chunk_id(vector["id_key"], vector["chunk"]) == vector["chunk_id"]
    verify_chunks(vector["chunk"], pack_ref(vector["chunk_id"], len(vector["chunk"])), vector["id_key"])


def test_chunker() -> None:
    vector = VECTORS["chunker"]
    data = blake3(b"format").digest(length=8192)
    table = oracle.gear_table(vector["chunker_key"])
    assert [f"{value:016x}" for value in table[:4]] == vector["table"]
    minimum, average, maximum = vector["sizes"]
    assert oracle.cut(table, (minimum, average, maximum), data) == vector["lengths"]
    cutter = Chunker(FASTCDC_GEAR64, minimum, average, maximum, vector["chunker_key"])
    assert cutter.cut(data, final=True) == vector["lengths"]


def test_lists() -> None:
    ids = [blake3(b"%d" % number).digest() for number in range(3000)]
    assert oracle.lists(ids) == VECTORS["lists"]["refs_in_lists"]
    stored: list[bytes] = []

    def store(payload: bytes) -> bytes:
        stored.append(payload)
        return pack_ref(blake3(payload).digest(), len(payload))

    refs = RefList(store)
    for chunk_id in ids:
        refs.add(chunk_id, 1)
    content, depth = refs.finish()
    assert [len(payload) // 36 for payload in stored] == VECTORS["lists"]["refs_in_lists"]
    assert (content, depth) == (b"".join(pack_ref(blake3(p).digest(), len(p)) for p in stored), 1)


def test_cuts_of_the_catalog() -> None:
    vector = VECTORS["cuts"]
    seed, directory = oracle.catalog_seed(vector["chunker_key"]), vector["directory"].encode()
    cutter = Cutter(vector["chunker_key"])
    assert f"{seed:016x}" == vector["catalog_seed"]
    assert f"{cutter.seed(directory):016x}" == vector["directory_seed"]
    for name, level in vector["levels"].items():
        assert oracle.level(seed, directory, name.encode()) == level
        assert cutter.level(cutter.seed(directory), name.encode()) == level


def test_page() -> None:
    vector = VECTORS["page"]
    payload = vector["payload"]
    sections = decode_page(payload)
    assert encode(sections) == payload
    assert [section.directory.decode() for section in sections] == vector["directories"]
    entries = [entry for section in sections for entry in section.entries]
    assert [entry.name.decode() for entry in entries] == vector["names"]
    ref = describe(sections, b"")
    assert (ref.entries, ref.files, ref.size_bytes) == (vector["entries"], vector["files"], vector["size_bytes"])
    plain = [fields for _, listed in msgspec.msgpack.decode(payload) for fields in listed]
    hosts, link = plain[2], plain[3]
    assert hosts[1:7] == [0o100644, 1000, 100, "me", "users", 5]
    assert oracle.split_refs(hosts[12]) == [(VECTORS["chunk-id"]["chunk_id"], 5)]
    assert link[13] == [b"hosts", 0, 1, 0, [], b"", b"", b""]


def test_index_object() -> None:
    vector, pack = VECTORS["index"], VECTORS["pack"]
    [[pack_id, header, size_bytes, blocks]] = opened("index")["packs"]
    assert (pack_id, header, size_bytes) == (vector["pack"], pack["stored"][:64], len(pack["stored"]))
    assert pack_id == pack["pack_id"]
    found = []
    for offset, _, _, _, refs in blocks:
        inner = 0
        for chunk_id, length in oracle.split_refs(refs):
            if chunk_id != bytes(32):
                found.append((chunk_id, offset, inner))
            inner += length
    chunks = [(oracle.chunk_id(SECRETS.id_key, c.encode()), at, inner) for c, at, inner in vector["located"]]
    assert found == chunks
    _, payload = SEALER.open(sealing.INDEX, vector["name"], vector["stored"])
    [table] = decode_index(payload).packs
    named = [ref for block in table.blocks for ref in iter_refs(block.refs)]
    assert [chunk_id for chunk_id, _ in named] == [UNNAMED, *(chunk_id for chunk_id, _, _ in found)]


def test_snapshot_and_tombstone() -> None:
    vector, plain = VECTORS["snapshot"], opened("snapshot")
    snapshot = open_snapshot(SEALER, vector["name"], vector["stored"])
    assert snapshot.header.snapshot_id == plain["snapshot_id"] == vector["snapshot_id"]
    assert snapshot.header.catalog == plain["catalog"] == vector["catalog"]
    assert vector["catalog"][:32] == oracle.chunk_id(SECRETS.id_key, VECTORS["page"]["payload"])
    assert [root.decode() for root in snapshot.header.roots] == vector["roots"]
    assert snapshot.header.tags == plain["tags"] == vector["tags"]
    assert encode(snapshot.header) == msgspec.msgpack.encode(plain)
    vector = VECTORS["tombstone"]
    end = open_end(SEALER, vector["name"], vector["stored"])
    assert opened("tombstone") == {"outcome": vector["outcome"], "time_ns": end.time_ns}
    assert end.outcome == vector["outcome"]


def test_mark() -> None:
    vector = VECTORS["mark"]
    _, payload = SEALER.open(sealing.MARK, vector["name"], vector["stored"])
    assert decode_mark(payload).packs == opened("mark")["packs"] == b"".join(map(bytes.fromhex, vector["packs"]))


def test_removal_of_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    vector, stored = VECTORS["removed"], VECTORS["removed"]["stored"]
    assert opened("removed") == {name: vector[name] for name in ("host", "user", "time_ns")}
    removal = open_removal(SEALER, vector["name"], stored)
    assert (removal.host, removal.user, removal.time_ns) == (vector["host"], vector["user"], vector["time_ns"])
    committed = open_snapshot(SEALER, VECTORS["snapshot"]["name"], VECTORS["snapshot"]["stored"])
    assert removal_name(committed.header.snapshot_id, committed.attempt) == vector["name"]
    monkeypatch.setattr("os.urandom", lambda length: stored[32:64])
    assert seal_removal(SEALER, vector["name"], stored[12:28], removal) == stored


def test_limits() -> None:
    """What the document says that a reader refuses."""
    text = oracle.DOCUMENT.read_text()
    for said, held in (
        ("config | 16 KiB", configuration.MAX_CONFIG_BYTES == 16 << 10),
        ("key slot | 4 KiB; 64 that are live", (keys.MAX_SLOT_BYTES, keys.MAX_SLOTS) == (4 << 10, 64)),
        ("1 GiB of memory and at least 8 KiB a lane, 16 passes, 16 lanes", kdf.CEILING == (1 << 20, 16, 16)),
        ("payload of an object that is no pack; block table | 1 GiB", sealing.MAX_OBJECT_BYTES == 1 << 30),
        ("block | 64 MiB raw", packfile.MAX_RAW_BYTES == chunker.MAX_BYTES == 64 << 20),
        ("page, node, list | 16 MiB", catalog_walk._MAX_PAYLOAD_BYTES == 16 << 20),
        ("depth 0 … 16", catalog.MAX_DEPTH == 16),
        ("xattrs, extents in chunks | 256 MiB", catalog_reader._MAX_ATTRIBUTE_BYTES == 256 << 20),
    ):
        assert said in text
        assert held, said
