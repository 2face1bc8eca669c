"""Maintenance: marking packs, sweeping them, merging index objects. Of the model only, so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.model.layout import (
    INDEX,
    LEASES,
    PACKS,
    SNAPSHOTS,
    TRASH,
    End,
    Index,
    Kind,
    Mark,
    Note,
    Pack,
    Seen,
    attempt_of,
    pack_name,
)
from tests.model.rules import Rule
from tests.model.view import Marks, View, list_marks, look, look_closely

if TYPE_CHECKING:
    from tests.model.party import Party


async def maintain(party: Party) -> None:
    """Mark when nothing is marked, else try to sweep; again and again."""
    for _ in range(party.random.randint(2, 6)):
        if not await sweep(party) or not party.keeps(Rule.SINGLE_MARK):
            await mark(party)


async def mark(party: Party) -> None:
    """Choose packs that are not needed, or not only here, and put a mark on them."""
    attempt = party.new_id("m")
    await party.put_lease(attempt)
    marks = await list_marks(party)
    if not marks.open or not party.keeps(Rule.SINGLE_MARK):
        if not party.keeps(Rule.SEEN_AFTER_MARK):
            await record_seen(party, marks.top + 1)
        if packs := await choose_packs(party, marks.packs):
            await party.put(f"{TRASH}{marks.top + 1}", Mark(attempt, packs), if_absent=True)
    await party.commit(attempt, End(Kind.MAINTENANCE, attempt))
    await party.drop_lease(attempt)


async def choose_packs(party: Party, marked: frozenset[str]) -> frozenset[str]:
    """Packs to be swept: what nothing needs, second copies, and now and then one that is needed.

    Left alone is what an attempt at work has put or named: it is likely to be needed soon.
    """
    view = await look_closely(party)
    packs = {pack.rpartition("/")[2] for pack in await party.names(PACKS)}
    places, keep = view.committed(), set()
    for chunk in sorted(view.needed(known=True)):
        if good := (places.get(chunk, set()) & packs) - marked:
            keep.add(party.random.choice(sorted(good)))
        elif party.keeps(Rule.SINGLE_MARK):
            return frozenset()  # it can't be resolved: the listing was not whole, or it is damage
    named: dict[str, set[str]] = {}
    for attempt, pack, table, _ in view.tables():
        named.setdefault(pack, set()).update((attempt, table.attempt))
    chosen = set()
    for pack in sorted(packs - marked):
        if (pack not in keep or party.chance(0.5)) and party.chance(0.8):
            if pack not in named and (body := await party.fetch(pack_name(pack), Pack)):
                named[pack] = {body.attempt}
            if all(attempt in view.ends for attempt in named.get(pack, ())):
                chosen.add(pack)
    return frozenset(chosen)


async def record_seen(party: Party, number: int) -> Seen:
    """List the attempts at work and record them, unless another has; return what stands there."""
    name, attempts = f"{TRASH}{number}-seen", frozenset(await party.names(LEASES))
    seen = Seen(attempts if party.keeps(Rule.RECORDED) else frozenset())
    if await party.put(name, seen, if_absent=True):
        return seen
    return await party.fetch(name, Seen) or seen


async def sweep(party: Party) -> bool:
    """Sweep what is marked, if the attempts that may not know of it have ended; else end one that seems dead.

    Return whether anything is marked.
    """
    if not (open_marks := (await list_marks(party)).open):
        return False
    number = party.random.choice(sorted(open_marks))
    early = None if party.keeps(Rule.LIST_ANEW) else await look_closely(party)
    seen = await record_seen(party, number)
    waiting = seen.attempts - await party.names(SNAPSHOTS)
    if not party.keeps(Rule.TOMBSTONE):
        waiting &= await party.names(LEASES)
    if waiting and party.keeps(Rule.WAIT):
        if party.chance(0.4):
            await party.tombstone(party.random.choice(sorted(waiting)), by=party.new_id("t"))
        return True
    if party.keeps(Rule.GRACE):
        party.store.deliver_all()
    attempt = party.new_id("m")
    if party.keeps(Rule.SWEEP_LEASE):
        await party.put_lease(attempt)
    marks = await list_marks(party)
    view = early or await look_closely(party)
    alone = set(marks.open) == {number} or not party.keeps(Rule.SINGLE_MARK)
    if number in marks.open and alone and await replace(party, attempt, view, marks, number):
        party.journal.sweeps += 1
    else:
        await party.commit(attempt, End(Kind.MAINTENANCE, attempt))
    await party.drop_lease(attempt)
    return True


async def replace(party: Party, attempt: str, view: View, marks: Marks, number: int) -> bool:
    """Copy what is needed, replace the index objects that name marked packs, delete; return whether it came so far."""
    doomed = marks.open[number]
    naming = [name for name, index in view.index.items() if doomed & index.packs.keys()]
    replaced = [name for name in sorted(naming) if attempt_of(name) in view.ends]
    if replaced and not party.keeps(Rule.REPLACE_ALL):
        replaced.remove(party.random.choice(replaced))
    merged = union(party, view, replaced, without=doomed if party.keeps(Rule.WITHOUT_MARKED) else frozenset())
    if party.keeps(Rule.COPY):
        copies = await copy_needed(party, attempt, view, doomed, marks.packs)
        if copies is None:
            return False
        merged |= copies
    if not await publish(party, attempt, merged, replaced):
        return False
    if not party.keeps(Rule.DONE_LAST):
        await party.put(f"{TRASH}{number}-done", Note(attempt))
    steps = [replaced, [pack_name(pack) for pack in sorted(doomed)]]
    for names in steps if party.keeps(Rule.INDEX_DELETED_FIRST) else reversed(steps):
        for name in names:
            await party.store.delete(name)
    await party.put(f"{TRASH}{number}-done", Note(attempt))
    await put_swept(party, attempt, view)
    return True


def union(party: Party, view: View, names: list[str], *, without: frozenset[str]) -> dict[str, Pack]:
    """All that index objects name, but for some packs."""
    merged: dict[str, Pack] = {}
    for name in names:
        if view.ends[attempt_of(name)].committed or not party.keeps(Rule.MERGE_FENCE):
            for pack, table in view.index[name].packs.items():
                if pack not in without:
                    before = merged[pack].chunks if pack in merged else frozenset()
                    merged[pack] = Pack(table.attempt, table.chunks | before)
    return merged


async def copy_needed(
    party: Party, attempt: str, view: View, doomed: frozenset[str], marked: frozenset[str]
) -> dict[str, Pack] | None:
    """Copy the needed chunks that only doomed packs hold; return the copies, None if one can't be read."""
    copies, places, resolvable = {}, view.committed(), view.needed(known=True)
    for chunk in sorted(view.needed()):
        held = places.get(chunk, set())
        if not held and chunk in resolvable:
            if view.whole:
                party.journal.damage.append(f"sweep: chunk {chunk} is nowhere")
            return None
        if not held or held - marked:
            continue
        for source in sorted(held):
            if await party.fetch(pack_name(source), Pack):
                break
        else:
            return None  # another sweep of the mark has been faster
        pack, table = party.new_pack(attempt, frozenset([chunk]))
        await party.put(pack_name(pack), table)
        copies[pack] = table
    return copies


