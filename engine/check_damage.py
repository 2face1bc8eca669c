"""What a check has found to be damaged so far, and what it says of that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coffret.engine.packfile import pack_name

if TYPE_CHECKING:
    from coffret.engine.mirror import Location
    from coffret.engine.progress import Progress

# Stands for the offset of a block where all of a pack is meant.
WHOLE = -1


class CheckSummary(msgspec.Struct):
    """What a check found. `damaged_files` counts (snapshot, path) pairs; each was reported as a fault.

    `packs_read`: those of the packs that were read whole. `missing_snapshots`: ids of those that were seen there and
    not removed, or were removed and are back.
    """

    packs: int = 0
    packs_read: int = 0
    snapshots: int = 0
    files: int = 0
    size_bytes: int = 0
    damaged_packs: list[str] = msgspec.field(default_factory=list)
    damaged_objects: list[str] = msgspec.field(default_factory=list)
    damaged_snapshots: list[str] = msgspec.field(default_factory=list)
    damaged_files: int = 0
    missing_snapshots: list[str] = msgspec.field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        damaged = self.damaged_packs or self.damaged_objects or self.damaged_snapshots or self.damaged_files
        return not (damaged or self.missing_snapshots)


class Damage:
    """Collects damage, reporting each once. Of packs, the blocks: few, or the repository is lost anyway."""

    def __init__(self, progress: Progress) -> None:
        self.summary, self._progress = CheckSummary(), progress
        self._blocks: dict[tuple[bytes, int], str] = {}
        #: Index objects that can't be gone by.
        self.index: set[str] = set()

    @property
    def packs(self) -> frozenset[bytes]:
        """Packs that are damaged in some place."""
        return frozenset(pack for pack, _ in self._blocks)

    def object(self, name: str, reason: str) -> None:
        """An object that is no pack."""
        if name not in self.summary.damaged_objects:
            self.summary.damaged_objects.append(name)
        self._progress.fault(name.encode(), reason.removeprefix(f"{name}: "))

    def index_object(self, name: str, reason: str) -> None:
        """An index object: what it says is not to be relied on."""
        self.index.add(name)
        self.object(name, reason)

    def pack(self, pack: bytes, faults: list[tuple[int, str]]) -> None:
        """Blocks of a pack, by offset, or WHOLE, and what is wrong with each."""
        if not faults:
            return
        name = pack_name(pack)
        self.summary.damaged_packs.append(name)
        for offset, reason in faults:
            reason = reason.removeprefix(f"{name} ")
            self._blocks[pack, offset] = reason
            where = name if offset == WHOLE else f"{name} at {offset}"
            self._progress.fault(where.encode(), reason)

    def of(self, location: Location) -> str:
        """Why what lies there can't be had, or ""."""
        if not self._blocks:
            return ""
        if reason := self._blocks.get((location.pack, WHOLE)):
            return f"a chunk lies in {pack_name(location.pack)}, which {reason}"
        if (location.pack, location.offset) in self._blocks:
            return f"a chunk lies in a damaged block of {pack_name(location.pack)}"
        return ""
