"""A connector that hands control to the scheduler before every storage call, and through which answers get lost."""

from __future__ import annotations

import types
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

from coffret.connectors.base import Connector, ObjectInfo
from coffret.connectors.errors import AlreadyExists, ConnectionLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Generator, Sequence
    from random import Random

    from coffret.connectors.base import Buffer

Result = TypeVar("Result")


class Fate(Enum):
    """What becomes of a storage call. All but DONE concern puts only, and raise ConnectionLost."""

    DONE = "it takes effect and is answered"
    NOT_SENT = "it never arrives"
    UNANSWERED = "it takes effect, the answer is lost"
    LATE = "it takes effect at some later time, long after the client has given it up"


@dataclass(frozen=True, slots=True)
class Call:
    """A storage call that is about to be made."""

    method: str
    name: str

    def __str__(self) -> str:
        return f"{self.method} {self.name}"


@types.coroutine
def turn(call: Call) -> Generator[Call, Fate, Fate]:
    """Suspend until the scheduler lets the call be made."""
    return (yield call)


def run_now(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine that never suspends, and return its result.

    :raises RuntimeError: if it does suspend
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    coroutine.close()
    raise RuntimeError("it suspended")


class SteppingConnector(Connector):
    """Each call on `inner` waits for its turn; each listing takes several, between which others work.

    A listing is no picture of one moment, whatever its order: each name is looked for at one of its moments. What
    was there before the listing began, and is still there when it ends, is in it; of the rest anything may be.
    """

    def __init__(self, inner: Connector, random: Random) -> None:
        self._inner = inner
        self._random = random
        self._late: list[tuple[str, Sequence[Buffer], bool]] = []
        self.location = inner.location
        self.calls = 0

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        fate = await self._turn("put", name)
        if fate is Fate.LATE:
            self._late.append((name, body, if_absent))
        elif fate is not Fate.NOT_SENT:
            await self._inner.put(name, body, if_absent=if_absent)
        if fate is not Fate.DONE:
            raise ConnectionLost(f"no answer: put {name}")

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        await self._turn("get", name)
        return await self._inner.get(name, offset=offset, length=length)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        salt, pages = self._random.getrandbits(32), self._random.choice((1, 1, 2))
        for page in range(pages):
            await self._turn("list", prefix)
            async for found in self._inner.list(prefix):
                if crc32(found.name.encode(), salt) % pages == page:
                    yield found

    async def stat(self, name: str) -> ObjectInfo:
        await self._turn("stat", name)
        return await self._inner.stat(name)

    async def delete(self, name: str) -> None:
        await self._turn("delete", name)
        await self._inner.delete(name)

    @property
    def late(self) -> int:
        """How many requests are still under way though their client has given them up."""
        return len(self._late)

    def deliver(self, which: int) -> str:
        """Let a late request arrive, and return the name it puts."""
        name, body, if_absent = self._late.pop(which)
        with suppress(AlreadyExists):
            run_now(self._inner.put(name, body, if_absent=if_absent))
        return name

    def deliver_all(self) -> None:
        """Let every late request arrive: what the grace is long enough for."""
        while self._late:
            self.deliver(0)

    async def _turn(self, method: str, name: str) -> Fate:
        self.calls += 1
        return await turn(Call(method, name))
