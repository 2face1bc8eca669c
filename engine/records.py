"""What is stored, as records: catalog entries and pages, block tables, index objects, snapshot headers, config.

All are MessagePack by msgspec. Those that occur by the million are arrays without field names; headers are maps, so
that a later version can add fields. A *ref* names a chunk where it is used: its id and length in 36 bytes, packed
without structure since a file has one per MiB.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT_VERSION = 1
ID_BYTES = 32
REF_BYTES = 36
ATTEMPT_BYTES = 16
# In a block's refs, an id of zeros stands for bytes of chunks that are not named.
UNNAMED = bytes(ID_BYTES)
_REF, _REF_LENGTH = struct.Struct("<32sI"), struct.Struct("<32xI")

pack_ref = _REF.pack


def iter_refs(refs: bytes) -> Iterator[tuple[bytes, int]]:
    """Iterate over packed refs as (chunk id, length in bytes).

    :raises struct.error: if the length is no multiple of 36
    """
    return _REF.iter_unpack(refs)


def ref_lengths(refs: bytes) -> list[int]:
    """The lengths of the chunks that packed refs name, in bytes.

    :raises struct.error: if the length is no multiple of 36
    """
    return [length for (length,) in _REF_LENGTH.iter_unpack(refs)]


def refs_length(refs: bytes) -> int:
    """Sum of the lengths of the chunks that packed refs name, in bytes."""
    return sum(ref_lengths(refs))


class Extra(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What few entries have.

    `depth` 0: `Entry.content` names the file's chunks; n > 0: it names a list n levels above them, each list being
    packed refs in a chunk of its own. `extents` are the data extents of a sparse file as packed (offset, length)
    pairs of u64; the chunk stream is their concatenation. `xattrs_ref` and `extents_ref` are packed refs of chunks
    holding what would be too large inline (`xattrs` as MessagePack, `extents` as they are).
    """

    target: bytes = b""
    rdev: int = 0
    nlink: int = 1
    depth: int = 0
    xattrs: list[tuple[bytes, bytes]] = []
    xattrs_ref: bytes = b""
    extents: bytes = b""
    extents_ref: bytes = b""


class Entry(msgspec.Struct, array_like=True, gc=False):
    """One file, directory, link or other node of a snapshot. `mode` is the whole st_mode, type included.

    The root directory's entry has the empty name. `racy`: it changed so shortly before it was read that a later change
    might show the same times; the next backup reads it again. `content`: packed refs.
    """

    name: bytes
    mode: int
    uid: int
    gid: int
    user: str
    group: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int
    racy: bool = False
    content: bytes = b""
    extra: Extra | None = None


class Section(msgspec.Struct, array_like=True):
    """Entries of one directory, in order of their names; `directory` has no leading slash, the root is b""."""

    directory: bytes
    entries: list[Entry]


