"""The connections of a server: how many there may be, how long one may say nothing, what malformed ones are told."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import anyio
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from coffret.connectors.httpwire import BUG, REQUEST
from coffret.engine.server.answers import refusal_response
from coffret.engine.server.limits import address_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from coffret.engine.server.limits import Limits

# What a connection may send before a token has been seen: two of these, and what the kernel hands over at once.
_READ_BUFFER_BYTES = 64 << 10
# At the end: for requests that are cut off, and for answers on their way.
_CUT_S, _FLUSH_S = 0.05, 3.0
_MAX_LINE_BYTES, _MAX_FIELD_BYTES, _MAX_HEADERS = 4096, 4096, 64


class Connections(web.Server):
    """aiohttp's server, with limits. `on_note` is told what whoever runs it should know, in one line."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: Limits,
        on_note: Callable[[str], None],
    ) -> None:
        super().__init__(
            handler,
            access_log=None,
            keepalive_timeout=limits.keepalive_s,
            lingering_time=limits.linger_s,
            read_bufsize=_READ_BUFFER_BYTES,
            auto_decompress=False,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_FIELD_BYTES,
            max_headers=_MAX_HEADERS,
        )
        self.on_note = on_note
        self._limits = limits
        # Those who have not shown a good token: whom they count for, and the end of our patience.
        self._unknown: dict[RequestHandler, tuple[str, asyncio.TimerHandle]] = {}
        self._transports: dict[RequestHandler, asyncio.Transport] = {}
        self._gone = anyio.Event()

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._transports[handler] = transport
        address = address_of(transport.get_extra_info("peername"))
        unknown = sum(address == other for other, _ in self._unknown.values())
        patience = self._loop.call_later(self._limits.header_s, transport.abort)
        self._unknown[handler] = (address, patience)
        if len(self._transports) > self._limits.connections or unknown >= self._limits.unknown_connections:
            transport.abort()
            return
        # A peer that is gone without a word is noticed while an answer is sent, too.
        with suppress(OSError, AttributeError):
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.stall_s * 1000)
            )

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self.welcome(handler)
        self._transports.pop(handler, None)
        self._gone.set()

    def welcome(self, handler: RequestHandler) -> None:
        """A connection has shown a good token, or is over."""
        _, patience = self._unknown.pop(handler, ("", None))
        if patience is not None:
            patience.cancel()

    def close_idle(self, busy: set[RequestHandler]) -> None:
        """Close the connections on which nothing is asked at the moment."""
        for handler in self.connections:
            if handler not in busy:
                handler.force_close()

    async def end(self) -> None:
        """Close all connections; return when what was still to be sent is, or nobody takes it."""
        await self.shutdown(_CUT_S)
        with anyio.move_on_after(_FLUSH_S):
            while self._transports:
                self._gone = anyio.Event()
                await self._gone.wait()
        for transport in self._transports.values():
            transport.abort()


class _Connection(RequestHandler):
    """One connection. Errors become a line in the log and a plain answer, never a traceback."""

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        error = kwargs.get("exc_info")
        text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(args[:1])
        self._note(f"a request failed: {text}")

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # the client is gone
        if status >= 500:
            self.log_exception(exc_info=exc)
            return refusal_response(BUG, "the server failed; its log says more", close=True)
        return refusal_response(REQUEST, "not a request as HTTP has it", close=True)

    def _note(self, text: str) -> None:
        manager = cast("Connections | None", self._manager)
        if manager is not None:
            manager.on_note(" ".join(text.split())[:500])
