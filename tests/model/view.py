"""What an actor sees of a repository: listings, with the objects they name fetched one by one, each at its moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.model.layout import INDEX, REMOVED, SNAPSHOTS, TRASH, End, Index, Kind, Mark, attempt_of
from tests.model.rules import Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.model.layout import Pack
    from tests.model.party import Party


@dataclass
class Marks:
    """`trash/`: the highest number, the marks that are open, and those whose attempts have been recorded."""

    top: int = 0
    open: dict[int, frozenset[str]] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    @property
    def packs(self) -> frozenset[str]:
        """All that is marked and not known to be swept."""
        return frozenset().union(*self.open.values())


@dataclass
class View:
    """The index objects, what ended each attempt, and the attempts whose snapshots are removed.

    `known` are the attempts that had ended before the index was listed: only what their snapshots need must be found
    in it. `whole`: nothing that deletes index objects ended while the index was listed, so that no chunk was missed
    which was to be found all the time. `marks` is what was open before (or, with TRASH_FIRST left out, after) the rest.
    """

    marks: Marks = field(default_factory=Marks)
    index: dict[str, Index] = field(default_factory=dict)
    ends: dict[str, End] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()
    whole: bool = False

    def snapshots(self) -> dict[str, End]:
        """What can be restored, by attempt."""
        return {
            attempt: end
            for attempt, end in self.ends.items()
            if end.kind is Kind.SNAPSHOT and attempt not in self.removed
        }

    def needed(self, *, known: bool = False) -> set[str]:
        """The chunks of all snapshots, or of the known ones."""
        return {
            chunk
            for attempt, end in self.snapshots().items()
            if attempt in self.known or not known
            for chunk in end.chunks
        }

    def tables(self) -> Iterator[tuple[str, str, Pack, End | None]]:
        """Each pack in each index object: the attempt of the object, the pack's id and content, the attempt's end."""
        for name, index in self.index.items():
            attempt = attempt_of(name)
            for pack, table in index.packs.items():
                yield attempt, pack, table, self.ends.get(attempt)

    def committed(self) -> dict[str, set[str]]:
        """Where each chunk lies: chunk -> packs, by index objects of attempts that have committed."""
        found: dict[str, set[str]] = {}
        for _, pack, table, end in self.tables():
            if end and end.committed:
                for chunk in table.chunks:
                    found.setdefault(chunk, set()).add(pack)
        return found


async def list_marks(party: Party) -> Marks:
    """List trash and fetch the open marks."""
    marks, numbers, ended = Marks(), set[int](), set[int]()
    for name in await party.names(TRASH):
        number, _, suffix = name.partition("-")
        {"": numbers, "seen": marks.seen, "done": ended}[suffix].add(int(number))
    marks.top = max(numbers, default=0)
    for opened in sorted(numbers - ended):
        name = f"{TRASH}{opened}"
        if mark := party.mirror.get(name) or await party.fetch(name, Mark):
            party.mirror[name] = mark
            marks.open[opened] = mark.packs
    return marks


async def list_index(party: Party) -> dict[str, Index]:
    """List the index and fetch its objects; those that are gone by then are left out."""
    return {INDEX + name: body for name, body in (await party.fetch_listed(INDEX, Index)).items()}


async def list_ends(party: Party) -> dict[str, End]:
    """List what has ended, and how."""
    return await party.fetch_listed(SNAPSHOTS, End)


async def list_removed(party: Party) -> frozenset[str]:
    """List the attempts whose snapshots are removed."""
    return frozenset([name.partition("-")[2] for name in await party.names(REMOVED)])


async def look(party: Party) -> View:
    """List trash, index, snapshots and removed, in that order."""
    view = View()
    if not party.keeps(Rule.REMOVED_AFTER_TRASH):
        view.removed = await list_removed(party)
    if party.keeps(Rule.TRASH_FIRST):
        view.marks = await list_marks(party)
    view.index = await list_index(party)
    view.ends = await list_ends(party)
    if party.keeps(Rule.REMOVED_AFTER_TRASH):
        view.removed = await list_removed(party)
    if not party.keeps(Rule.TRASH_FIRST):
        view.marks = await list_marks(party)
    return view


async def look_closely(party: Party) -> View:
    """List index, snapshots and removed, and say whether the listing is whole.

    An index object is deleted only after the attempt that replaced it has committed. So when each attempt of
    maintenance known afterwards was known before, what replaces an object deleted meanwhile was there from the start.
    """
    known = frozenset(await party.names(SNAPSHOTS))
    index = await list_index(party)
    ends = await list_ends(party)
    removed = await list_removed(party)
    whole = all(end.kind is not Kind.MAINTENANCE for attempt, end in ends.items() if attempt not in known)
    return View(index=index, ends=ends, removed=removed, known=known, whole=whole)