async def publish(party: Party, attempt: str, merged: dict[str, Pack], replaced: list[str]) -> bool:
    """Put the index object that replaces others, and commit; return False if the attempt was revoked."""
    if merged:
        await party.put(f"{INDEX}{attempt}-0", Index(merged))
    if not party.keeps(Rule.COMMIT_FIRST):
        for name in replaced:
            await party.store.delete(name)
    return await party.commit(attempt, End(Kind.MAINTENANCE, attempt))


async def put_swept(party: Party, attempt: str, view: View) -> None:
    """Put end markers where removed snapshots were."""
    kind = Kind.SWEPT if party.keeps(Rule.SWEPT_IS_NO_TOMBSTONE) else Kind.TOMBSTONE
    for owner, end in sorted(view.ends.items()):
        removed = end.kind is Kind.SNAPSHOT and owner in view.removed
        if removed and party.keeps(Rule.NAMES_STAY_TAKEN):
            swept = party.mirror[SNAPSHOTS + owner] = End(kind, attempt)
            await party.put(SNAPSHOTS + owner, swept)
        elif not party.keeps(Rule.NAMES_STAY_TAKEN) and (removed or not end.committed):
            await party.store.delete(SNAPSHOTS + owner)


async def merge(party: Party) -> None:
    """Replace some index objects by one, without a sweep."""
    attempt = party.new_id("m")
    if party.keeps(Rule.MERGE_LEASE):
        await party.put_lease(attempt)
    view = await look(party)
    spared = view.marks.packs if party.keeps(Rule.MERGE_SPARES_MARKED) else frozenset()
    replaced = [
        name
        for name, index in sorted(view.index.items())
        if attempt_of(name) in view.ends and not spared & index.packs.keys() and party.chance(0.8)
    ]
    if await publish(party, attempt, union(party, view, replaced, without=frozenset()), replaced):
        for name in replaced:
            await party.store.delete(name)
    await party.drop_lease(attempt)
