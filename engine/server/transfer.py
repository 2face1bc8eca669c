"""Bodies and answers, moved piece by piece, each under a deadline: nobody holds a connection by being slow."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

from coffret.connectors import httpwire
from coffret.engine.server.answers import ClientGone, Refused

if TYPE_CHECKING:
    from coffret.connectors.httpwire import Refusal
    from coffret.connectors.limit import Pace
    from coffret.engine.server.arrival import Arrival
    from coffret.engine.server.limits import Limits

# How much of an object is handed to the connection at a time, and read from it.
_SENT_BYTES, _READ_BYTES = 1 << 20, 1 << 20
# The same where there is a limit, so that the line is used evenly.
_PACED_BYTES = 32 << 10


class Transfer:
    """Moves bytes within the limits, and not faster than `pace` allows."""

    def __init__(self, limits: Limits, pace: Pace | None = None) -> None:
        self._limits = limits
        self._upload = pace.upload if pace and pace.upload.limited else None
        self._download = pace.download if pace and pace.download.limited else None

    async def receive(self, request: web.BaseRequest, arrival: Arrival) -> None:
        """Take in the body of a request, to its end.

        :raises ClientGone: if the client is
        :raises Refused: if it takes too long
        """
        size_bytes = len(arrival.view)
        if not size_bytes:
            return
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        if self._upload is None:
            request.content.set_read_chunk_size(_READ_BYTES)
        now = asyncio.get_running_loop().time
        end = now() + self._limits.transfer_s(size_bytes)
        try:
            async with asyncio.timeout(None) as deadline:
                while arrival.size_bytes < size_bytes:
                    deadline.reschedule(min(end, now() + self._limits.stall_s))
                    piece = await request.content.readany()
                    if not piece:
                        raise ClientGone
                    arrival.grow(piece)
                    if self._upload is not None:
                        deadline.reschedule(None)
                        await self._upload.take(len(piece))
        except TimeoutError:
            raise Refused(httpwire.SLOW, "the body came too slowly", close=True) from None
        except (web.RequestPayloadError, OSError) as error:
            raise ClientGone from error

    async def send(self, request: web.BaseRequest, response: web.StreamResponse, data: bytes) -> web.StreamResponse:
        """Send an answer with this body, or with its last bytes; to its end.

        :raises ClientGone: if the client is, or takes too long
        """
        if not response.prepared and not response.chunked:
            response.content_length = len(data)
        now, view = asyncio.get_running_loop().time, memoryview(data)
        piece_bytes = _SENT_BYTES if self._download is None else _PACED_BYTES
        try:
            async with asyncio.timeout(self._limits.stall_s) as deadline:
                if not response.prepared:
                    await response.prepare(request)
                for at in range(0, len(data), piece_bytes):
                    if self._download is not None:
                        deadline.reschedule(None)
                        await self._download.take(min(piece_bytes, len(data) - at))
                    deadline.reschedule(now() + self._limits.transfer_s(piece_bytes))
                    await response.write(view[at : at + piece_bytes])
                deadline.reschedule(now() + self._limits.transfer_s(_SENT_BYTES))
                await response.write_eof()
        except TimeoutError:
            cut(request)
            raise ClientGone from None
        return response

    async def finish(self, request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
        """Send an answer that is complete.

        :raises ClientGone: if the client is, or takes too long
        """
        try:
            async with asyncio.timeout(self._limits.stall_s):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            cut(request)
            raise ClientGone from None
        return response


def cut(request: web.BaseRequest) -> None:
    """Cut the connection of a request at once, with whatever is under way on it."""
    if request.transport is not None:
        request.transport.abort()


class Patience:
    """The time that the storage has for an answer (s): `asyncio.timeout`, whose end is a refusal."""

    def __init__(self, patience_s: float, refusal: Refusal) -> None:
        self._timeout, self._refusal = asyncio.timeout(patience_s), refusal

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        """
        :raises Refused: if it is over
        """
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise Refused(self._refusal, "the storage takes too long") from None
