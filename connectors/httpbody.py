"""Bodies of requests: sent piece by piece from the caller's buffers, under a deadline that moves along."""

from __future__ import annotations

import asyncio
import hashlib
import os
import zlib
from base64 import b64encode
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from coffret.connectors.limit import Pace

# How much goes to the connection at a time. It is copied, so that nothing refers to the caller's buffer once a request
# is over, however it ended: 4 % of the time that a put takes over loopback.
_PIECE_BYTES = 256 << 10
_PACED_PIECE_BYTES = 16 << 10


class Watch:
    """The deadline of a request: `stall_s` after the last byte that moved (s)."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self.scope = anyio.CancelScope(deadline=anyio.current_time() + stall_s)

    def moved(self, *, times: int = 1) -> None:
        """Something moved; what comes next may take `times` as long as a stall."""
        self.scope.deadline = anyio.current_time() + times * self._stall_s

    async def outside(self, waiting: Awaitable[None]) -> None:
        """Wait for something that is not the server's."""
        self.scope.deadline = float("inf")
        await waiting
        self.moved()


class Body:
    """A request's body over the caller's buffers, a file for botocore (length, hash), an iterable for aiohttp.

    It goes out once: a request that was repeated below us, after its answer was lost, would find its own object and
    take it for that of somebody else. botocore's `seek` before each request it makes winds it back.
    """

    def __init__(self, views: Sequence[memoryview], watch: Watch, pace: Pace | None, sha256_hex: str | None) -> None:
        self._views, self._size_bytes = list(views), sum(map(len, views))
        self.watch, self.sha256_hex = watch, sha256_hex
        self._pace = pace if pace and pace.upload.limited else None
        self._piece_bytes = _PACED_PIECE_BYTES if self._pace else _PIECE_BYTES
        self._begun = self._released = False
        #: Whether all of it has gone to the connection.
        self.finished = False
        self._index = self._at = self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """To the begin or the end: nothing else is asked for."""
        self._position = self._size_bytes if whence == os.SEEK_END else offset
        self._begun, self.finished, self._index, self._at = False, False, 0, 0
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        """All that is left: what botocore would hash if it had to."""
        data = b"".join(self._views)[self._position :]
        self._position = self._size_bytes
        return data

    def release(self) -> None:
        """Let go of the caller's buffers.

        Whoever would still send is told that it failed: a connection on which less has gone than was announced must
        never be used again, since the next request would be taken for the rest.
        """
        self._begun, self._released, self._index, self._views = True, True, 0, []

    def __aiter__(self) -> Body:
        if self._begun:
            raise ConnectionResetError("the connection was closed before an answer came")
        return self

    async def __anext__(self) -> bytes:
        if self._released and not self.finished:
            raise ConnectionResetError("the request was over before its body had gone")
        while self._index < len(self._views) and self._at == len(self._views[self._index]):
            self._index, self._at = self._index + 1, 0
        self._begun = True
        if self._index == len(self._views):
            self.finished = True
            self.watch.moved(times=2)
            raise StopAsyncIteration
        piece = bytes(self._views[self._index][self._at : self._at + self._piece_bytes])
        self._at += len(piece)
        if self._pace is not None:
            await self.watch.outside(self._pace.upload.take(len(piece)))
        # A server that refuses early hangs up on the rest. Look for its answer before the next write fails and takes
        # it away.
        await asyncio.sleep(0)
        self.watch.moved()
        return piece


def sha256_hex(views: Sequence[memoryview]) -> str:
    """The hash of a body, as a signature contains it."""
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.hexdigest()


def crc32_base64(views: Sequence[memoryview]) -> str:
    """The checksum of a body, as a header carries it."""
    checksum = 0
    for view in views:
        checksum = zlib.crc32(view, checksum)
    return b64encode(checksum.to_bytes(4, "big")).decode()
