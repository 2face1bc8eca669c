"""Bounded channels between stages: they count bytes as well as items, so that memory is bounded whatever the data.

A sender waits while the channel holds `max_items`, or while the item would exceed `max_bytes` (one item always fits,
however large). Ends are context managers: leaving `sender()` closes one sending end, and when all are closed the
receivers see the end.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import msgspec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

T = TypeVar("T")


async def together(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Run calls at the same time; return what each returns, in order.

    If one fails the others are cancelled, and its error is raised as it is, in no group.
    """
    results: list[Any] = [None] * len(calls)
    failures: list[Exception] = []

    async def run(number: int, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            results[number] = await call()
        except Exception as error:
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for number, call in enumerate(calls):
            group.start_soon(run, number, call)
    if failures:
        raise failures[0]
    return results


class Waiters:
    """Tasks waiting for one kind of event; each wake-up reaches exactly one that still waits."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: deque[anyio.Event] = deque()

    def wake(self, count: int = 1) -> None:
        """Let up to `count` of the longest waiting go on."""
        while count and self._events:
            self._events.popleft().set()
            count -= 1

    def wake_all(self) -> None:
        """Let all go on."""
        self.wake(len(self._events))

    async def wait(self) -> None:
        """Wait for a wake-up; one received while being cancelled is passed on."""
        event = anyio.Event()
        self._events.append(event)
        try:
            await event.wait()
        except BaseException:
            if event.is_set():
                self.wake()
            else:
                self._events.remove(event)
            raise


class ChannelStatistics(msgspec.Struct):
    """What went through a channel: where a pipeline waits shows which stage holds it up."""

    name: str
    items: int = 0
    size_bytes: int = 0
    peak_items: int = 0
    peak_bytes: int = 0
    sender_wait_s: float = 0.0
    receiver_wait_s: float = 0.0


class Channel(Generic[T]):
    """A queue bounded in items and bytes, with any number of senders and receivers in one event loop."""

    def __init__(self, name: str, *, max_items: int, max_bytes: int, size: Callable[[T], int]) -> None:
        self.statistics = ChannelStatistics(name)
        self._max_items, self._max_bytes, self._size = max_items, max_bytes, size
        self._queue: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._senders = 0
        self._ended = False
        self._readable, self._writable = Waiters(), Waiters()

    @property
    def idle(self) -> bool:
        """Whether a receiver would have to wait now."""
        return not self._queue

    def sender(self) -> Sender[T]:
        """A sending end; close it (or leave its context) when nothing more comes from it."""
        self._senders += 1
        return Sender(self)

    async def send(self, item: T) -> None:
        """Put an item in, waiting for room."""
        size, queue, statistics = self._size(item), self._queue, self.statistics
        if queue and (self._bytes + size > self._max_bytes or len(queue) >= self._max_items):
            begin = perf_counter()
            while queue and (self._bytes + size > self._max_bytes or len(queue) >= self._max_items):
                await self._writable.wait()
            statistics.sender_wait_s += perf_counter() - begin
        queue.append((item, size))
        self._bytes += size
        statistics.items += 1
        statistics.size_bytes += size
        statistics.peak_items = max(statistics.peak_items, len(queue))
        statistics.peak_bytes = max(statistics.peak_bytes, self._bytes)
        self._readable.wake()

    async def receive(self) -> T:
        """Take the oldest item.

        :raises anyio.EndOfStream: if all sending ends are closed and nothing is left
        """
        if not self._queue:
            begin = perf_counter()
            while not self._queue:
                if self._ended:
                    raise anyio.EndOfStream
                await self._readable.wait()
            self.statistics.receiver_wait_s += perf_counter() - begin
        return self._take()

    def receive_more(self, most: int) -> list[T]:
        """Take what is there already, up to `most` items, without waiting."""
        return [self._take() for _ in range(min(most, len(self._queue)))]

    def _take(self) -> T:
        item, size = self._queue.popleft()
        self._bytes -= size
        # The room may be enough for several waiting senders; each looks for itself.
        self._writable.wake_all()
        return item

    def __aiter__(self) -> Channel[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    def _close_sender(self) -> None:
        self._senders -= 1
        if self._senders == 0:
            self._ended = True
            self._readable.wake_all()


class Sender(Generic[T]):
    """One sending end of a channel."""

    __slots__ = ("_channel", "_open")

    def __init__(self, channel: Channel[T]) -> None:
        self._channel, self._open = channel, True

    async def send(self, item: T) -> None:
        """Put an item in, waiting for room."""
        await self._channel.send(item)

    def close(self) -> None:
        """Nothing more comes from this end."""
        if self._open:
            self._open = False
            self._channel._close_sender()

    def __enter__(self) -> Sender[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the receivers must not take what is there for everything: the task group cancels them.
        if error is None:
            self.close()
