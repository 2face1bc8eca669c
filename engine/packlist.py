"""The packs that there are, as listed, in 48 bytes each: hundreds of thousands are no reason for much memory."""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import TYPE_CHECKING

from coffret.engine.records import ID_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coffret.connectors.base import Connector

_RECORD = struct.Struct(f"={ID_BYTES}sQd")  # id, size in bytes, modification time
# Packs whose ids begin with the same so many bits lie in a part of their own.
_BITS = 12
_PARTS = 1 << _BITS


class PackList:
    """Packs by number, in the order of their ids."""

    def __init__(self, parts: Sequence[bytes] = (b"",) * _PARTS) -> None:
        """`parts`: sorted records; see `listed`."""
        self._records = b"".join(parts)
        self._starts = list(accumulate(map(len, parts), initial=0))

    @classmethod
    async def listed(cls, connector: Connector) -> PackList:
        """List packs/, a request for each 1,000. What has not the name of a pack is left out."""
        parts = [bytearray() for _ in range(_PARTS)]
        async for info in connector.list("packs/"):
            digits = info.name.rpartition("/")[2]
            if len(digits) == 2 * ID_BYTES and info.name == f"packs/{digits[:2]}/{digits}":
                pack = bytes.fromhex(digits)
                parts[_part(pack)] += _RECORD.pack(pack, info.size_bytes, info.mtime_s)
        return cls([_sorted(part) for part in parts])

    def __len__(self) -> int:
        return len(self._records) // _RECORD.size

    def __iter__(self) -> Iterator[tuple[bytes, int, float]]:
        """Iterate over (id, size in bytes, modification time), by number."""
        return _RECORD.iter_unpack(self._records)

    def __getitem__(self, number: int) -> tuple[bytes, int, float]:
        pack, size_bytes, mtime_s = _RECORD.unpack_from(self._records, number * _RECORD.size)
        return pack, size_bytes, mtime_s

    def number(self, pack: bytes) -> int:
        """The number of a pack; -1 if it is not there. Below 1 µs."""
        part = _part(pack)
        at, end = self._starts[part], self._starts[part + 1]
        while (at := self._records.find(pack, at, end)) >= 0 and at % _RECORD.size:
            at += 1  # what looks like it lies across two records
        return -1 if at < 0 else at // _RECORD.size


def _part(pack: bytes) -> int:
    return int.from_bytes(pack[:2], "big") >> 16 - _BITS


def _sorted(part: bytearray) -> bytes:
    step = _RECORD.size
    return b"".join(sorted(bytes(part[at : at + step]) for at in range(0, len(part), step)))
