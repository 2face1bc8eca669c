"""Blocking calls in threads, for connectors whose library blocks."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from anyio import CancelScope, CapacityLimiter

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


async def outlast(future: asyncio.Future[T]) -> T:
    """The result of a future, only when it is there, however the task is cancelled meanwhile.

    :raises asyncio.CancelledError: then, if it was, whatever the result
    """
    cancelled: asyncio.CancelledError | None = None
    # The shield keeps anyio from delivering a cancellation over and over while a thread is at work.
    with CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        future.exception()  # marks it as seen: the cancellation is what the caller learns of
        raise cancelled
    return future.result()


class Threads:
    """At most `limit` blocking calls at a time, each of which is over when `run` returns or raises.

    That holds however the caller is cancelled: a thread that still reads a buffer while its owner fills it anew would
    store garbage. `anyio.to_thread` waits when an anyio scope is cancelled, but not when a task is (`asyncio.timeout`,
    `Task.cancel`); this does both. A call that still waits for its turn is given up at once.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limiter = CapacityLimiter(limit)
        self._pool = ThreadPoolExecutor(limit, thread_name_prefix=name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `call` returns, or raise what it raises."""
        async with self._limiter:
            return await outlast(asyncio.wrap_future(self._pool.submit(call, *args, **kwargs)))

    def close(self) -> None:
        """End the threads; no call may be under way."""
        self._pool.shutdown(wait=False)
