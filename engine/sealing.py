"""Seal and open stored bytes: one key per object, derived from the data key and the object's own random salt.

AES-256-GCM with key = HKDF-SHA256(data key, salt, purpose) and nonce = the position within the object, so that no
nonce state is shared between writers and none can repeat. In a repository without encryption the 16 bytes of the tag
hold an xxh3-128 checksum, which finds damage, not malice.
"""

from __future__ import annotations

import os

import msgspec
import xxhash
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from coffret.engine.errors import Damaged
from coffret.engine.records import ATTEMPT_BYTES, FORMAT_VERSION

TAG_BYTES = 16
HEADER_BYTES = 64
MAGIC = b"COFFRET\0"
# Kinds of objects, in the header in clear: what a name holds can be told without a key, and never be taken for another.
# A footer is no object: it is the one part of a pack with a key of its own.
PACK, FOOTER, INDEX, SNAPSHOT, END, LEASE, MARK, REMOVED = (bytes([c]) for c in b"PFISELMR")
CLEAR, WRAPPED_BY_DATA_KEY = 0, 1
RAW, ZSTD = 0, 1
# No record but a pack may be larger: a hostile length can't exhaust memory.
MAX_OBJECT_BYTES = 1 << 30


class Secrets(msgspec.Struct, frozen=True):
    """The keys of a repository, 32 bytes each; `data_key` is empty where there is no encryption."""

    data_key: bytes
    id_key: bytes
    chunker_key: bytes

    def __repr__(self) -> str:
        return "Secrets"  # keys never reach a log or a traceback

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []


class BlockCipher:
    """Seals and opens the parts of one object (one salt). Calls release the GIL and may run in any thread.

    `bound` is authenticated with every part, beside its position.
    """

    __slots__ = ("_aes", "_bound")

    def __init__(self, key: bytes | None, bound: bytes) -> None:
        self._aes = AESGCM(key) if key is not None else None
        self._bound = bound

    def seal_into(self, data: bytes | memoryview, position: int, target: memoryview) -> None:
        """Seal `data` into `target`, which is 16 bytes longer, as the part at `position`."""
        where = position.to_bytes(12, "little")
        if self._aes is not None:
            self._aes.encrypt_into(where, data, self._bound + where, target)
        else:
            target[:-TAG_BYTES] = data
            target[-TAG_BYTES:] = self._checksum(data, where)

    def open(self, sealed: bytes | memoryview, position: int) -> bytes | memoryview:
        """Return what was sealed at `position`.

        :raises Damaged: if it is not exactly what was sealed there
        """
        where = position.to_bytes(12, "little")
        if len(sealed) < TAG_BYTES:
            raise Damaged("a sealed part is cut short")
        if self._aes is not None:
            try:
                return self._aes.decrypt(where, sealed, self._bound + where)
            except InvalidTag:
                raise Damaged("a sealed part does not authenticate") from None
        data = memoryview(sealed)[:-TAG_BYTES]
        if self._checksum(data, where) != bytes(sealed[-TAG_BYTES:]):
            raise Damaged("a part does not have its checksum")
        return data

    def open_into(self, sealed: memoryview, position: int, buffer: memoryview) -> memoryview:
        """`open` without fresh memory: into `buffer`, which is long enough; returns the part of it that is filled.

        Without encryption nothing is copied: what is returned lies in `sealed`.

        :raises Damaged: if it is not exactly what was sealed there
        """
        size = len(sealed) - TAG_BYTES
        if self._aes is None or size < 0:
            return memoryview(self.open(sealed, position))
        where = position.to_bytes(12, "little")
        try:
            self._aes.decrypt_into(where, sealed, self._bound + where, buffer[:size])
        except InvalidTag:
            raise Damaged("a sealed part does not authenticate") from None
        return buffer[:size]

    def _checksum(self, data: bytes | memoryview, where: bytes) -> bytes:
        state = xxhash.xxh3_128(self._bound + where)
        state.update(data)
        return state.digest()


