"""Which packs a check reads whole when it is to read only a part of them: by their ids, or at random."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import msgspec

from coffret.engine.errors import UsageError
from coffret.engine.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

_PART = re.compile(r"(\d+)/(\d+)", re.ASCII)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%", re.ASCII)
# Far more parts than anybody has nights.
_MAX_PARTS = 1 << 16
# So many hexadecimal digits of a pack's id decide which part it is in.
_DIGITS = 16
_FORMS = "give a part such as 1/7, a percentage such as 10%, or a size such as 500M"


class Subset(msgspec.Struct, frozen=True):
    """A part of all packs. One of `part` (the n-th of m, from 1), `percent` and `size_bytes` says which."""

    part: tuple[int, int] | None = None
    percent: float | None = None
    size_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Subset:
        """`N/M`, `P%`, or a size.

        :raises UsageError: if it is none of them, or nothing of anything
        """
        text = text.strip()
        if found := _PART.fullmatch(text):
            number, parts = int(found[1]), int(found[2])
            if not 1 <= number <= parts <= _MAX_PARTS:
                raise UsageError(f"there is no part {text}", remedy=f"give N/M with 1 ≤ N ≤ M ≤ {_MAX_PARTS}")
            return cls(part=(number, parts))
        if found := _PERCENT.fullmatch(text):
            percent = float(found[1])
            if not 0 < percent <= 100:
                raise UsageError(f"{text} is no part of the packs", remedy="give more than 0% and at most 100%")
            return cls(percent=percent)
        try:
            size_bytes = parse_size(text)
        except UsageError:
            raise UsageError(f"not a part of the packs: {text!r}", remedy=_FORMS) from None
        if not size_bytes:
            raise UsageError(f"{text} is no part of the packs", remedy=_FORMS)
        return cls(size_bytes=size_bytes)

    def choose(self, sizes: Mapping[str, int], chance: random.Random | None = None) -> frozenset[str]:
        """The packs of this part, out of all there are, given by name with their sizes in bytes.

        The parts N/M of one repository do not overlap, and are all of it together: a pack is always in the same one,
        whatever comes or goes beside it. Other parts are drawn anew each time, at least one pack: by number, or as
        many as their size allows.
        """
        if self.part is not None:
            number, parts = self.part
            return frozenset(name for name in sizes if _number(name) % parts == number - 1)
        drawn = sorted(sizes)
        (chance or random.SystemRandom()).shuffle(drawn)
        if self.percent is not None:
            return frozenset(drawn[: max(1, int(len(drawn) * self.percent / 100))])
        assert self.size_bytes is not None
        chosen: set[str] = set()
        left = self.size_bytes
        for name in drawn:
            if chosen and sizes[name] > left:
                break
            chosen.add(name)
            left -= sizes[name]
        return frozenset(chosen)


def _number(name: str) -> int:
    """What decides of a pack: its id, which is as good as random. What is not named by an id is in the first part."""
    try:
        return int(name.rpartition("/")[2][:_DIGITS], 16)
    except ValueError:
        return 0
