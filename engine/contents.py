"""What lies in a repository, by the names of its objects: for who copies objects as they are, without any key."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from coffret.engine.flow import together
from coffret.engine.packfile import pack_name
from coffret.engine.records import ATTEMPT_BYTES, ID_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coffret.connectors.base import Connector

_ATTEMPT = f"[0-9a-f]{{{2 * ATTEMPT_BYTES}}}"
_NUMBER = "(?:0|[1-9][0-9]{0,17})"
# The objects of each folder, as docs/format.md names them; leases are of no use to a copy, and keys are another matter.
_NAMES = {
    "packs/": re.compile(r"packs/([0-9a-f]{2})/(\1[0-9a-f]{62})"),
    "index/": re.compile(f"index/{_ATTEMPT}-{_NUMBER}"),
    "snapshots/": re.compile(f"snapshots/{_ATTEMPT}"),
    "removed/": re.compile(f"removed/{_ATTEMPT}-{_ATTEMPT}"),
    "trash/": re.compile("trash/[1-9][0-9]{0,17}(?:-seen|-done)?"),
}
_SIZE_BYTES = 4
_ROW_BYTES = ID_BYTES + _SIZE_BYTES
# No pack is as large; an object under a pack's name may be.
_MAX_SIZE = (1 << 8 * _SIZE_BYTES) - 1


class Packs:
    """Ids and sizes of packs, in 36 bytes each: a million packs are 32 TB."""

    def __init__(self) -> None:
        # By the first byte of the id, so that two of these are compared a part at a time.
        self._rows = [bytearray() for _ in range(256)]

    def add(self, pack: bytes, size_bytes: int) -> None:
        """Take one more; each comes once."""
        self._rows[pack[0]] += pack + min(size_bytes, _MAX_SIZE).to_bytes(_SIZE_BYTES, "little")

    def __len__(self) -> int:
        return sum(map(len, self._rows)) // _ROW_BYTES

    def without(self, other: Packs, *, sizes: bool = True) -> Iterator[tuple[str, int]]:
        """The (name, size in bytes) of those that `other` has not, or, if `sizes` count, has with another size."""
        length = _ROW_BYTES if sizes else ID_BYTES
        for mine, theirs in zip(self._rows, other._rows, strict=True):
            known = {bytes(theirs[at : at + length]) for at in range(0, len(theirs), _ROW_BYTES)}
            for at in range(0, len(mine), _ROW_BYTES):
                row = bytes(mine[at : at + _ROW_BYTES])
                if row[:length] not in known:
                    yield pack_name(row[:ID_BYTES]), int.from_bytes(row[ID_BYTES:], "little")


class Contents(msgspec.Struct):
    """All objects but config, keys and leases: sizes in bytes by name. `strange`: how many have no name of its kind."""

    snapshots: dict[str, int] = msgspec.field(default_factory=dict)
    removed: dict[str, int] = msgspec.field(default_factory=dict)
    trash: dict[str, int] = msgspec.field(default_factory=dict)
    index: dict[str, int] = msgspec.field(default_factory=dict)
    packs: Packs = msgspec.field(default_factory=Packs)
    strange: int = 0

    @property
    def small(self) -> dict[str, int]:
        """All that are no packs."""
        return {**self.snapshots, **self.removed, **self.trash, **self.index}

    def __len__(self) -> int:
        return len(self.packs) + len(self.snapshots) + len(self.removed) + len(self.trash) + len(self.index)

    def missing_in(self, other: Contents) -> int:
        """How many of these the other has not."""
        small = len(self.small.keys() - other.small.keys())
        return small + sum(1 for _ in self.packs.without(other.packs, sizes=False))


async def list_contents(connector: Connector) -> Contents:
    """List a repository, in an order in which of each snapshot that is listed everything else is listed too.

    That holds but for what maintenance takes away meanwhile, having put the same in another place.
    """
    found = Contents()
    kinds = (("snapshots/", found.snapshots), ("removed/", found.removed), ("trash/", found.trash))
    await together(*(partial(_list, connector, prefix, sizes, found) for prefix, sizes in kinds))
    await _list(connector, "index/", found.index, found)
    async for info in connector.list("packs/"):
        if match := _NAMES["packs/"].fullmatch(info.name):
            found.packs.add(bytes.fromhex(match[2]), info.size_bytes)
        else:
            found.strange += 1
    return found


async def list_snapshots(connector: Connector) -> dict[str, int]:
    """What lies in `snapshots/` now: sizes in bytes by name."""
    found = Contents()
    await _list(connector, "snapshots/", found.snapshots, found)
    return found.snapshots


async def _list(connector: Connector, prefix: str, sizes: dict[str, int], found: Contents) -> None:
    async for info in connector.list(prefix):
        if _NAMES[prefix].fullmatch(info.name):
            sizes[info.name] = info.size_bytes
        else:
            found.strange += 1


def open_marks(contents: Contents) -> list[str]:
    """The marks that are not done."""
    return [name for name in contents.trash if "-" not in name and f"{name}-done" not in contents.trash]
