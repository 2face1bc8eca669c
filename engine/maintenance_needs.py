"""Needs: which rows of the index mirror the snapshots need, as one bit a row; pure.

A chunk that is needed has one place where it is kept: in a pack that is there with the size it should have, located by
an index object of an attempt that has committed. Of several such places the one in the pack with the least id is it, so
that of two packs with the same content one has all and the other nothing. What only *doomed* packs hold, those of the
open mark, is to be copied out of them. Runs are immutable, and a view of them is never changed: so numbers of rows hold
as long as this lives. Memory: up to three bits a row and one for each level of catalogs, and some 30 bytes a pack.
"""

from __future__ import annotations

import re
from array import array
from typing import TYPE_CHECKING

from blake3 import blake3

from coffret.engine.mirror_view import SURE, Location
from coffret.engine.records import REF_BYTES, iter_refs, pack_ref

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from coffret.engine.mirror_run import Run
    from coffret.engine.mirror_view import View
    from coffret.engine.packlist import PackList

_SET = re.compile(rb"[^\0]")
# What a place is worth: a pack that was found to be bad, marked or not; to be copied out of; to be kept.
_BAD_AND_DOOMED, _BAD, _DOOMED, _GOOD = range(4)
# In the place of the number of a section's pack: not looked up yet; none that holds anything.
_UNKNOWN, _NOTHING = -2, -1
# What a chunk takes in the footer of its pack.
_OVERHEAD_BYTES = 36
#: A row: of which run, and its number there.
_Place = tuple[int, int]


class Needs:
    """The chunks that are needed, by where they lie. For one thread at a time.

    `packs`: the packs there are; `bad`: those that were found to be damaged, which hold a chunk only where nothing else
    does. After everything was taken, by the number of the pack: `live` has the stored bytes that are needed, `catalogs`
    whether any of them are of catalogs, and `copies` the number of chunks to be copied out, if it is doomed.
    """

    def __init__(
        self, view: View, packs: PackList, *, doomed: Collection[bytes] = (), bad: Collection[bytes] = ()
    ) -> None:
        self._view, self._packs = view, packs
        self._worth = bytearray([_GOOD]) * len(packs)
        for pack in {*doomed, *bad}:
            if (number := packs.number(pack)) >= 0:
                self._worth[number] = (pack in doomed and _DOOMED) or _BAD
                if pack in doomed and pack in bad:
                    self._worth[number] = _BAD_AND_DOOMED
        self._taken, self._copied, self._meta = self._bits(), self._bits(), self._bits()
        self._entered: dict[int, list[bytearray]] = {}
        self._entered_long: set[bytes] = set()
        # Of each run: the number of each section's pack.
        self._numbers = [array("i", [_UNKNOWN]) * run.sections for run in view.runs]
        self.live = array("Q", bytes(8 * len(packs)))
        self.catalogs = bytearray(len(packs))
        self.copies = array("I", bytes(4 * len(packs)))

    def take(self, refs: bytes, *, meta: bool = False) -> bytes:
        """Note that chunks are needed, given by packed refs (`meta`: of a catalog); return those that are nowhere."""
        nowhere = []
        for chunk_id, length in iter_refs(refs):
            found = self._best(chunk_id, length)
            if found is None:
                nowhere.append(pack_ref(chunk_id, length))
                continue
            place, pack, share = found
            if meta:
                _set(self._meta, place)
                self.catalogs[pack] = True
            if _set(self._taken, place):
                self.live[pack] += share
                if self._worth[pack] in (_DOOMED, _BAD_AND_DOOMED) and _set(self._copied, place):
                    self.copies[pack] += 1
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

    def to_copy(self, at_once: int) -> Iterator[list[tuple[bytes, Location, bool]]]:
        """Iterate over what to copy out of doomed packs, as (chunk id, where it lies, whether of a catalog).

        Some `at_once` chunks at a time, those of one pack together; all others take 8 bytes meanwhile.
        """
        turns: dict[int, int] = {}
        count = 0
        for pack, copies in enumerate(self.copies):
            if copies:
                turns[pack] = count // at_once
                count += copies
        places = [array("Q") for _ in range(count // at_once + 1)]
        for at, run in enumerate(self._view.runs):
            for number in _numbers(self._copied[at]):
                pack = self._number(at, run, run.row(number)[1])
                places[turns[pack]].append(at << 40 | number)
        for turn in places:
            yield [self._copy(place >> 40, place & (1 << 40) - 1) for place in turn]

    def _copy(self, at: int, number: int) -> tuple[bytes, Location, bool]:
        run = self._view.runs[at]
        chunk_id, section, offset, stored, raw, inner, length, codec = run.row(number)
        pack, header, size_bytes = run.pack(section)
        location = Location(pack, size_bytes, header, offset, stored, raw, codec, inner, length)
        return chunk_id, location, _is_set(self._meta, (at, number))

    def _bits(self) -> list[bytearray]:
        return [bytearray(run.info.rows // 8 + 1) for run in self._view.runs]

    def _best(self, chunk_id: bytes, length: int) -> tuple[_Place, int, int] | None:
        """The best place of a chunk: row, number of the pack, and its share of the block's stored bytes."""
        best: tuple[_Place, int, int] | None = None
        worth = self._worth
        for at, run in enumerate(self._view.runs):
            for row, (_, section, _, stored, raw, _, row_length, _) in run.numbered(chunk_id):
                pack = self._number(at, run, section)
                if pack == _NOTHING or row_length != length:
                    continue
                if best is None or (worth[pack], -pack) > (worth[best[1]], -best[1]):
                    best = (at, row), pack, stored * length // max(raw, 1) + _OVERHEAD_BYTES
        return best

    def _number(self, at: int, run: Run, section: int) -> int:
        """The number of a section's pack; _NOTHING if what it says does not count, or the pack is not there."""
        position = run.position(section)
        if position < 0:
            return _NOTHING
        number = self._numbers[at][position]
        if number == _UNKNOWN:
            number, span = _NOTHING, run.span(section)
            if span is not None and self._view.state(span) == SURE:
                pack, _, size_bytes = run.pack(section)
                found = self._packs.number(pack)
                if found >= 0 and self._packs[found][1] == size_bytes:
                    number = found
            self._numbers[at][position] = number
        return number


def _numbers(bits: bytearray) -> Iterator[int]:
    """The numbers of the bits that are set."""
    for found in _SET.finditer(bits):
        for bit in range(8):
            if found[0][0] >> bit & 1:
                yield found.start() * 8 + bit


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
