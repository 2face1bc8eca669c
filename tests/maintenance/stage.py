"""Parties at work on one repository in memory, one storage call at a time, as a scheduler lets them.

The parties are the real backup, removal, maintenance and reader. Each talks to the storage through a `Gate`, which
waits before every call until it is its party's turn. The party with the highest priority makes the calls, until at a
few random moments it falls to the lowest, or dies, or the storage's clock jumps by an hour, so that whoever waits is
taken for dead: few switches, each at any call, find what a fair coin a call hardly ever does (as in
tests/model/scheduler.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from zlib import crc32

import anyio
import anyio.lowlevel

from coffret.connectors.errors import ConnectionLost
from coffret.connectors.wrapper import Wrapper
from coffret.engine.errors import InTheWay, LeaseLost, reported

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from tests.attempts.storage import Storage
    from tests.maintenance.oracle import Oracle

    from coffret.connectors.base import Buffer, Connector, ObjectInfo

# Where much depends on who is first.
TURNS = ("put snapshots/", "put index/", "put trash/", "put leases/", "list trash/", "list index/", "delete ")
# Far above what a party computes between two calls.
_PATIENCE_S = 120


@dataclass(eq=False)
class Party:
    """One process: what it does, and the calls it is about to make."""

    name: str
    waiting: list[tuple[str, anyio.Event]] = field(default_factory=list)
    woken: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: bool = False
    dead: bool = False

    def wake(self) -> None:
        """It waits for its turn, or has ended."""
        self.woken.set()


class Gate(Wrapper):
    """A party's connector: each call waits for its turn; a listing takes one or two, between which others work."""

    def __init__(self, inner: Connector, stage: Stage, party: Party) -> None:
        super().__init__(inner)
        self._stage, self._party = stage, party

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        await self._turn(f"put {name}")
        await self.inner.put(name, body, if_absent=if_absent)
        self._stage.look(f"put {name}")

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        await self._turn(f"get {name}")
        return await self.inner.get(name, offset=offset, length=length)

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        await self._turn(f"get {name}")
        await self.inner.get_into(name, offset, buffer)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        salt, pages = self._stage.random.getrandbits(32), self._stage.random.choice((1, 1, 2))
        for page in range(pages):
            await self._turn(f"list {prefix}")
            for info in [info async for info in self.inner.list(prefix)]:
                if crc32(info.name.encode(), salt) % pages == page:
                    yield info

    async def stat(self, name: str) -> ObjectInfo:
        await self._turn(f"stat {name}")
        return await self.inner.stat(name)

    async def delete(self, name: str) -> None:
        await self._turn(f"delete {name}")
        await self.inner.delete(name)
        self._stage.look(f"delete {name}")

    async def _turn(self, call: str) -> None:
        party = self._party
        if not party.dead:
            event = anyio.Event()
            party.waiting.append((call, event))
            party.wake()
            await event.wait()
        if party.dead:
            raise ConnectionLost("the process is dead")


class Stage:
    """One run. `violation` is what must never be seen, and was; `story` the calls that were made."""

    def __init__(self, storage: Storage, oracle: Oracle, seed: int) -> None:
        self.storage, self.oracle, self.random = storage, oracle, random.Random(seed)
        self.now_s = 1.8e9
        storage.memory.clock = lambda: self.now_s
        self.order: list[Party] = []  # the last has the highest priority
        self.violation = ""
        self.story: list[str] = []
        self.turn = self.random.choice((0.0, 0.1, 0.3))

    def gate(self, party: Party) -> Gate:
        """The storage as a party has it."""
        return Gate(self.storage.memory, self, party)

    async def play(self, cast: Sequence[tuple[str, Callable[[Party], Awaitable[None]]]], span: int) -> None:
        """Let the parties of a cast do their work. Switches, deaths, jumps of the clock fall into the first calls."""
        moments = {self.random.randrange(span) for _ in range(self.random.randint(2, 8))}
        async with anyio.create_task_group() as group:
            for name, work in cast:
                party = Party(name)
                self.order.insert(self.random.randint(0, len(self.order)), party)
                group.start_soon(self._run, party, work)
            with anyio.fail_after(_PATIENCE_S):
                step = 0
                while self.order and not self.violation:
                    party = self.order[-1]
                    if not party.waiting and not party.ended:
                        party.woken = anyio.Event()
                        await party.woken.wait()
                    if party.ended:
                        self.order.remove(party)
                        continue
                    step += 1
                    self.now_s += 0.01
                    if step in moments:
                        await self._happen(party)
                        continue
                    number = self.random.randrange(len(party.waiting))
                    if party.waiting[number][0].startswith(TURNS) and self.random.random() < self.turn:
                        self.order.insert(0, self.order.pop())
                        continue
                    call, event = party.waiting.pop(number)
                    self.story.append(f"{party.name}: {call}")
                    event.set()
                    await anyio.lowlevel.checkpoint()
            for party in self.order:
                self._kill(party)

    async def _happen(self, party: Party) -> None:
        if (kind := self.random.random()) < 0.2:
            self.story.append(f"{party.name} dies")
            self._kill(party)
        elif kind < 0.45:
            self.story.append("an hour passes")
            self.now_s += 3700
        if kind > 0.3:
            self.order.insert(0, self.order.pop())

    def _kill(self, party: Party) -> None:
        party.dead = True
        for _, event in party.waiting:
            event.set()
        party.waiting.clear()
        party.scope.cancel()

    async def _run(self, party: Party, work: Callable[[Party], Awaitable[None]]) -> None:
        try:
            with party.scope:
                await work(party)
        except Exception as error:
            known = reported(error)
            if not party.dead and not isinstance(known, InTheWay | LeaseLost):
                self.violation = self.violation or f"{party.name}: {type(error).__name__}: {known or error!r}"
        finally:
            party.ended = True
            party.wake()

    def look(self, call: str) -> None:
        """After a call that may do harm: whether it has."""
        if not self.violation and call.startswith(("delete ", "put snapshots/")):
            self.violation = self.oracle.violation()
