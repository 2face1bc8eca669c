"""Parties at work on repositories in memory, one storage call at a time, as a scheduler lets them.

The parties are the real backup, removal, sync, maintenance, reader and check. Each talks to a storage through a `Gate`,
which waits before every call until it is its party's turn. The party with the highest priority makes the calls, until
at a few random moments it falls to the lowest, or dies, or the storages' clock jumps by an hour, so that whoever waits
is taken for dead: few switches, each at any call, find what a fair coin a call hardly ever does (as in
tests/model/scheduler.py). In some runs requests and answers get lost, and are repeated as the program does; in some,
where there is a grace, a request arrives when its sender has given it up. Each party has a clock of its own.
"""

from __future__ import annotations

import random
import time
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from zlib import crc32

import anyio
import anyio.lowlevel
from tests.model.stepping import Fate

from coffret.connectors.base import Connector
from coffret.connectors.errors import AlreadyExists, ConnectionLost, ConnectorError
from coffret.connectors.retry import RetryConnector
from coffret.connectors.wrapper import Wrapper
from coffret.engine.errors import InTheWay, LeaseLost, reported

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    import pytest
    from tests.attempts.storage import Storage
    from tests.maintenance.oracle import Oracle

    from coffret.connectors.base import Buffer, Listings, ObjectInfo

# Where much depends on who is first.
TURNS = ("put snapshots/", "put index/", "put trash/", "put leases/", "list trash/", "list index/", "delete ")
# Far above what a party computes between two calls.
_PATIENCE_S = 120
_HOUR_S = 3600
# By how much the clock of the party at work is wrong.
_skew_s: ContextVar[int] = ContextVar("skew", default=0)


def set_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each party a clock of its own."""
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + _skew_s.get())
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + _skew_s.get() * 10**9)


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

    def __init__(self, inner: Connector, stage: Stage, party: Party, oracle: Oracle) -> None:
        super().__init__(inner)
        self._stage, self._party, self._oracle = stage, party, oracle

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        sent = [bytes(part) for part in body]  # what is on its way does not change, whatever becomes of the buffers

        async def request() -> None:
            await self.inner.put(name, sent, if_absent=if_absent)
            self._stage.look(f"put {name}", self._oracle)

        await self._send(f"put {name}", request)

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

    async def list_turns(self, turns: Sequence[Sequence[str]]) -> Listings:
        return await Connector.list_turns(self, turns)  # each a call of its own

    async def stat(self, name: str) -> ObjectInfo:
        await self._turn(f"stat {name}")
        return await self.inner.stat(name)

    async def delete(self, name: str) -> None:
        async def request() -> None:
            await self.inner.delete(name)
            self._stage.look(f"delete {name}", self._oracle)

        await self._send(f"delete {name}", request)

    async def _send(self, call: str, request: Callable[[], Awaitable[None]]) -> None:
        """Let a request have its fate."""
        await self._turn(call)
        fate = self._stage.fate()
        if fate is Fate.LATE:
            self._stage.late.append((call, request))
        elif fate is not Fate.NOT_SENT:
            await request()
        if fate is not Fate.DONE:
            raise ConnectionLost(f"no answer: {call}")

    async def _turn(self, call: str) -> None:
        party = self._party
        if not party.dead:
            event = anyio.Event()
            party.waiting.append((call, event))
            party.wake()
            await event.wait()
        if party.dead:
            raise ConnectorError("the process is dead")


class Stage:
    """One run. `violation` is what must never be seen, and was; `story` the calls that were made.

    `lossy`: how likely a request or its answer gets lost; `late` ones are on their way, if `delays` allows that.
    """

    def __init__(self, seed: int, *, delays: bool) -> None:
        self.random = random.Random(seed)
        self.now_s = 1.8e9
        self.order: list[Party] = []  # the last has the highest priority
        self.violation = ""
        self.story: list[str] = []
        self.turn = self.random.choice((0.0, 0.1, 0.3))
        self.lossy = self.random.choice((0.0, 0.02, 0.1))
        self.fates = [Fate.NOT_SENT, Fate.UNANSWERED, *([Fate.LATE] if delays else [])]
        self.hours = 0.5 if delays else 0.25  # the grace has to pass before anything is swept
        self.late: list[tuple[str, Callable[[], Awaitable[None]]]] = []

    def gate(self, party: Party, storage: Storage, oracle: Oracle) -> Connector:
        """A storage as a party has it."""
        storage.memory.clock = lambda: self.now_s
        return RetryConnector(Gate(storage.memory, self, party, oracle), first_wait_s=0)

    def fate(self) -> Fate:
        """What becomes of a request."""
        return self.random.choice(self.fates) if self.random.random() < self.lossy else Fate.DONE

    async def deliver(self, number: int) -> None:
        """Let a late request arrive."""
        call, request = self.late.pop(number)
        self.story.append(f"late: {call}")
        with suppress(AlreadyExists):
            await request()

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
                    if self.late and self.random.random() < 0.02:
                        await self.deliver(self.random.randrange(len(self.late)))
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
        elif kind < 0.2 + self.hours:
            await self.pass_an_hour()
        if kind > 0.3:
            self.order.insert(0, self.order.pop())

    async def pass_an_hour(self) -> None:
        """What is late arrives: the grace is longer than any request is."""
        while self.late:
            await self.deliver(0)
        self.story.append("an hour passes")
        self.now_s += _HOUR_S + 100

    def _kill(self, party: Party) -> None:
        party.dead = True
        for _, event in party.waiting:
            event.set()
        party.waiting.clear()
        party.scope.cancel()

    async def _run(self, party: Party, work: Callable[[Party], Awaitable[None]]) -> None:
        _skew_s.set(self.random.choice((-_HOUR_S, 0, _HOUR_S)))
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

    def look(self, call: str, oracle: Oracle) -> None:
        """After a call that may do harm: whether it has."""
        if not self.violation and call.startswith(("delete ", "put snapshots/")):
            self.violation = oracle.violation()
