"""Requests: who asks, what for, and whether the token gives the right to it. docs/server.md has the routes.

A request is refused before its body is read wherever it can be.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio
import msgspec
from aiohttp import HttpVersion11, web

from coffret.connectors import httpwire
from coffret.connectors.base import APPEND_ONLY, FULL, READ_ONLY, valid_name, valid_prefix
from coffret.connectors.errors import ConnectorError
from coffret.engine.errors import CoffretError
from coffret.engine.server.access import AppendOnly, NoRight, addition, max_bytes
from coffret.engine.server.answers import ClientGone, Refused, done_response, refusal_response, stream_response
from coffret.engine.server.arrival import Arrival, meanwhile
from coffret.engine.server.limits import Tries, address_of
from coffret.engine.server.room import NoRoom, Room
from coffret.engine.server.tokens import Token
from coffret.engine.server.transfer import Patience, Transfer, cut

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.web_protocol import RequestHandler

    from coffret.connectors.base import Connector, ObjectInfo
    from coffret.connectors.limit import Pace
    from coffret.engine.server.attempts import Attempts
    from coffret.engine.server.limits import Limits
    from coffret.engine.server.tokens import TokenFile

# What a client does best with a server: three puts at a time hide the way there and back; ranges of 3 MiB need more.
_PARALLEL_PUTS, _PARALLEL_GETS = 3, 16
# Lines of a listing are gathered.
_LINES_BYTES = 32 << 10
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")
_LENGTH = re.compile(r"[0-9]{1,18}")
_LOCAL_HOST = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
# Who asks where no token is wanted.
_ANYONE = Token("", "", FULL, "", "")


class Exchange(msgspec.Struct):
    """A request and what came of it. `token_id`: "" if it showed no good one; bytes are those of objects."""

    method: str
    path: str
    address: str
    token_id: str = ""
    status: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    duration_s: float = 0.0


class App:
    """Answers requests for the objects of one storage; `handle` is what a server calls.

    `tokens`: None if nobody needs one. `on_note` is told what whoever runs the server should know, `on_exchange` of
    each request when it is over. `pace` holds all clients together to a rate. `welcome` is called with a connection
    that has shown a good token.
    """

    def __init__(
        self,
        connector: Connector,
        tokens: TokenFile | None,
        attempts: Attempts,
        limits: Limits,
        *,
        on_note: Callable[[str], None],
        on_exchange: Callable[[Exchange], None] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._connector, self._tokens, self._limits = connector, tokens, limits
        self._transfer = Transfer(limits, pace)
        self._append_only = AppendOnly(connector, attempts)
        self._on_note, self._on_exchange = on_note, on_exchange
        self._tries = Tries()
        self._state_told = ""
        self.room = Room(limits.memory_bytes)
        self.welcome: Callable[[RequestHandler], None] = lambda _: None
        #: Connections with a request under way.
        self.busy: set[RequestHandler] = set()
        self.requests = 0
        self._stopping, self._quiet = False, anyio.Event()

    async def stop(self) -> None:
        """Refuse what is asked from now on; return when nothing is under way any more."""
        self._stopping = True
        if self.busy:
            await self._quiet.wait()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to a request, which has been sent."""
        begin, connection = time.perf_counter(), request.protocol
        exchange = Exchange(request.method[:20], request.raw_path[:1000], address_of(connection.peername))
        self.busy.add(connection)
        self.requests += 1
        try:
            response = await self._answered(request, exchange)
            exchange.status = response.status
            return response
        finally:
            self.busy.discard(connection)
            if self._stopping and not self.busy:
                self._quiet.set()
            exchange.duration_s = time.perf_counter() - begin
            if self._on_exchange is not None:
                self._on_exchange(exchange)

    async def _answered(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        try:
            token = self._identify(request, exchange)
            return await self._route(request, token, exchange)
        except Refused as error:
            answer = error.refusal, str(error), error.close
        except NoRight as error:
            answer = httpwire.RIGHT, str(error), False
        except NoRoom:
            answer = httpwire.BUSY, "too much is under way at the moment", False
        except ConnectorError as error:
            refusal = httpwire.refusal_of(error)
            if refusal.status >= 500:
                self._on_note(f"the storage fails: {error}")
            answer = refusal, str(error), False
        except (CoffretError, OSError) as error:
            if isinstance(error, ConnectionError):
                raise  # it is the client's
            self._tell_state(str(error))
            answer = httpwire.STATE, "the server can't use its own files; its log says more", False
        refusal, message, close = answer
        return await self._transfer.finish(request, refusal_response(refusal, message, close=close or self._stopping))

    # Who asks ---------------------------------------------------------------------------------------------------------

    def _identify(self, request: web.BaseRequest, exchange: Exchange) -> Token:
        """
        :raises Refused: if nobody does who may
        """
        if request.version < HttpVersion11:
            raise Refused(httpwire.REQUEST, "this takes HTTP/1.1", close=True)
        if self._stopping:
            raise Refused(httpwire.BUSY, "the server is being stopped", close=True)
        if self._tokens is None:
            self._check_local(request)
            self.welcome(request.protocol)
            return _ANYONE
        given = request.headers.getall("Authorization", [])
        scheme, _, text = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        token = self._tokens.find(text.strip()) if scheme.lower() == "bearer" else None
        if token is None:
            if self._tries.failed(exchange.address):
                raise Refused(httpwire.TRIES, "too many wrong tokens came from this address", close=True)
            self._on_note(f"{exchange.address}: {'a wrong token' if given else 'no token'}")
            raise Refused(httpwire.TOKEN, "a token is needed, and this is none of them", close=True)
        self._state_told = ""
        exchange.token_id = token.token_id
        self.welcome(request.protocol)
        return token

    def _check_local(self, request: web.BaseRequest) -> None:
        """Where no token is wanted: that no page in a browser of this machine asks, whatever its name resolves to.

        :raises Refused: if one may
        """
        if "Origin" in request.headers or not _LOCAL_HOST.fullmatch(request.headers.get("Host", "")):
            raise Refused(httpwire.RIGHT, "without tokens this is for programs on this machine alone", close=True)

    def _tell_state(self, text: str) -> None:
        """Note what is wrong with the server's own files, once."""
        if text != self._state_told:
            self._state_told = text
            self._on_note(text)

    # What for ---------------------------------------------------------------------------------------------------------

    async def _route(self, request: web.BaseRequest, token: Token, exchange: Exchange) -> web.StreamResponse:
        method, path = request.method, request.raw_path
        if path == httpwire.ROOT:
            _check_method(method, ("GET",))
            return await self._tell_info(request, token)
        if path == httpwire.CREATE:
            _check_method(method, ("POST",))
            return await self._create(request, token)
        if path.startswith(f"{httpwire.OBJECTS}?"):
            _check_method(method, ("GET",))
            return await self._list(request, path, exchange)
        if not path.startswith(f"{httpwire.OBJECTS}/"):
            raise Refused(httpwire.NO_ROUTE, "there is nothing here")
        name = valid_name(path[len(httpwire.OBJECTS) + 1 :])
        _check_method(method, ("GET", "HEAD", "PUT", "DELETE"))
        if method == "GET":
            return await self._get(request, name, exchange)
        if method == "HEAD":
            return await self._stat(request, name)
        if method == "PUT":
            return await self._put(request, name, token, exchange)
        return await self._delete(request, name, token)

    async def _tell_info(self, request: web.BaseRequest, token: Token) -> web.StreamResponse:
        told = self._connector.capabilities
        info = {
            "protocol": httpwire.PROTOCOL,
            "right": token.right,
            "capabilities": {
                "parallel_puts": max(told.parallel_puts, _PARALLEL_PUTS),
                "parallel_gets": max(told.parallel_gets, _PARALLEL_GETS),
                "coalesce_gap_bytes": told.coalesce_gap_bytes,
                "exclusive_puts": told.exclusive_puts,
                "ordered_lists": told.ordered_lists,
            },
            "notes": list(self._connector.notes),
        }
        response = stream_response(200, "application/json")
        return await self._transfer.send(request, response, json.dumps(info).encode())

    async def _create(self, request: web.BaseRequest, token: Token) -> web.StreamResponse:
        if token.right != FULL:
            raise NoRight(f"this token is {token.right}: a repository is created with a full one")
        async with Patience(self._limits.put_s, httpwire.BUSY):
            await self._connector.create()
        return await self._transfer.finish(request, done_response())

    async def _stat(self, request: web.BaseRequest, name: str) -> web.StreamResponse:
        async with Patience(self._limits.storage_s, httpwire.BUSY):
            info = await self._connector.stat(name)
        response = stream_response(200, "application/octet-stream", Coffret_Modified=repr(info.mtime_s))
        response.content_length = info.size_bytes
        return await self._transfer.finish(request, response)

    async def _get(self, request: web.BaseRequest, name: str, exchange: Exchange) -> web.StreamResponse:
        first, last = _range(request)
        if last is None:
            async with Patience(self._limits.storage_s, httpwire.BUSY):
                size_bytes = max(0, (await self._connector.stat(name)).size_bytes - first)
        else:
            size_bytes = last - first + 1
        if size_bytes > self.room.size_bytes:
            raise Refused(httpwire.TOO_LARGE, f"{name}: {size_bytes} bytes are more than this server moves at once")
        async with self.room.taken(size_bytes, self._limits.room_wait_s):
            async with Patience(self._limits.storage_s, httpwire.BUSY):
                # At once, so that it is all of one object even if that is replaced meanwhile.
                data = await self._connector.get(name, offset=first, length=None if last is None else size_bytes)
            if first == 0 and last is None:
                response = stream_response(200, "application/octet-stream")
            elif not data:
                raise Refused(httpwire.WORDS["range"], f"{name} has no bytes from {first} on")
            else:
                response = stream_response(
                    206, "application/octet-stream", Content_Range=f"bytes {first}-{first + len(data) - 1}/*"
                )
            exchange.sent_bytes = len(data)
            return await self._transfer.send(request, response, data)

    async def _put(self, request: web.BaseRequest, name: str, token: Token, exchange: Exchange) -> web.StreamResponse:
        if token.right == READ_ONLY:
            raise NoRight(f"this token is read-only: it may not put {name}")
        wanted = addition(name) if token.right == APPEND_ONLY else None
        condition = request.headers.getall("If-None-Match", [])
        if condition not in ([], ["*"]):
            raise Refused(httpwire.REQUEST, "If-None-Match can only be *")
        size_bytes = _content_length(request)
        if size_bytes > min(max_bytes(name), self.room.size_bytes):
            raise Refused(httpwire.TOO_LARGE, f"{name}: {size_bytes} bytes are more than any such object may have")
        async with self.room.buffer(size_bytes, self._limits.room_wait_s) as view:
            arrival = Arrival(view)
            if wanted is not None:
                put = self._append_only.put(wanted, arrival, token.hash, if_absent=bool(condition))
            else:
                put = self._connector.put_arriving(name, arrival, if_absent=bool(condition))
            async with meanwhile(put) as stored:
                await self._transfer.receive(request, arrival)
                exchange.received_bytes = size_bytes
                async with Patience(self._limits.put_s, httpwire.WORDS["lost"]):
                    await stored
        return await self._transfer.finish(request, done_response())

    async def _delete(self, request: web.BaseRequest, name: str, token: Token) -> web.StreamResponse:
        if token.right == READ_ONLY:
            raise NoRight(f"this token is read-only: it may not delete {name}")
        async with Patience(self._limits.storage_s, httpwire.WORDS["lost"]):
            if token.right == APPEND_ONLY:
                await self._append_only.delete(name, token.hash)
            else:
                await self._connector.delete(name)
        return await self._transfer.finish(request, done_response())

    async def _list(self, request: web.BaseRequest, path: str, exchange: Exchange) -> web.StreamResponse:
        key, _, prefix = path.partition("?")[2].partition("=")
        if key != "prefix":
            raise Refused(httpwire.REQUEST, "a listing takes ?prefix=")
        response = stream_response(200, "application/jsonl")
        response.enable_chunked_encoding()
        lines = bytearray()
        try:
            async with asyncio.timeout(self._limits.storage_s) as deadline:
                async with aclosing(self._connector.list(valid_prefix(prefix))) as infos:  # type: ignore[type-var]
                    async for info in infos:
                        lines += _line(info)
                        if len(lines) >= _LINES_BYTES:
                            await self._send_lines(request, response, lines, exchange, deadline)
                lines += b'{"end":true}\n'
        except TimeoutError:
            if response.prepared:
                cut(request)
                raise ClientGone from None
            raise Refused(httpwire.BUSY, "the storage takes too long") from None
        except ConnectorError as error:
            if not response.prepared:
                raise
            refusal = httpwire.refusal_of(error)
            lines += json.dumps({"error": refusal.word, "message": str(error)[:1000]}).encode() + b"\n"
        exchange.sent_bytes += len(lines)
        return await self._transfer.send(request, response, bytes(lines))

    async def _send_lines(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        lines: bytearray,
        exchange: Exchange,
        deadline: asyncio.Timeout,
    ) -> None:
        """Send what was gathered of a listing; a slow reader gets more time than the storage."""
        now = asyncio.get_running_loop().time
        deadline.reschedule(now() + self._limits.transfer_s(len(lines)))
        if not response.prepared:
            await response.prepare(request)
        await response.write(bytes(lines))
        exchange.sent_bytes += len(lines)
        lines.clear()
        deadline.reschedule(now() + self._limits.storage_s)


def _check_method(method: str, known: tuple[str, ...]) -> None:
    if method not in known:
        raise Refused(httpwire.METHOD, f"this takes {', '.join(known)}")


def _content_length(request: web.BaseRequest) -> int:
    """How long the body is, which has to be said: room is made for it before it is read.

    :raises Refused: if it is not
    """
    lengths = request.headers.getall("Content-Length", [])
    if "Transfer-Encoding" in request.headers or len(lengths) != 1 or not _LENGTH.fullmatch(lengths[0]):
        raise Refused(httpwire.LENGTH, "a put needs a Content-Length", close=True)
    return int(lengths[0])


def _range(request: web.BaseRequest) -> tuple[int, int | None]:
    """The first and the last byte that are wanted; None for the end of the object.

    :raises Refused: if more is asked for than one range
    """
    wanted = request.headers.getall("Range", [])
    if not wanted:
        return 0, None
    found = _RANGE.fullmatch(wanted[0]) if len(wanted) == 1 else None
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        raise Refused(httpwire.WORDS["range"], "a range has the form bytes=FIRST-LAST or bytes=FIRST-")
    return int(found[1]), int(found[2]) if found[2] else None


def _line(info: ObjectInfo) -> bytes:
    # A name needs no escapes.
    return f'["{info.name}",{info.size_bytes},{info.mtime_s!r}]\n'.encode()
