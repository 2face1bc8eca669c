"""A TCP proxy that does to connections what bad networks do: it delays, cuts and swallows."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_READ_BYTES = 1 << 16


class Proxy:
    """Passes connections to `port` on `target_host` on, as an asynchronous context manager; its own port is `port`.

    What can be changed at any time: `delay_s` is how long bytes are under way (each direction; they stay in order, and
    many are under way at once), `blackhole` swallows everything and says nothing, `cut_answers` lets requests through
    and resets the connection when the answer comes, `cut_after_bytes` resets each new connection after so many bytes
    in both directions together, `refuse` closes new ones at once. `connections` counts those that were made,
    `passed_bytes` what went through.
    """

    def __init__(self, target_port: int, target_host: str = "127.0.0.1", *, delay_s: float = 0.0) -> None:
        self._target = (target_host, target_port)
        self.delay_s = delay_s
        self.blackhole = self.refuse = self.cut_answers = False
        self.cut_after_bytes: int | None = None
        self.connections = self.passed_bytes = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        while self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Reset every connection that is open now."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        other: asyncio.StreamWriter | None = None
        try:
            if self.refuse:
                return
            with suppress(OSError):
                answers, other = await asyncio.open_connection(*self._target)
                self._writers.add(other)
                left = [self.cut_after_bytes]
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._pass_on(reader, other, left))
                    tasks.create_task(self._pass_on(answers, writer, left, are_answers=True))
        except (asyncio.CancelledError, ExceptionGroup):
            pass  # cut, or the proxy ends: both sides are closed below
        finally:
            for each in (writer, other):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()
            self._tasks.discard(task)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: list[int | None],
        *,
        are_answers: bool = False,
    ) -> None:
        """One direction. Bytes wait in a queue, with the time at which they arrive."""
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def deliver() -> None:
            while True:
                due, data = await under_way.get()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                if not data:
                    with suppress(OSError):
                        writer.write_eof()
                    return
                if self.blackhole:
                    continue
                if self.cut_answers and are_answers:
                    raise ConnectionResetError
                if left[0] is not None:
                    data = data[: left[0]]
                    left[0] -= len(data)
                writer.write(data)
                self.passed_bytes += len(data)
                await writer.drain()
                if left[0] == 0:
                    raise ConnectionResetError

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deliver())
            data = b"."
            while data:
                data = await reader.read(_READ_BYTES)
                await under_way.put((loop.time() + self.delay_s, data))
