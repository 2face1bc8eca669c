"""Choose: which packs to sweep, by what is needed of each; pure.

1. Packs of which nothing is needed, and such as are damaged where nothing is.
2. Those with the largest share of garbage, as long as more than MAX_UNUSED of all that is needed lies unused: what is
   needed of them is copied. So the space that removed snapshots took comes back, all but 3 %, and no pack is copied for
   a garbage that does not matter. (restic allows 5 % unless told otherwise.)
3. Small packs, the smallest first, where they make one that is _GROWTH times as large as the largest of them; those of
   catalogs apart, since they stay apart. So each time that a byte is copied the pack it lies in grows by that factor,
   until it is not small any more: at most 1 + log4(small / its first pack) times, however many backups there are. Of
   each kind some 16 + 8 log10 of the same ratio may stay: where no first n of the sorted sizes are together four times
   the n-th, each is by a third larger than the one before. (Size-tiered merging, as of log-structured merge trees:
   O'Neil et al., 1996.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coffret.engine.maintenance_marks import MAX_PACKS

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_UNUSED = 0.03
# Needed bytes of the packs of one mark: copied before anything is deleted, and once more if that is cut off.
MAX_COPY_BYTES = 8 << 30
_SMALL_SHARE, _SMALL_PACKS, _GROWTH = 4, 16, 4
# Header, trailer and the least footer of a pack (bytes): no garbage.
_FIXED_BYTES = 256


class PackUse(msgspec.Struct, frozen=True):
    """A pack: its size, how much of that is needed, whether it may be chosen, and whether it holds catalogs.

    `hurt`: it is damaged where nothing is needed.
    """

    pack: bytes
    size_bytes: int
    live_bytes: int
    free: bool
    meta: bool = False
    hurt: bool = False

    @property
    def unused_bytes(self) -> int:
        """What of it is garbage, as far as something is needed: its own overhead is none."""
        return max(0, self.size_bytes - self.live_bytes - _FIXED_BYTES) if self.live_bytes else self.size_bytes


class Choice(msgspec.Struct, frozen=True):
    """Packs to be swept, how many bytes they have together, and how many of these are needed."""

    packs: tuple[bytes, ...] = ()
    size_bytes: int = 0
    live_bytes: int = 0


def choose(packs: Iterable[PackUse], pack_bytes: int, *, max_packs: int = MAX_PACKS) -> Choice:
    """Choose packs for one mark; `pack_bytes`: size of a full one."""
    chosen: list[PackUse] = []
    # Of the others only those are held that may be chosen. Packs that may not do not count: no other makes up for them.
    worst: list[PackUse] = []
    small: list[PackUse] = []
    hurt: list[PackUse] = []
    unused_bytes = live_bytes = copied = 0
    for use in packs:
        live_bytes += use.live_bytes
        if not use.free:
            continue
        if not use.live_bytes:
            chosen += [use] if len(chosen) < max_packs else []
            continue
        if use.hurt:
            hurt.append(use)
            continue
        unused_bytes += use.unused_bytes
        if use.unused_bytes > MAX_UNUSED * use.live_bytes:
            worst.append(use)
        if use.size_bytes < pack_bytes // _SMALL_SHARE:
            small.append(use)

    def take(use: PackUse) -> bool:
        nonlocal copied
        if len(chosen) >= max_packs or (copied and copied + use.live_bytes > MAX_COPY_BYTES):
            return False
        chosen.append(use)
        copied += use.live_bytes
        return True

    for use in hurt:
        take(use)
    taken = set()
    for use in sorted(worst, key=lambda use: (-use.unused_bytes / use.size_bytes, use.pack)):
        if unused_bytes <= MAX_UNUSED * live_bytes or not take(use):
            break
        unused_bytes -= use.unused_bytes
        taken.add(use.pack)
    for meta in (False, True):
        for use in _joined([use for use in small if use.meta == meta and use.pack not in taken], pack_bytes):
            if not take(use):
                break
    return Choice(
        tuple(sorted(use.pack for use in chosen)),
        sum(use.size_bytes for use in chosen),
        sum(use.live_bytes for use in chosen),
    )


def _joined(small: list[PackUse], pack_bytes: int) -> list[PackUse]:
    """Those of small packs that are to be joined: the most that are _GROWTH times as large as the largest of them."""
    uses = sorted(small, key=lambda use: (use.live_bytes, use.pack))
    count = total = joined = 0
    for number, use in enumerate(uses, 1):
        total += use.live_bytes
        if number >= _SMALL_PACKS and total >= _GROWTH * use.live_bytes:
            count, joined = number, total
    # What goes beyond full packs, if it is little, would be copied and lie in a small one again.
    full_bytes = joined - joined % pack_bytes
    if joined - full_bytes < pack_bytes // _SMALL_SHARE:
        while joined > full_bytes > 0:
            count -= 1
            joined -= uses[count].live_bytes
    return uses[:count]
