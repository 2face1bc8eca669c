"""Needs: which rows of the index mirror the snapshots need, as one bit a row; pure.

A chunk that is needed has one place where it is kept: in a pack that is there with the size it should have, located by
an index object of an attempt that has committed. Of several such places the one in the pack with the least id is it, so
that of two packs with the same content one has all and the other nothing. What only *doomed* packs hold, those of the
open mark, is to be copied out of them. Runs are immutable, and a view of them is never changed: so numbers of rows hold
as long as this lives. Memory: up to three bits a row and one for each level of catalogs, and some 200 bytes a pack.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from blake3 import blake3

from coffret.engine.mirror_view import SURE, Location
from coffret.engine.records import REF_BYTES, iter_refs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from coffret.engine.mirror_run import Run
    from coffret.engine.mirror_view import View

_SET = re.compile(rb"[^\0]")
# What a place is worth: nothing; a pack that was found to be bad, marked or not; to be copied out of; to be kept.
_NOTHING, _BAD_AND_DOOMED, _BAD, _DOOMED, _GOOD = range(5)
_NO_PACK = b""
# What a chunk takes in the footer of its pack.
_OVERHEAD_BYTES = 36
#: A row: of which run, and its number there.
_Place = tuple[int, int]


class Needs:
    """The chunks that are needed, by where they lie. For one thread at a time.

    `packs`: the packs there are, with their sizes; `bad`: those that were found to be damaged, which hold a chunk only
    where nothing else does. After everything was taken: `live` has the stored bytes needed of each pack that holds
    something, `catalogs` are those that hold something of catalogs, and `copies` has the number of chunks to be copied
    out of each doomed one.
    """

    def __init__(
        self, view: View, packs: Mapping[bytes, int], *, doomed: Collection[bytes] = (), bad: Collection[bytes] = ()
    ) -> None:
        self._view, self._packs, self._doomed, self._bad = view, packs, frozenset(doomed), frozenset(bad)
        self._taken, self._copied, self._meta = self._bits(), self._bits(), self._bits()
        self._entered: dict[int, list[bytearray]] = {}
        self._entered_long: set[bytes] = set()
        # What is known of the sections of each run: worth, and pack.
        self._sections: list[dict[int, tuple[int, bytes]]] = [{} for _ in view.runs]
        self.live: dict[bytes, int] = {}
        self.copies: dict[bytes, int] = {}
        self.catalogs: set[bytes] = set()

    def take(self, refs: bytes, *, meta: bool = False) -> bytes:
        """Note that chunks are needed, given by packed refs (`meta`: of a catalog); return those that are nowhere."""
        nowhere = []
        for number, (chunk_id, length) in enumerate(iter_refs(refs)):
            found = self._best(chunk_id, length)
            if found is None:
                nowhere.append(refs[number * REF_BYTES : (number + 1) * REF_BYTES])
                continue
            place, worth, pack, share = found
            if meta:
                _set(self._meta, place)
                self.catalogs.add(pack)
            if _set(self._taken, place):
                self.live[pack] = self.live.get(pack, 0) + share
                if worth in (_DOOMED, _BAD_AND_DOOMED) and _set(self._copied, place):
                    self.copies[pack] = self.copies.get(pack, 0) + 1
        return b"".join(nowhere)

    def enter(self, refs: bytes, level: int) -> bool:
        """Whether a part of a catalog (by its refs and its level) was not entered before; from now on it was."""
        if len(refs) > REF_BYTES:  # large ones are rare
            digest = blake3(refs + level.to_bytes(4, "little", signed=True)).digest(16)
            known = digest in self._entered_long
            self._entered_long.add(digest)
            return not known
        [(chunk_id, length)] = iter_refs(refs)
        found = self._best(chunk_id, length)
        if found is None:
            return True
        if level not in self._entered:
            self._entered[level] = self._bits()
        return _set(self._entered[level], found[0])

    def to_copy(self, packs: Collection[bytes]) -> Iterator[tuple[bytes, Location, bool]]:
        """Iterate over what to copy out of some doomed packs: (chunk id, where it lies, whether of a catalog)."""
        for at, run in enumerate(self._view.runs):
            for found in _SET.finditer(self._copied[at]):
                byte = found[0][0]
                for bit in range(8):
                    if byte >> bit & 1:
                        number = found.start() * 8 + bit
                        chunk_id, section, offset, stored, raw, inner, length, codec = run.row(number)
                        pack, header, size_bytes = run.pack(section)
                        if pack in packs:
                            location = Location(pack, size_bytes, header, offset, stored, raw, codec, inner, length)
                            yield chunk_id, location, _is_set(self._meta, (at, number))

    def _bits(self) -> list[bytearray]:
        return [bytearray(run.info.rows // 8 + 1) for run in self._view.runs]

    def _best(self, chunk_id: bytes, length: int) -> tuple[_Place, int, bytes, int] | None:
        """The best place of a chunk: row, worth, pack, and its share of the block's stored bytes."""
        best: tuple[_Place, int, bytes, int] | None = None
        for at, run in enumerate(self._view.runs):
            for number, (_, section, _, stored, raw, _, row_length, _) in run.numbered(chunk_id):
                worth, pack = self._sections[at].get(section) or self._section(at, run, section)
                if not worth or row_length != length:
                    continue
                if best is None or worth > best[1] or (worth == best[1] and pack < best[2]):
                    best = (at, number), worth, pack, stored * length // max(raw, 1) + _OVERHEAD_BYTES
        return best

    def _section(self, at: int, run: Run, section: int) -> tuple[int, bytes]:
        span = run.span(section)
        found = (_NOTHING, _NO_PACK)
        if span is not None and self._view.state(span) == SURE:
            pack, _, size_bytes = run.pack(section)
            if self._packs.get(pack) == size_bytes:
                if pack in self._bad:
                    found = (_BAD_AND_DOOMED if pack in self._doomed else _BAD, pack)
                else:
                    found = (_DOOMED if pack in self._doomed else _GOOD, pack)
        self._sections[at][section] = found
        return found


def _set(bits: list[bytearray], place: _Place) -> bool:
    """Set a bit; whether it was not set before."""
    run, number = place
    mask = 1 << (number & 7)
    before = bits[run][number >> 3]
    bits[run][number >> 3] = before | mask
    return not before & mask


def _is_set(bits: list[bytearray], place: _Place) -> bool:
    run, number = place
    return bool(bits[run][number >> 3] & 1 << (number & 7))
