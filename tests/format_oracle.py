"""The format once more, from docs/format.md and the primitives it names: shares no code with the engine."""

from __future__ import annotations

import hmac
import json
import re
import struct
from base64 import b64decode
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from xxhash import xxh3_64_intdigest, xxh3_128_digest

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def vectors() -> dict[str, dict[str, Any]]:
    """The test vectors of the document: `name = hexadecimal`, gone on with in indented lines, or `name: JSON`."""
    found: dict[str, dict[str, Any]] = {}
    for title, body in re.findall(r"^```vector (\S+)\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE):
        found[title] = vector = {}
        for line in re.sub(r"\n +", "", body).splitlines():
            name, kind, value = re.fullmatch(r"(\w+)( =|:) (.*)", line).groups()  # type: ignore[union-attr]
            vector[name] = bytes.fromhex(value) if kind == " =" else json.loads(value)
    return found


def hkdf_sha256(key: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869, one block of output."""
    return hmac.digest(hmac.digest(salt, key, "sha256"), info + b"\1", "sha256")


def part_key(data_key: bytes, header: bytes, purpose: bytes) -> bytes:
    return hkdf_sha256(data_key, header[32:64], b"coffret object " + purpose)


def associated(header: bytes, purpose: bytes, repository_id: bytes, name: str, position: int) -> bytes:
    return header + purpose + repository_id + name.encode() + b"\0" + position.to_bytes(12, "little")


def open_part(
    data_key: bytes, header: bytes, purpose: bytes, repository_id: bytes, name: str, position: int, stored: bytes
) -> bytes:
    """Without a data key the part must have its checksum."""
    bound = associated(header, purpose, repository_id, name, position)
    if not data_key:
        assert stored[-16:] == xxh3_128_digest(bound + stored[:-16])
        return stored[:-16]
    key = part_key(data_key, header, purpose)
    return AESGCM(key).decrypt(position.to_bytes(12, "little"), stored, bound)


def open_object(data_key: bytes, repository_id: bytes, name: str, stored: bytes) -> Any:
    """The record in an object that is no pack."""
    header = stored[:64]
    assert header[:9] == b"COFFRET\0\1"
    assert header[28:32] == bytes(4)
    body = open_part(data_key, header, header[9:10], repository_id, name, 0, stored[64:])
    return msgspec.msgpack.decode(zstandard.decompress(body) if header[11] else body)


def open_pack(data_key: bytes, repository_id: bytes, stored: bytes) -> list[tuple[list[Any], bytes]]:
    """The blocks of a pack, as (row of the block table, raw bytes)."""
    header = stored[:64]
    length, count, magic = struct.unpack("<II8s", stored[-16:])
    assert (header[9:10], header[11], magic) == (b"P", 0, b"COFFREND")
    at = len(stored) - 16 - length
    footer = open_part(data_key, header, b"F", repository_id, "", at, stored[at:-16])
    table = msgspec.msgpack.decode(zstandard.decompress(footer))
    assert len(table) == count
    blocks, end = [], 64
    for row in table:
        offset, stored_bytes, raw_bytes, codec, refs = row
        assert offset == end
        end += stored_bytes
        body = open_part(data_key, header, b"P", repository_id, "", offset, stored[offset:end])
        raw = zstandard.decompress(body) if codec else body
        assert len(raw) == raw_bytes == sum(length for _, length in split_refs(refs))
        blocks.append((row, raw))
    assert end == at
    return blocks


def split_refs(refs: bytes) -> list[tuple[bytes, int]]:
    return list(struct.iter_unpack("<32sI", refs))


def chunk_id(id_key: bytes, chunk: bytes) -> bytes:
    return blake3(chunk, key=id_key).digest()


def gear_table(chunker_key: bytes) -> list[int]:
    return list(struct.unpack("<256Q", blake3(b"coffret gear table", key=chunker_key).digest(length=2048)))


def cut(table: list[int], sizes: tuple[int, int, int], data: bytes) -> list[int]:
    """Chunk lengths of a stream."""
    minimum, average, maximum = sizes
    bits, start, lengths = average.bit_length() - 1, 0, []
    while start < len(data):
        length = min(maximum, len(data) - start)
        for offset in range(minimum, length):
            h = sum(table[data[start + offset - k]] << k for k in range(64)) % 2**64
            if h >> 64 - (bits if offset < average else bits - 2) == 0:
                length = offset + 1
                break
        lengths.append(length)
        start += length
    return lengths


def catalog_seed(chunker_key: bytes) -> int:
    return int.from_bytes(blake3(b"coffret catalog cuts", key=chunker_key).digest()[:8], "little")


def level(seed: int, directory: bytes, name: bytes) -> int:
    """Level of an entry, by the catalog's seed."""
    bits = xxh3_64_intdigest(name, xxh3_64_intdigest(directory, seed))
    if bits % 256:
        return 0
    found, bits = 1, bits // 256
    while found < 10 and bits % 64 == 0:
        found, bits = found + 1, bits // 64
    return found


def lists(ids: list[bytes]) -> list[int]:
    """How many refs the lists of a file with these chunks have, lowest level only."""
    found = [0]
    for number in range(len(ids)):
        held = found[-1]
        if held >= 1024 or (held >= 64 and int.from_bytes(ids[number - 1][:4], "little") % 256 == 0):
            found.append(0)
        found[-1] += 1
    return found


def certified(config: dict[str, Any]) -> str:
    """The repository id that a config must have."""
    nonce = config["repository_id"][:32]
    body = as_json({**config, "repository_id": nonce})
    hashed: str = blake3(body, derive_key_context="coffret 2026 repository id of a config").hexdigest()
    return f"{nonce}{hashed[:32]}"


def as_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def open_slot(slot: dict[str, Any], passphrase: bytes, config_hash: bytes) -> bytes:
    """The three keys in a slot, one behind the other."""
    raw = {name: b64decode(slot[name]) for name in ("salt", "nonce", "wrapped", "commitment", "endorsement")}
    kdf = Argon2id(
        salt=raw["salt"], length=64, iterations=slot["passes"], lanes=slot["lanes"], memory_cost=slot["memory_kib"]
    )
    derived = kdf.derive(passphrase)
    commitment = blake3(derived[32:], derive_key_context="coffret 2026 key slot commitment").digest()
    assert commitment == raw["commitment"]
    start = b"coffret key slot\0" + config_hash
    bound = start + as_json({**slot, "wrapped": "", "endorsement": ""})
    keys = AESGCM(derived[:32]).decrypt(raw["nonce"], raw["wrapped"], bound)
    endorsing = blake3(keys[:32], derive_key_context="coffret 2026 key slot endorsement").digest()
    endorsement = blake3(start + as_json({**slot, "endorsement": ""}), key=endorsing).digest()
    assert endorsement == raw["endorsement"]
    return keys