class PageRef(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A page, or a node of the page index, in the node above it: its first key, its ref and what lies below."""

    directory: bytes
    name: bytes
    ref: bytes
    entries: int
    files: int
    size_bytes: int


class Block(msgspec.Struct, array_like=True, gc=False):
    """One block of a pack: where it lies, stored and raw length in bytes, how it is coded, and its chunks as refs."""

    offset: int
    stored_bytes: int
    raw_bytes: int
    codec: int
    refs: bytes


class PackTable(msgspec.Struct, array_like=True):
    """The blocks of a pack, in an index object: all of them, or those that are relied on when adopted.

    `header` is the pack's clear header (64 bytes), so that a block can be opened without fetching it.
    """

    pack: bytes
    header: bytes
    size_bytes: int
    blocks: list[Block]


class IndexObject(msgspec.Struct, omit_defaults=True):
    """`index/<attempt>-<n>`: which chunk lies where. Merged ones carry copies of config and key slots."""

    packs: list[PackTable]
    config: bytes = b""
    slots: dict[str, bytes] = {}


class Mark(msgspec.Struct):
    """`trash/<n>`: packs to be swept, as their ids one behind the other."""

    packs: bytes


class Seen(msgspec.Struct):
    """`trash/<n>-seen`: the attempts that held a lease after the mark was put, one behind the other.

    `mark`: BLAKE3 of that mark's object. A mark that the storage lost gives its number to another.
    """

    attempts: bytes
    mark: bytes = b""


class Done(msgspec.Struct):
    """`trash/<n>-done`: the mark is over since then (ns since 1970, UTC)."""

    time_ns: int


class End(msgspec.Struct):
    """`snapshots/<attempt>` where there is no snapshot: how the attempt ended, and when (ns since 1970, UTC).

    "revoked": it was taken for dead, and its index objects are ignored. "maintained": it was maintenance and has
    committed. "swept": its snapshot was removed, and what only that needed may be gone. Both leave its index good.
    """

    outcome: Literal["revoked", "maintained", "swept"]
    time_ns: int


class Removal(msgspec.Struct):
    """`removed/<snapshot>-<attempt>`: by whom, from which host and when (ns since 1970, UTC) a snapshot was removed."""

    host: str
    user: str
    time_ns: int


class Counts(msgspec.Struct):
    """What a snapshot holds, and what making it took."""

    files: int = 0
    directories: int = 0
    others: int = 0
    size_bytes: int = 0
    new: int = 0
    changed: int = 0
    unmodified: int = 0
    read_bytes: int = 0
    added_bytes: int = 0
    stored_bytes: int = 0
    errors: int = 0


class SourceFault(msgspec.Struct, array_like=True):
    """A path that could not be backed up as it should, and why."""

    path: bytes
    reason: str


class SnapshotHeader(msgspec.Struct, omit_defaults=True):
    """`snapshots/<attempt>`: the commit. `catalog` is the ref of the catalog's root, `depth` levels above the pages.

    `roots` are absolute paths as typed (bytes). Times are ns since 1970, UTC.
    """

    snapshot_id: bytes
    time_ns: int
    duration_ns: int
    host: str
    user: str
    roots: list[bytes]
    catalog: bytes
    depth: int
    counts: Counts
    tags: list[str] = []
    faults: list[SourceFault] = []
    parent: bytes = b""
    program: str = ""


class ChunkerConfig(msgspec.Struct, frozen=True):
    """The chunker of a repository: its name and its parameters in bytes."""

    name: str = "fastcdc-gear64"
    min_bytes: int = 512 << 10
    avg_bytes: int = 1 << 20
    max_bytes: int = 4 << 20


class Config(msgspec.Struct, frozen=True, omit_defaults=True):
    """`config`, as JSON: what never changes in a repository. The keys are there only where there is no encryption."""

    version: int
    repository_id: str
    encryption: str  # "aes256-gcm" or "none"
    hash: str  # "blake3-256"
    chunker: ChunkerConfig
    pack_bytes: int
    created: str
    id_key: str = ""
    chunker_key: str = ""

    @property
    def encrypted(self) -> bool:
        """Whether the repository has a passphrase."""
        return self.encryption != "none"


encode = msgspec.msgpack.Encoder().encode
# What decoding raises: beside its own errors, msgspec lets pass those of bad UTF-8 and of nesting in what it skips.
UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)
decode_index = msgspec.msgpack.Decoder(IndexObject).decode
decode_page = msgspec.msgpack.Decoder(list[Section]).decode
decode_node = msgspec.msgpack.Decoder(list[PageRef]).decode
decode_seen = msgspec.msgpack.Decoder(Seen).decode
decode_mark = msgspec.msgpack.Decoder(Mark).decode
decode_removal = msgspec.msgpack.Decoder(Removal).decode
decode_end = msgspec.msgpack.Decoder(End).decode
decode_header = msgspec.msgpack.Decoder(SnapshotHeader).decode
# A map as it is, whatever its fields.
decode_fields = msgspec.msgpack.Decoder(dict[str, Any]).decode
decode_blocks = msgspec.msgpack.Decoder(list[Block]).decode
decode_xattrs = msgspec.msgpack.Decoder(list[tuple[bytes, bytes]]).decode
