"""What the stages of a backup send each other, and the queue of chunks that the engine makes itself.

Stages never import each other: these are all they share.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec
from blake3 import blake3

from coffret.engine.records import pack_ref
from coffret.engine.sealing import RAW
from coffret.engine.settings import BLOCK_BYTES

if TYPE_CHECKING:
    from coffret.engine.catalog_walk import LoadedPage
    from coffret.engine.records import Entry, PageRef


class Read(msgspec.Struct):
    """A file to be read for a page: where its entry goes, and what the scan saw.

    `path` is its name in the snapshot, `source` where it lies: the same, but where a link led to what was asked for.
    """

    page: ScanPage
    entries: list[Entry | None]
    index: int
    path: bytes
    source: bytes
    name: bytes
    size_bytes: int


class ScanPage(msgspec.Struct, eq=False):
    """A page of the catalog being made: entries by directory, in order, those still to be read being None.

    `kept` is the parent's page when nothing in it changed: then it is used as it is.
    """

    number: int
    level: int
    sections: list[tuple[bytes, list[Entry | None]]] = msgspec.field(default_factory=list)
    reads: list[Read] = msgspec.field(default_factory=list)
    missing: int = 0
    count: int = 0
    weight: int = 0
    kept: PageRef | None = None
    files: int = 0
    directories: int = 0
    # All entries, and the directories among them.
    new: int = 0
    changed: int = 0
    new_directories: int = 0
    changed_directories: int = 0
    # Files that had to be read.
    to_read: int = 0
    # What happened to an entry, by the identity of its name; only if someone wants to be told.
    status: dict[int, str] = msgspec.field(default_factory=dict)
    # The parent's page of which all entries up to now are, unchanged, and how many; None if there is no such page.
    source: LoadedPage | None = None
    following: int = 0

    def seal(self) -> None:
        """Nothing more comes: decide whether this is the parent's page unchanged."""
        self.to_read = len(self.reads)
        source = self.source
        if source is not None and self.following == self.count == source.entries:
            self.kept = source.ref
        self.source = None


class Held(Protocol):
    """Memory that is reused when nobody holds it any more: a slab."""

    def hold(self) -> None:
        """One more needs it."""

    def release(self) -> None:
        """One less needs it."""


class Run(msgspec.Struct):
    """Chunks that lie one behind the other in `view`: file contents in a slab, or catalog chunks (`meta`).

    `claimed`: it is known already that all of them are to be stored.
    """

    view: memoryview | bytes
    refs: bytes
    slab: Held | None = None
    meta: bool = False
    claimed: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes held in memory of its own; those in a slab are counted there."""
        return 0 if self.slab else len(self.view)


class RawBlock(msgspec.Struct):
    """A block before sealing: parts to be joined, their chunks' refs, and the slabs they lie in.

    `packed`: the block as it is to be sealed, coded by `codec`, if it was stored before, whole, here or elsewhere.
    """

    meta: bool
    parts: list[memoryview | bytes] = msgspec.field(default_factory=list)
    refs: list[bytes] = msgspec.field(default_factory=list)
    raw_bytes: int = 0
    slabs: list[Held] = msgspec.field(default_factory=list)
    packed: memoryview | bytes | None = None
    codec: int = RAW

    def release(self) -> None:
        """The parts are no longer needed."""
        self.parts.clear()
        self.packed = None
        for slab in self.slabs:
            slab.release()
        self.slabs.clear()


class MetaChunks:
    """Chunks of the engine's own making (pages, lists, large attributes), on their way to dedup.

    `store` may be called in any thread; what it queues is taken by `runs`, in one.
    """

    def __init__(self, id_key: bytes) -> None:
        self._id_key = id_key
        # Appending and taking are each atomic: a thread may add while another takes.
        self._queue: deque[Run] = deque()

    def store(self, payload: bytes) -> bytes:
        """Queue a payload, in pieces of at most a block; return their packed refs."""
        refs = []
        for at in range(0, len(payload), BLOCK_BYTES):
            piece = payload[at : at + BLOCK_BYTES]
            ref = pack_ref(blake3(piece, key=self._id_key).digest(), len(piece))
            refs.append(ref)
            self._queue.append(Run(piece, ref, meta=True))
        return b"".join(refs)

    def runs(self) -> list[Run]:
        """Take what is queued."""
        return [self._queue.popleft() for _ in range(len(self._queue))]