class Sealer:
    """Everything about sealing that belongs to one repository: its data key and its id."""

    def __init__(self, secrets: Secrets, repository_id: bytes) -> None:
        self._data_key = secrets.data_key
        self._repository_id = repository_id
        self.encrypted = bool(secrets.data_key)
        self._wrap = WRAPPED_BY_DATA_KEY if self.encrypted else CLEAR

    def header(self, kind: bytes, attempt: bytes, codec: int = RAW) -> bytes:
        """A new object's clear header, with a fresh salt: 64 bytes."""
        return b"".join(
            (MAGIC, bytes((FORMAT_VERSION,)), kind, bytes((self._wrap, codec)), attempt, bytes(4), os.urandom(32))
        )

    def cipher(self, header: bytes | memoryview, kind: bytes, name: str = "") -> BlockCipher:
        """The cipher of the object with this header; the header, the repository and the name are bound into every part.

        An object of another version is damage: the config says what all objects are, and never changes.

        :raises Damaged: if it is no header, or not one that such an object of this repository can have
        """
        header = bytes(header[:HEADER_BYTES])
        check_header(header, kind, encrypted=self.encrypted)
        return self.cipher_like(header, kind, name)

    def cipher_like(self, header: bytes, purpose: bytes, name: str = "") -> BlockCipher:
        """The cipher for one purpose within the object with this header, which is taken as it is."""
        key = None
        if self.encrypted:
            key = HKDF(SHA256(), 32, header[32:], b"coffret object " + purpose).derive(self._data_key)
        return BlockCipher(key, b"".join((header, purpose, self._repository_id, name.encode(), b"\0")))

    def seal(self, kind: bytes, name: str, attempt: bytes, payload: bytes, *, level: int = 3) -> bytes:
        """A whole object: header, then the payload compressed and sealed, bound to its name."""
        packed = zstandard.ZstdCompressor(level=level).compress(payload)
        codec = ZSTD if len(packed) < len(payload) else RAW
        body = packed if codec == ZSTD else payload
        header = self.header(kind, attempt, codec)
        target = bytearray(HEADER_BYTES + len(body) + TAG_BYTES)
        target[:HEADER_BYTES] = header
        self.cipher(header, kind, name).seal_into(body, 0, memoryview(target)[HEADER_BYTES:])
        return bytes(target)

    def open(self, kind: bytes, name: str, data: bytes) -> tuple[bytes, bytes]:
        """Return (attempt, payload) of a whole object.

        :raises Damaged: if it is not what was stored under this name
        """
        try:
            body = self.cipher(data, kind, name).open(memoryview(data)[HEADER_BYTES:], 0)
            payload = decompress(body, MAX_OBJECT_BYTES) if data[11] == ZSTD else bytes(body)
        except Damaged as error:
            raise Damaged(f"{name}: {error}") from None
        return data[12 : 12 + ATTEMPT_BYTES], payload


def check_header(header: bytes | memoryview, kind: bytes, *, encrypted: bool) -> None:
    """See that this is the clear header of an object of a kind, in a repository with or without encryption.

    :raises Damaged: if it is not
    """
    if len(header) < HEADER_BYTES or header[:8] != MAGIC:
        raise Damaged("not an object of a coffret repository")
    if header[8] != FORMAT_VERSION:
        raise Damaged(f"an object says that it has format version {header[8]}, unlike its repository")
    if header[9:10] != kind:
        raise Damaged("an object is of another kind than its name says")
    if header[10] != (WRAPPED_BY_DATA_KEY if encrypted else CLEAR) or header[11] not in (RAW, ZSTD):
        raise Damaged("an object is encrypted or compressed otherwise than any in its repository")


def kind_of(data: bytes) -> bytes:
    """The kind of an object, by its clear header (b"" if it is none)."""
    return data[9:10] if data[:8] == MAGIC else b""


def decompress(data: bytes | memoryview, limit_bytes: int) -> bytes:
    """One zstd frame's content, of at most `limit_bytes`.

    :raises Damaged: if it is no such frame
    """
    try:
        declared = zstandard.frame_content_size(data)
        if not 0 <= declared <= limit_bytes:
            raise Damaged("a compressed part declares an absurd length")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError:
        raise Damaged("a compressed part does not decompress") from None
