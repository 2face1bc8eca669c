"""A connector that tries again what failed for a reason that may pass.

All calls of the contract can be repeated: what is put has one content for ever, and what is deleted stays deleted. Only
a put-if-absent whose answer was lost needs a look: if the name is taken now, by these very bytes, it was this put.

Waits grow from 0.2 s by a factor of 2 to 15 s, each drawn at random below that ("full jitter", M. Brooker, "Exponential
Backoff And Jitter", 2015): those who failed together do not come back together.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

import anyio

from coffret.connectors.base import Connector
from coffret.connectors.errors import AlreadyExists, ConnectorError, NotFound, TransientError
from coffret.connectors.wrapper import Wrapper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from coffret.connectors.base import Arriving, Buffer, Listings, ObjectInfo

T = TypeVar("T")
FIRST_WAIT_S, MAX_WAIT_S = 0.2, 15.0
# A server that is restarted is back in two minutes, or somebody has to look after it.
GIVE_UP_S = 120.0
# Who has not answered once may be no server at all: a wrong port, say.
FIRST_GIVE_UP_S = 10.0
# How much of a large object is compared at a time.
_COMPARE_BYTES = 8 << 20


class RetryConnector(Wrapper):
    """Repeats calls that raise TransientError until `give_up_s` after the first failure; `on_retry` is told of each.

    As long as the storage has never answered it is given up sooner.

    What is raised in the end is the last error.
    """

    def __init__(
        self,
        inner: Connector,
        *,
        give_up_s: float = GIVE_UP_S,
        first_wait_s: float | None = None,
        on_retry: Callable[[str, ConnectorError], None] | None = None,
    ) -> None:
        super().__init__(inner)
        self._give_up_s, self._on_retry = give_up_s, on_retry
        self._first_wait_s = FIRST_WAIT_S if first_wait_s is None else first_wait_s
        self._reached = False

    async def create(self) -> None:
        await self._repeat("create", lambda _: self.inner.create())

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        await self._put(name, body, lambda: self.inner.put(name, body, if_absent=if_absent))

    async def put_arriving(self, name: str, body: Arriving, *, if_absent: bool = False) -> None:
        await self._put(name, [body.view], lambda: self.inner.put_arriving(name, body, if_absent=if_absent))

    async def _put(self, name: str, body: Sequence[Buffer], put: Callable[[], Awaitable[None]]) -> None:
        async def attempt(number: int) -> None:
            try:
                await put()
            except AlreadyExists:
                if number == 0 or not await self._is_there(name, body):
                    raise

        await self._repeat(f"put {name}", attempt)

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        async def attempt(_: int) -> bytes:
            data = await self.inner.get(name, offset=offset, length=length)
            if length is not None and len(data) != length:
                raise TransientError(f"{name}: {len(data)} of {length} bytes came")
            return data

        return await self._repeat(f"get {name}", attempt)

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        await self._repeat(f"get {name}", lambda _: self.inner.get_into(name, offset, buffer))

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        return await self._repeat(f"get {name}", lambda _: self.inner.peek(name, limit_bytes))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        backoff, last = _Backoff(self, f"list {prefix}"), ""
        ordered, begun = self.inner.capabilities.ordered_lists, False
        while True:
            try:
                async for info in self.inner.list(prefix):
                    if info.name > last or not ordered:
                        begun, last = True, info.name
                        yield info
                return
            except TransientError as error:
                if begun and not ordered:  # nobody can tell what is still to come
                    raise
                await backoff.wait(error)

    async def list_turns(self, turns: Sequence[Sequence[str]]) -> Listings:
        try:
            found = await self.inner.list_turns(turns)
        except TransientError as error:
            if self._on_retry is not None:
                self._on_retry("list", error)
            # One by one, each as often as need be: of a long one that broke off only the rest is listed again.
            return await Connector.list_turns(self, turns)
        self._reached = True
        return found

    async def stat(self, name: str) -> ObjectInfo:
        return await self._repeat(f"stat {name}", lambda _: self.inner.stat(name))

    async def delete(self, name: str) -> None:
        await self._repeat(f"delete {name}", lambda _: self.inner.delete(name))

    async def _repeat(self, what: str, call: Callable[[int], Awaitable[T]]) -> T:
        backoff = _Backoff(self, what)
        while True:
            try:
                result = await call(backoff.failures)
            except TransientError as error:
                await backoff.wait(error)
            except ConnectorError:
                self._reached = True  # a refusal is an answer
                raise
            else:
                self._reached = True
                return result

    async def _is_there(self, name: str, body: Sequence[Buffer]) -> bool:
        """Whether the object is the one that was being put, byte for byte."""
        try:
            size_bytes = (await self.inner.stat(name)).size_bytes
            if size_bytes != sum(map(len, body)):
                return False
            offset = 0
            for part in body:
                for at in range(0, len(part), _COMPARE_BYTES):
                    piece = memoryview(part)[at : at + _COMPARE_BYTES]
                    if await self.inner.get(name, offset=offset, length=len(piece)) != piece:
                        return False
                    offset += len(piece)
        except NotFound:
            return False
        return True


class _Backoff:
    """The failures of one call so far, and how long to wait after the next."""

    def __init__(self, connector: RetryConnector, what: str) -> None:
        self._connector, self._what = connector, what
        self._deadline = 0.0
        self.failures = 0

    async def wait(self, error: TransientError) -> None:
        """Wait before the next try.

        :raises TransientError: `error`, if it is time to give up
        """
        now, patience_s = anyio.current_time(), self._connector._give_up_s
        if not self._connector._reached:
            patience_s = min(patience_s, FIRST_GIVE_UP_S)
        if not self.failures:
            self._deadline = now + patience_s
        longest = min(self._connector._first_wait_s * 2**self.failures, MAX_WAIT_S)
        delay_s = random.uniform(longest / 2, longest)
        self.failures += 1
        if now + delay_s > self._deadline:
            raise error
        if self._connector._on_retry is not None:
            self._connector._on_retry(self._what, error)
        await anyio.sleep(delay_s)
