"""Backups, and the removal of snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.model.layout import INDEX, End, Index, Kind, Note, Pack, pack_name, removed_name
from tests.model.rules import Rule
from tests.model.view import View, list_ends, list_removed, look

if TYPE_CHECKING:
    from tests.model.party import Party

ATTEMPTS = 3


async def back_up(party: Party, chunks: frozenset[str], *, wants_parent: bool) -> None:
    """Make a snapshot of `chunks`, and of what a parent holds; under a new attempt whenever it is revoked."""
    backup = Backup(party, chunks, wants_parent=wants_parent)
    for _ in range(ATTEMPTS):
        if await backup.attempt(party.new_id("w")):
            return


class Backup:
    """A backup, over all its attempts."""

    def __init__(self, party: Party, chunks: frozenset[str], *, wants_parent: bool) -> None:
        self.party = party
        self.needs = chunks
        self.wants_parent = wants_parent
        self.parent: str | None = None  # the attempt of the parent, once chosen
        self.snapshot = party.new_id("s")
        self.stored: dict[str, Pack] = {}  # packs it has put itself, under any of its attempts
        self.relied_on: dict[str, Pack] = {}  # where its last attempt found or put its chunks
        self.published = 0
        self.to_publish: dict[str, Pack] = {}  # what its next index object names
        self.to_put: dict[str, Pack] = {}  # packs that come after their index, with PACKS_FIRST left out

    async def attempt(self, attempt: str) -> bool:
        """Try once; return whether the snapshot is committed."""
        party, trusted = self.party, frozenset[str]()
        self.published, self.to_publish = 0, {}
        if not party.keeps(Rule.PARENT_AFTER_LEASE):
            trusted = self._trust_parent(View(ends=await list_ends(party), removed=await list_removed(party)))
        if party.keeps(Rule.LEASE_FIRST):
            await party.put_lease(attempt)
        view = await look(party)
        if not party.keeps(Rule.LEASE_FIRST):
            await party.put_lease(attempt)
        if party.keeps(Rule.PARENT_AFTER_LEASE):
            trusted = self._trust_parent(view)
        if view.marks.open and party.keeps(Rule.PARENT_LOOK_UP):
            trusted = frozenset()
        if party.keeps(Rule.RECHECK) or not self.relied_on:
            await self._find_or_store(attempt, view, self.needs - trusted)
        else:
            self.to_publish = dict(self.relied_on)
        if party.keeps(Rule.INDEX_FIRST):
            await self._publish(attempt)
        committed = await party.commit(attempt, End(Kind.SNAPSHOT, attempt, self.snapshot, self.needs))
        if committed:
            party.journal.made[attempt] = self.snapshot
        await self._publish(attempt)
        await party.drop_lease(attempt)
        return committed

    def _trust_parent(self, view: View) -> frozenset[str]:
        """Choose a parent once; return the chunks that need no look-up because it is there."""
        snapshots = view.snapshots()
        if self.parent is None:
            self.parent = self.party.random.choice(sorted(snapshots)) if self.wants_parent and snapshots else ""
            if self.parent:
                self.needs |= snapshots[self.parent].chunks
        return snapshots[self.parent].chunks if self.parent in snapshots else frozenset()

    async def _find_or_store(self, attempt: str, view: View, chunks: frozenset[str]) -> None:
        """Find each chunk where others, or own earlier attempts, have put it, else store it; publish now and then."""
        party, self.relied_on = self.party, {}
        for chunk in sorted(chunks):
            if place := await self._find(view, chunk):
                pack, table, adopted = place
            else:
                pack, table, adopted = await self._store(attempt, chunk)
            self._note(self.relied_on, pack, table.attempt, chunk)
            if adopted:
                self._note(self.to_publish, pack, table.attempt, chunk)
            if party.chance(0.3):
                await self._publish(attempt)

    async def _find(self, view: View, chunk: str) -> tuple[str, Pack, bool] | None:
        """Where a chunk lies, if anywhere: the pack, what the index says of it, whether to name it again."""
        party, found = self.party, []
        marked = view.marks.packs if party.keeps(Rule.MARKED_IS_ABSENT) else frozenset()
        for _, pack, table, end in view.tables():
            if chunk not in table.chunks or pack in marked:
                continue
            if end is None or not end.committed:
                if end is None or not party.keeps(Rule.FENCE):
                    found.append((pack, table, party.keeps(Rule.ADOPT)))
            else:
                found.append((pack, table, False))
        for pack, table in self.stored.items():
            if chunk in table.chunks and pack not in marked and await party.exists(pack_name(pack)):
                found.append((pack, table, True))
        return party.random.choice(found) if found else None

    async def _store(self, attempt: str, chunk: str) -> tuple[str, Pack, bool]:
        pack, table = self.party.new_pack(attempt, frozenset([chunk]))
        if self.party.keeps(Rule.PACKS_FIRST):
            await self.party.put(pack_name(pack), table)
        else:
            self.to_put[pack] = table
        self.stored[pack] = table
        return pack, table, True

    async def _publish(self, attempt: str) -> None:
        """Put an index object, if there is something to say."""
        if self.to_publish:
            await self.party.put(f"{INDEX}{attempt}-{self.published}", Index(self.to_publish))
            self.published, self.to_publish = self.published + 1, {}
        while self.to_put:
            pack, table = self.to_put.popitem()
            await self.party.put(pack_name(pack), table)

    @staticmethod
    def _note(tables: dict[str, Pack], pack: str, attempt: str, chunk: str) -> None:
        before = tables[pack].chunks if pack in tables else frozenset()
        tables[pack] = Pack(attempt, before | {chunk})


async def remove(party: Party) -> None:
    """Remove snapshots, now and then."""
    for _ in range(party.random.randint(1, 3)):
        view = View(ends=await list_ends(party), removed=await list_removed(party))
        if snapshots := view.snapshots():
            attempt = party.random.choice(sorted(snapshots))
            await party.put(removed_name(snapshots[attempt].snapshot, attempt), Note(party.new_id("r")))
