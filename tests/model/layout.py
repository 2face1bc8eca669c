"""Names and bodies of the model's objects: the names of the format, bodies of only what the protocol looks at."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

import msgspec

LEASES = "leases/"
PACKS = "packs/"
INDEX = "index/"
SNAPSHOTS = "snapshots/"
REMOVED = "removed/"
TRASH = "trash/"


class Pack(msgspec.Struct, frozen=True, array_like=True):
    """A pack, and what an index object says of it: who wrote it, which chunks lie in it."""

    attempt: str
    chunks: frozenset[str]


class Index(msgspec.Struct, frozen=True, array_like=True):
    """An index object: the packs it names, by id."""

    packs: dict[str, Pack]


class Kind(Enum):
    """What ended an attempt."""

    SNAPSHOT = "snapshot"
    MAINTENANCE = "maintenance"  # a mark, a sweep or a merge has committed
    TOMBSTONE = "tombstone"
    SWEPT = "swept"  # stands where a removed snapshot was; unlike a tombstone's, its index objects stay good


class End(msgspec.Struct, frozen=True, array_like=True):
    """`snapshots/<attempt>`. `by` is the attempt that put it, the nonce by which a lost answer is decided."""

    kind: Kind
    by: str
    snapshot: str = ""
    chunks: frozenset[str] = frozenset()

    @property
    def committed(self) -> bool:
        """Whether the attempt's index objects may be believed."""
        return self.kind is not Kind.TOMBSTONE


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """`trash/<n>`: the packs to be swept."""

    by: str
    packs: frozenset[str]


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """`trash/<n>-seen`: the attempts that held a lease after the mark was put."""

    attempts: frozenset[str]


class Note(msgspec.Struct, frozen=True, array_like=True):
    """A lease, a record in `removed/`, the end of a mark: nothing but who put it."""

    by: str


Body = TypeVar("Body", Pack, Index, End, Mark, Seen, Note)
encode = msgspec.msgpack.Encoder().encode


def decode(data: bytes, kind: type[Body]) -> Body:
    """Decode an object's body."""
    return msgspec.msgpack.decode(data, type=kind)


def pack_name(pack: str) -> str:
    """`packs/<aa>/<id>`."""
    return f"{PACKS}{pack[:2]}/{pack}"


def attempt_of(index_name: str) -> str:
    """The attempt in `index/<attempt>-<n>`."""
    return index_name.removeprefix(INDEX).partition("-")[0]


def removed_name(snapshot: str, attempt: str) -> str:
    """`removed/<snapshot>-<attempt>`, where `attempt` is the one the snapshot was committed under."""
    return f"{REMOVED}{snapshot}-{attempt}"
