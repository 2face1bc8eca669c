"""Whether a copy is still a copy: names that both sides may have given to different objects, each by itself.

Nothing is ever replaced in a copy: an original that was damaged, or whose storage lies, must not take it along.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from coffret.connectors.errors import InvalidRange, NotFound
from coffret.engine import sealing
from coffret.engine.copier import used_by_itself
from coffret.engine.flow import together
from coffret.engine.sealing import HEADER_BYTES, kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.connectors.base import Connector
    from coffret.engine.contents import Contents
    from coffret.engine.copier import Copier

# Headers are fetched this many at a time.
_AT_ONCE = 16


async def check_snapshots(
    source: Connector, target: Connector, listed: Contents, there: Contents, *, same_size: bool
) -> None:
    """See that what both have under `snapshots/` and `trash/` is the same. `same_size`: what has one size may differ.

    Where the original has the end of an attempt, and the copy the snapshot that it committed, maintenance swept what
    the snapshot needed; it was removed before, which the copy is told too. The copy keeps it.

    :raises UsageError: if it is not: the copy has been used by itself
    """
    names = [
        name
        for mine, theirs in ((listed.snapshots, there.snapshots), (listed.trash, there.trash))
        for name in mine.keys() & theirs.keys()
        if same_size or mine[name] != theirs[name]
    ]
    for at in range(0, len(names), _AT_ONCE):
        some = names[at : at + _AT_ONCE]
        heads = await together(*(partial(_head, side, name) for name in some for side in (source, target)))
        for name, mine, theirs in zip(some, heads[::2], heads[1::2], strict=True):
            if mine != theirs and kind_of(mine) in (sealing.SNAPSHOT, sealing.MARK):
                raise used_by_itself(target, name)


async def kinds_of(connector: Connector, names: Sequence[str]) -> dict[str, bytes]:
    """The kinds of objects, by their headers; b"" of what has none, or is gone."""
    kinds: dict[str, bytes] = {}
    for at in range(0, len(names), _AT_ONCE):
        some = names[at : at + _AT_ONCE]
        heads = await together(*(partial(_head, connector, name) for name in some))
        kinds.update(zip(some, map(kind_of, heads), strict=True))
    return kinds


def check_sizes(listed: Contents, there: Contents, copier: Copier) -> None:
    """Report objects that nobody but their writer has put, and that are not of one size on both sides."""
    for mine, theirs in ((listed.index, there.index), (listed.removed, there.removed)):
        for name in mine.keys() & theirs.keys():
            if mine[name] != theirs[name]:
                copier.report(name, f"has {mine[name]} bytes, and {theirs[name]} in the copy: one is damaged")


async def _head(connector: Connector, name: str) -> bytes:
    """An object's header, in which each has a salt of its own; of what is no such object, nothing."""
    try:
        return await connector.get(name, length=HEADER_BYTES)
    except (NotFound, InvalidRange):
        return b""
