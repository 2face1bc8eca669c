"""A connector that counts what goes through it: calls, bytes, failures and latencies, by method."""

from __future__ import annotations

import time
from bisect import bisect_left
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import msgspec

from coffret.connectors.wrapper import Wrapper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from coffret.connectors.base import Arriving, Buffer, Connector, Listings, ObjectInfo

# Upper bounds of the classes that latencies are counted in (s): each is a quarter above the one before, from 0.1 ms on.
_BOUNDS_S = [0.0001 * 1.25**step for step in range(64)]


class Calls(msgspec.Struct):
    """What one method has done: `failed` of `calls` raised, `size_bytes` were moved, `total_s` were spent in all."""

    calls: int = 0
    failed: int = 0
    size_bytes: int = 0
    total_s: float = 0.0
    _classes: list[int] = msgspec.field(default_factory=lambda: [0] * (len(_BOUNDS_S) + 1))

    def add(self, duration_s: float) -> None:
        """Count a call that took this long."""
        self.calls += 1
        self.total_s += duration_s
        self._classes[bisect_left(_BOUNDS_S, duration_s)] += 1

    @property
    def fastest_s(self) -> float:
        """The shortest latency, to a quarter (s); that of a call that failed counts too."""
        return self.latency_s(1 / self.calls) if self.calls else _BOUNDS_S[-1]

    def latency_s(self, share: float) -> float:
        """The latency that a share of the calls did not exceed, to a quarter (s)."""
        left = share * self.calls
        for bound, count in zip(_BOUNDS_S, self._classes, strict=False):
            left -= count
            if left <= 0:
                return bound
        return _BOUNDS_S[-1]


class _Moved(msgspec.Struct):
    """What one call has moved."""

    size_bytes: int = 0


class TraceConnector(Wrapper):
    """Counts in `calls`, by method; `on_call` is told (method, name, bytes, seconds, error or "") of each."""

    def __init__(self, inner: Connector, *, on_call: Callable[[str, str, int, float, str], None] | None = None) -> None:
        super().__init__(inner)
        self.calls: dict[str, Calls] = {}
        self._on_call = on_call

    async def create(self) -> None:
        with self._counted("create", ""):
            await self.inner.create()

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        with self._counted("put", name) as moved:
            await self.inner.put(name, body, if_absent=if_absent)
            moved.size_bytes = sum(map(len, body))

    async def put_arriving(self, name: str, body: Arriving, *, if_absent: bool = False) -> None:
        """As `inner`; the time counted is also that in which the body came in."""
        with self._counted("put", name) as moved:
            await self.inner.put_arriving(name, body, if_absent=if_absent)
            moved.size_bytes = len(body.view)

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self._counted("get", name) as moved:
            data = await self.inner.get(name, offset=offset, length=length)
            moved.size_bytes = len(data)
        return data

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        with self._counted("get", name) as moved:
            await self.inner.get_into(name, offset, buffer)
            moved.size_bytes = len(buffer)

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        with self._counted("get", name) as moved:
            data = await self.inner.peek(name, limit_bytes)
            moved.size_bytes = len(data)
        return data

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """As `inner`; the time counted is that of the whole listing, with what the caller does in between."""
        with self._counted("list", prefix):
            async for info in self.inner.list(prefix):
                yield info

    async def list_turns(self, turns: Sequence[Sequence[str]]) -> Listings:
        """As `inner`; each of the listings counts, with the time of all."""
        with ExitStack() as stack:
            for prefix in (prefix for turn in turns for prefix in turn):
                stack.enter_context(self._counted("list", prefix))
            return await self.inner.list_turns(turns)

    async def stat(self, name: str) -> ObjectInfo:
        with self._counted("stat", name):
            return await self.inner.stat(name)

    async def delete(self, name: str) -> None:
        with self._counted("delete", name):
            await self.inner.delete(name)

    @contextmanager
    def _counted(self, method: str, name: str) -> Iterator[_Moved]:
        counted, moved, begin, error = self.calls.setdefault(method, Calls()), _Moved(), time.perf_counter(), ""
        try:
            yield moved
        except BaseException as raised:
            counted.failed += 1
            error = type(raised).__name__
            raise
        finally:
            duration_s = time.perf_counter() - begin
            counted.add(duration_s)
            counted.size_bytes += moved.size_bytes
            if self._on_call is not None:
                self._on_call(method, name, moved.size_bytes, duration_s, error)
