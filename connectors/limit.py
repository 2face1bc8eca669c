"""A connector that holds transfers down to a rate, over all connections together.

A token bucket a direction (bytes): who wants to move bytes takes them from the bucket, and waits while it is in debt.
Connectors that move an object in pieces ask for each piece (`Connector.pace`), so that the line is used evenly; for
others a whole object is paid for before it is moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from coffret.connectors.wrapper import Wrapper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.connectors.base import Buffer, Connector

# How much may be moved at once after a pause (s of the rate).
_BURST_S = 0.25


class Bucket:
    """Lets `bytes_per_s` through, first come first served; None: everything."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        # Until when, by the loop's clock, the line is taken.
        self._taken_until = 0.0

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self._rate is not None

    async def take(self, size_bytes: int) -> None:
        """Wait as long as a line of this rate takes to move these bytes, after those that were asked for before."""
        if self._rate is None:
            return
        now = anyio.current_time()
        self._taken_until = max(self._taken_until, now - _BURST_S) + size_bytes / self._rate
        if self._taken_until > now:
            await anyio.sleep(self._taken_until - now)


class Pace:
    """What a connector asks before it moves bytes: `await pace.upload.take(n)`, `pace.download`."""

    def __init__(self, upload_bytes_per_s: float | None = None, download_bytes_per_s: float | None = None) -> None:
        self.upload, self.download = Bucket(upload_bytes_per_s), Bucket(download_bytes_per_s)


class LimitConnector(Wrapper):
    """Holds `inner` to `upload` and `download` bytes per second; None is no limit."""

    def __init__(self, inner: Connector, *, upload: float | None = None, download: float | None = None) -> None:
        super().__init__(inner)
        self._pace = Pace(upload, download)
        # One that paces itself takes from the same buckets, piece by piece.
        self._whole = not inner.set_pace(self._pace)

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        if self._whole:
            await self._pace.upload.take(sum(map(len, body)))
        await self.inner.put(name, body, if_absent=if_absent)

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        data = await self.inner.get(name, offset=offset, length=length)
        if self._whole:
            await self._pace.download.take(len(data))
        return data

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        data = await self.inner.peek(name, limit_bytes)
        if self._whole:
            await self._pace.download.take(len(data))
        return data

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if self._whole:
            await self._pace.download.take(len(buffer))
        await self.inner.get_into(name, offset, buffer)
