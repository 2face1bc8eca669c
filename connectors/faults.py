"""A connector around another that fails, waits and cuts short as it is told to: for tests and benchmarks.

Calls are numbered from 0 in the order in which they begin, so that a test can run once to count them and then once for
each with a failure there.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio

from coffret.connectors.base import Connector
from coffret.connectors.wrapper import Wrapper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence

    from coffret.connectors.base import Buffer, Listings, ObjectInfo

    Hook = Callable[[str, str], Awaitable[None]]


class FaultyConnector(Wrapper):
    """Passes each call on to `inner`, with the faults asked for.

    `latency_s`: each call first waits for a random time of this mean, drawn from `seed`. `fail_before`, `fail_after`:
    what to raise at the call of a number, instead of its effect, or after it as if the answer were lost. `short_reads`:
    the numbers of the `get` calls that return half of the bytes. `before` and `after`: awaited around the effect of
    each call with its method and name (the prefix for `list`); they may wait or raise. `calls`: (method, name) of all.
    """

    def __init__(
        self,
        inner: Connector,
        *,
        seed: int = 0,
        latency_s: float = 0.0,
        fail_before: Mapping[int, Exception] | None = None,
        fail_after: Mapping[int, Exception] | None = None,
        short_reads: Container[int] = (),
        before: Hook | None = None,
        after: Hook | None = None,
    ) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str]] = []
        self.latency_s = latency_s
        self.fail_before, self.fail_after = fail_before or {}, fail_after or {}
        self.short_reads = short_reads
        self.before, self.after = before, after
        self._random = random.Random(seed)

    async def create(self) -> None:
        number = await self._begin("create", "")
        await self.inner.create()
        await self._end(number)

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        number = await self._begin("put", name)
        await self.inner.put(name, body, if_absent=if_absent)
        await self._end(number)

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        number = await self._begin("get", name)
        data = await self.inner.get(name, offset=offset, length=length)
        await self._end(number)
        return data[: len(data) // 2] if number in self.short_reads else data

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        number = await self._begin("get_into", name)
        await self.inner.get_into(name, offset, buffer)
        await self._end(number)

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        number = await self._begin("peek", name)
        data = await self.inner.peek(name, limit_bytes)
        await self._end(number)
        return data

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        number = await self._begin("list", prefix)
        async for info in self.inner.list(prefix):
            yield info
        await self._end(number)

    async def list_turns(self, turns: Sequence[Sequence[str]]) -> Listings:
        return await Connector.list_turns(self, turns)  # each a call of its own

    async def stat(self, name: str) -> ObjectInfo:
        number = await self._begin("stat", name)
        info = await self.inner.stat(name)
        await self._end(number)
        return info

    async def delete(self, name: str) -> None:
        number = await self._begin("delete", name)
        await self.inner.delete(name)
        await self._end(number)

    async def _begin(self, method: str, name: str) -> int:
        number = len(self.calls)
        self.calls.append((method, name))
        if self.latency_s:
            await anyio.sleep(self._random.uniform(0, 2 * self.latency_s))
        if self.before:
            await self.before(method, name)
        if number in self.fail_before:
            raise self.fail_before[number]
        return number

    async def _end(self, number: int) -> None:
        if self.after:
            await self.after(*self.calls[number])
        if number in self.fail_after:
            raise self.fail_after[number]
