"""A repository in memory, actors at work on it, one storage call at a time, and what must never be seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.model.layout import (
    INDEX,
    PACKS,
    REMOVED,
    SNAPSHOTS,
    End,
    Index,
    Kind,
    Pack,
    attempt_of,
    decode,
    encode,
    pack_name,
)
from tests.model.maintenance import maintain, mark, merge, sweep
from tests.model.party import Journal, Party
from tests.model.reader import check, restore
from tests.model.stepping import Call, Fate, SteppingConnector, run_now
from tests.model.writer import back_up, remove

from coffret.connectors.memory import MemoryConnector

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from random import Random

    from tests.model.rules import Rule

CHUNKS = "xyz"


def start_backup(party: Party) -> Coroutine[Any, Any, None]:
    """A backup of some chunks, with or without a parent."""
    chunks = party.random.sample(CHUNKS, party.random.randint(1, len(CHUNKS)))
    return back_up(party, frozenset(chunks), wants_parent=party.chance(0.5))


ROLES: dict[str, Callable[[Party], Coroutine[Any, Any, object]]] = {
    "backup": start_backup,
    "remove": remove,
    "mark": mark,
    "sweep": sweep,
    "maintain": maintain,
    "merge": merge,
    "restore": restore,
    "check": check,
}


@dataclass(eq=False)
class Actor:
    """One process: its role, where it stands, and the call it is about to make."""

    role: str
    coroutine: Coroutine[Call, Fate | None, object]
    pending: Call


class World:
    """A repository with one snapshot, and its actors. Whoever steps them decides all that happens."""

    def __init__(self, random: Random, left_out: frozenset[Rule] = frozenset()) -> None:
        self.random = random
        self.left_out = left_out
        self.journal = Journal()
        self.actors: list[Actor] = []
        self.violation = ""
        self._inner = MemoryConnector()
        self._mirror: dict[str, Any] = {}  # of the host that most actors run on
        self.store = SteppingConnector(self._inner, random)
        pack, chunks = "00first", frozenset("xy")
        table = Pack("w", chunks)
        for name, body in (
            (pack_name(pack), table),
            (f"{INDEX}w-0", Index({pack: table})),
            (f"{SNAPSHOTS}w", End(Kind.SNAPSHOT, "w", "s", chunks)),
        ):
            run_now(self._inner.put(name, [encode(body)]))

    def start(self, role: str, random: Random | None = None) -> Actor:
        """Let a new actor come as far as its first storage call."""
        random = random or self.random
        mirror = self._mirror if random.random() < 0.7 else {}
        party = Party(self.store, self.left_out, random, self.journal, mirror)
        coroutine = ROLES[role](party)
        actor = Actor(role, coroutine, coroutine.send(None))
        self.actors.append(actor)
        return actor

    def step(self, actor: Actor, fate: Fate = Fate.DONE) -> bool:
        """Make the actor's pending call and let it come to the next; return whether there is one.

        `fate` is what becomes of the call if it is a put; other calls are answered.
        """
        call = actor.pending
        try:
            actor.pending = actor.coroutine.send(fate if call.method == "put" else Fate.DONE)
        except StopIteration:
            self.actors.remove(actor)
        if call.method == "delete" or (call.method == "put" and call.name.startswith(SNAPSHOTS)):
            self.look_for_loss()
        if self.journal.damage:
            self.violation = self.journal.damage[0]
        return actor in self.actors

    def kill(self, actor: Actor) -> None:
        """End an actor where it stands; its pending call is not made."""
        actor.coroutine.close()
        self.actors.remove(actor)

    def deliver(self) -> None:
        """Let one of the late requests arrive, if there are any."""
        if self.store.late:
            self.store.deliver(self.random.randrange(self.store.late))
            self.look_for_loss()

    def close(self) -> None:
        """End all actors."""
        while self.actors:
            self.kill(self.actors[-1])

    def look_for_loss(self) -> None:
        """Set `violation` if a chunk of a snapshot can't be reached, or a snapshot said to be made is not there."""
        objects = run_now(self._objects())
        ends = {name: decode(body, End) for name, body in objects[SNAPSHOTS].items()}
        removed = {name.partition("-")[2] for name in objects[REMOVED]}
        packs = {name.rpartition("/")[2] for name in objects[PACKS]}
        reachable: set[str] = set()
        for name, body in objects[INDEX].items():
            end = ends.get(attempt_of(name))
            if end and end.committed:
                for pack, table in decode(body, Index).packs.items():
                    if pack in packs:
                        reachable |= table.chunks
        for attempt, end in ends.items():
            if end.kind is Kind.SNAPSHOT and attempt not in removed and (lost := end.chunks - reachable):
                self.violation = f"chunks {sorted(lost)} of snapshot {attempt} are lost"
        for attempt in self.journal.made.keys() - removed:
            if attempt not in ends or ends[attempt].kind is not Kind.SNAPSHOT:
                self.violation = f"snapshot {attempt} was reported as made and is not there"

    async def _objects(self) -> dict[str, dict[str, bytes]]:
        return {
            prefix: {
                found.name.removeprefix(prefix): await self._inner.get(found.name)
                async for found in self._inner.list(prefix)
            }
            for prefix in (SNAPSHOTS, REMOVED, PACKS, INDEX)
        }
