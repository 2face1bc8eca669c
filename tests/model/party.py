"""What every actor of the model has: a storage, rules, chance, attempts; and how it puts, fetches and lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from tests.model.layout import LEASES, SNAPSHOTS, End, Kind, Note, Pack, decode, encode
from tests.model.rules import Rule

from coffret.connectors.errors import AlreadyExists, ConnectionLost, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tests.model.layout import Body
    from tests.model.stepping import SteppingConnector


@dataclass
class Journal:
    """What the actors tell the world: snapshots they reported as made, damage they reported, marks they ended."""

    made: dict[str, str] = field(default_factory=dict)  # attempt -> snapshot id
    damage: list[str] = field(default_factory=list)
    sweeps: int = 0
    serial: Iterator[int] = field(default_factory=count)


@dataclass
class Party:
    """One actor's hands: all it does to the repository goes through here.

    `mirror` is its host's cache of listed objects, by name. It may be shared by actors, and saves getting what never
    changes: index objects, marks, and ends, which change only once a record in `removed/` has made them void.
    """

    store: SteppingConnector
    left_out: frozenset[Rule]
    random: Random
    journal: Journal
    mirror: dict[str, Any]

    def keeps(self, rule: Rule) -> bool:
        """Whether the rule is followed in this run."""
        return rule not in self.left_out

    def chance(self, probability: float) -> bool:
        """A coin that says yes this often."""
        return self.random.random() < probability

    def new_id(self, letter: str) -> str:
        """An id never given before."""
        return f"{letter}{next(self.journal.serial):x}"

    async def put(self, name: str, body: Body, *, if_absent: bool = False) -> bool:
        """Put an object, again while answers get lost; return False if another's stands there (`if_absent`)."""
        data, lost = encode(body), False
        while True:
            try:
                await self.store.put(name, [data], if_absent=if_absent)
                return True
            except ConnectionLost:
                lost = True
            except AlreadyExists:
                if lost and self.keeps(Rule.COMPARE_BYTES):
                    return await self.store.get(name) == data
                return lost

    async def fetch(self, name: str, kind: type[Body]) -> Body | None:
        """Get and decode an object; None if it is not there."""
        try:
            return decode(await self.store.get(name), kind)
        except NotFound:
            return None

    async def fetch_listed(self, prefix: str, kind: type[Body]) -> dict[str, Body]:
        """List a folder and fetch its objects, but for those that are gone by then; names are without the prefix."""
        bodies: dict[str, Body] = {}
        for name in sorted(await self.names(prefix)):
            body = self.mirror.get(prefix + name) or await self.fetch(prefix + name, kind)
            if body:
                bodies[name] = self.mirror[prefix + name] = body
        return bodies

    async def exists(self, name: str) -> bool:
        """Whether an object is there."""
        try:
            await self.store.stat(name)
        except NotFound:
            return False
        return True

    async def names(self, prefix: str) -> set[str]:
        """What follows `prefix` in the names of a listing."""
        return {found.name.removeprefix(prefix) async for found in self.store.list(prefix)}

    def new_pack(self, attempt: str, chunks: frozenset[str]) -> tuple[str, Pack]:
        """A pack that is not stored yet, and its id."""
        serial = next(self.journal.serial)
        return f"{serial % 256:02x}{serial:06x}", Pack(attempt, chunks)

    async def put_lease(self, attempt: str) -> None:
        """Say that an attempt is at work."""
        await self.put(LEASES + attempt, Note(attempt))

    async def drop_lease(self, attempt: str) -> None:
        """Take a lease away."""
        await self.store.delete(LEASES + attempt)

    async def commit(self, attempt: str, end: End) -> bool:
        """Put what ends an attempt; return False if a tombstone was there before."""
        if not self.keeps(Rule.LEASE_LAST):
            await self.drop_lease(attempt)
        return await self.put(SNAPSHOTS + attempt, end, if_absent=self.keeps(Rule.PUT_IF_ABSENT))

    async def tombstone(self, attempt: str, by: str) -> None:
        """End an attempt that is taken for dead."""
        if self.keeps(Rule.TOMBSTONE):
            await self.put(SNAPSHOTS + attempt, End(Kind.TOMBSTONE, by), if_absent=True)
        await self.drop_lease(attempt)
