"""Restore and check: they take no lease, and must never call damage what maintenance has only moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.model.layout import Pack, attempt_of, pack_name
from tests.model.rules import Rule
from tests.model.view import View, list_ends, list_index, list_removed, look_closely

if TYPE_CHECKING:
    from tests.model.party import Party


async def restore(party: Party) -> None:
    """Read each chunk of a snapshot; report what is damaged."""
    view = View(ends=await list_ends(party), removed=await list_removed(party))
    if not (snapshots := view.snapshots()):
        return
    attempt = party.random.choice(sorted(snapshots))
    view.index = await list_index(party)
    for chunk in sorted(snapshots[attempt].chunks):
        if (found := await find_chunk(party, attempt, chunk, view)) is None:
            return
        view = found


async def find_chunk(party: Party, attempt: str, chunk: str, view: View) -> View | None:
    """Read one chunk; return the view by which it was found, None if it is damaged or its snapshot was removed."""
    missed: set[str] = set()  # packs found missing before the listing that `view` is began
    relistings = 0
    while True:
        places = view.committed().get(chunk, set())
        for pack in sorted(places - missed):
            if (body := await party.fetch(pack_name(pack), Pack)) and chunk in body.chunks:
                return view
        if relistings and party.keeps(Rule.REMOVED_IS_NOT_DAMAGE) and attempt not in view.snapshots():
            return None
        proven = places <= missed and (view.whole or not party.keeps(Rule.WHOLE_LISTING))
        if (relistings and (proven or not party.keeps(Rule.RELIST_ON))) or not party.keeps(Rule.RELIST):
            party.journal.damage.append(f"restore: chunk {chunk} of {attempt} is nowhere")
            return None
        missed |= places
        view, relistings = await look_closely(party), relistings + 1


async def check(party: Party) -> None:
    """Look for each pack that the index names; report those that are missing."""
    view = await look_closely(party)
    for pack in sorted({pack for _, pack, _, end in view.tables() if end and end.committed}):
        if await party.exists(pack_name(pack)):
            continue
        if party.keeps(Rule.RELIST):
            view = await look_closely(party)
        naming = [name for name, index in view.index.items() if pack in index.packs]
        ends = [view.ends.get(attempt_of(name)) for name in naming]
        if any(end and end.committed for end in ends):
            party.journal.damage.append(f"check: pack {pack} is named and missing")
