"""A client of a repository's server: made at first use, with a deadline that moves along.

aiohttp is imported here alone, in a thread, when the first request is made.
"""

from __future__ import annotations

import json
import ssl
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.lowlevel
import msgspec
from anyio import to_thread

from coffret.connectors import httperrors, httpplace
from coffret.connectors.base import FULL, RIGHTS, Capabilities
from coffret.connectors.errors import ConnectionLost, ConnectorError, InvalidLocation, NotStorage
from coffret.connectors.httpbody import Watch
from coffret.connectors.httpwire import ERROR_HEADER, PROTOCOL, ROOT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aiohttp import ClientResponse, ClientSession

    from coffret.connectors.httpbody import Body
    from coffret.connectors.httpplace import Place
    from coffret.connectors.limit import Pace

    Read = Callable[[ClientResponse, Watch], Awaitable[Any]]

T = TypeVar("T")
# Without a byte moved for so long a connection is given up: half-open ones never say a word. The answer to a body may
# take twice as long: what the kernel still holds of it has to go out, and the server makes it durable.
STALL_S = 60.0
_CONNECT_S = 15.0
# Connections for all puts and gets; those that are not used cost nothing.
_CONNECTIONS = 64
# For the next request after a pause; the server waits longer.
_KEEPALIVE_S = 30.0
# What is taken from a connection before it has to wait for the reader: at 256 KiB gets were a fifth slower.
_READ_BUFFER_BYTES = 1 << 20
_MAX_MESSAGE_BYTES = 4096
# How long sockets of requests that were cut off may take to close over TLS (s); aiohttp's documents say as much.
_LINGER_S = 0.25
_MAX_INFO_BYTES = 1 << 20


class Info(msgspec.Struct, frozen=True):
    """What a server says of itself: what its storage does best, with the token's right, and what it can't promise."""

    capabilities: Capabilities
    notes: tuple[str, ...]


class Client:
    """Requests to one server. Every one ends: in an answer, or in a ConnectorError.

    `on_info` is told what the server says of itself, before the first request is answered.
    """

    def __init__(self, place: Place, on_info: Callable[[Info], None], *, stall_s: float = STALL_S) -> None:
        self.place, self.stall_s = place, stall_s
        self.insecure = False
        self.pace: Pace | None = None
        self._on_info = on_info
        self._lock = anyio.Lock()
        self._session: ClientSession | None = None
        self._token_source = ""
        self._reached = self._greeted = False
        self._cut_off = False  # a request, before its answer began

    async def ask(
        self,
        method: str,
        path: str,
        where: str,
        read: Callable[[ClientResponse, Watch], Awaitable[T]],
        *,
        body: Body | None = None,
        watch: Watch | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """What `read` makes of the server's answer while the deadline still counts. `where` is for errors.

        :raises ConnectionLost: if nothing moved for too long
        """
        if not self._greeted:
            await self._greet()
        return await self._ask(method, path, where, read, body=body, watch=watch, headers=headers)

    async def open(self, path: str, where: str) -> ClientResponse:
        """The server's answer to a GET, whose body is still to be read, by `piece`; the caller closes it."""

        async def keep(answer: ClientResponse, _: Watch) -> ClientResponse:
            return answer

        return await self.ask("GET", path, where, keep)

    async def piece(self, answer: ClientResponse, where: str) -> bytes:
        """The next bytes of an answer; b"" at its end."""
        with httperrors.mapped(where):
            with anyio.move_on_after(self.stall_s):
                return await answer.content.readany()
        raise ConnectionLost(f"{where}: no answer for {self.stall_s:g} s")

    async def close(self) -> None:
        """Close all connections."""
        session, self._session = self._session, None
        if session is not None:
            with anyio.CancelScope(shield=True):
                if session.connector is not None:
                    await session.connector.close(abort_ssl=True)  # an orderly end would wait for the other side
                await session.close()
                # Sockets are closed in the loop's next turns, which may be its last; over TLS those of requests that
                # were cut off take until the other side has agreed, or this time.
                await anyio.sleep(_LINGER_S if self._cut_off and self.place.is_tls else 0)

    async def _ask(
        self,
        method: str,
        path: str,
        where: str,
        read: Callable[[ClientResponse, Watch], Awaitable[T]],
        *,
        body: Body | None = None,
        watch: Watch | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        watch = watch or Watch(self.stall_s)
        try:
            with httperrors.mapped(where, reached=self._reached):
                session = self._session or await self._connect()
                with watch.scope:
                    watch.moved()
                    try:
                        answer = await session.request(
                            method, self._url(path), data=body, headers=headers, allow_redirects=False
                        )
                    except BaseException:
                        self._cut_off = True
                        raise
                    self._reached = True
                    watch.moved()
                    try:
                        if answer.status >= 300:
                            raise await self._refused(answer, where)
                        result = await read(answer, watch)
                        if body is not None and not body.finished:
                            drop(answer)
                        return result
                    except BaseException:
                        drop(answer)
                        raise
        except (ConnectionLost, InvalidLocation):
            raise
        except ConnectorError:
            self._reached = True  # a refusal is an answer too
            raise
        raise ConnectionLost(f"{where}: no answer for {self.stall_s:g} s")

    async def _refused(self, answer: ClientResponse, where: str) -> ConnectorError:
        word, message = answer.headers.get(ERROR_HEADER, ""), b""
        if word:
            # To its end, so that the connection can be used again, unless the body of the request has not gone out.
            while len(message) < _MAX_MESSAGE_BYTES and (piece := await answer.content.readany()):
                message += piece
        text = "".join(c if c.isprintable() else " " for c in message.decode("utf-8", "replace")).strip()
        return httperrors.refused(where, answer.status, word, text, self._token_source)

    def _url(self, path: str) -> Any:
        from yarl import URL

        # As it is: names need no escapes.
        return URL(f"{self.place.location}{path}", encoded=True)

    async def _greet(self) -> None:
        """Ask the server what it is, once, before anything else is asked.

        :raises NotStorage: if it is another kind of server, or of another version
        """
        async with self._lock:
            if self._greeted:
                return
            where = self.place.location
            data = await self._ask("GET", ROOT, where, _read_info)
            try:
                found = json.loads(data)
                if found["protocol"] != PROTOCOL:
                    raise NotStorage(f"{where}: the server speaks version {found['protocol']} of the protocol")
                told = found["capabilities"]
                capabilities = Capabilities(
                    parallel_puts=_number(told["parallel_puts"], 256),
                    parallel_gets=_number(told["parallel_gets"], 256),
                    coalesce_gap_bytes=_number(told["coalesce_gap_bytes"], 64 << 20),
                    exclusive_puts=told["exclusive_puts"] is True,
                    ordered_lists=told["ordered_lists"] is True,
                    right=found["right"] if found["right"] in RIGHTS else FULL,  # what is new the server itself refuses
                )
                info = Info(capabilities, tuple(str(note)[:1000] for note in found["notes"][:20]))
            except (ValueError, TypeError, KeyError):
                raise NotStorage(f"{where}: what answers there is no coffret server") from None
            self._on_info(info)
            self._greeted = True

    async def _connect(self) -> ClientSession:
        prepared = await to_thread.run_sync(_prepare, self.place)
        if self._session is None:
            token, self._token_source = await to_thread.run_sync(httpplace.read_token, self.place)
            self._session = _session(self.place, prepared, token, clear=self.insecure or self.place.is_tls)
        return self._session


def drop(answer: ClientResponse) -> None:
    """Give up an answer, with whatever is still to be sent or read; one that was read to its end is no more concerned.

    Its connection is cut at once. Over TLS an orderly end would wait for the other side.
    """
    connection = answer.connection  # None if it is free for others
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    answer.close()


async def _read_info(answer: ClientResponse, _: Watch) -> bytes:
    data = b""
    while len(data) <= _MAX_INFO_BYTES and (piece := await answer.content.readany()):
        data += piece
    return data


def _number(value: Any, most: int) -> int:
    """
    :raises ValueError: if it is no count
    """
    if type(value) is not int or value < 1:
        raise ValueError(value)
    return min(value, most)


def _prepare(place: Place) -> ssl.SSLContext | None:
    """Import what takes long, and read the certificates of authorities.

    :raises InvalidLocation: if the CA file is missing or holds no certificate
    """
    import aiohttp  # noqa: F401 - so that importing it again takes no time

    if not place.is_tls:
        return None
    try:
        return ssl.create_default_context(cafile=place.ca)
    except OSError as error:
        raise InvalidLocation(f"-o ca={place.ca}: {error.strerror or error}") from error


def _session(place: Place, context: ssl.SSLContext | None, token: str, *, clear: bool) -> ClientSession:
    """A session of aiohttp. Unless `clear`, nothing is sent to another host.

    :raises PermissionRefused: if the location has the address of one
    """
    import aiohttp
    from aiohttp.resolver import ThreadedResolver

    class LoopbackOnly(ThreadedResolver):
        """Resolves as the system does, and refuses what is not this machine."""

        async def resolve(self, *args: Any, **kwargs: Any) -> Any:
            found = await super().resolve(*args, **kwargs)
            for each in found:
                if not httpplace.is_loopback(each["host"]):
                    raise httpplace.refuse_clear(place, each["host"])
            return found

    if not clear and _is_address(place.host) and not httpplace.is_loopback(place.host):
        raise httpplace.refuse_clear(place, place.host)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=_CONNECTIONS,
            ssl=context if context is not None else True,
            keepalive_timeout=_KEEPALIVE_S,
            resolver=ThreadedResolver() if clear else LoopbackOnly(),
        ),
        headers={"Authorization": f"Bearer {token}"} if token else None,
        skip_auto_headers=("Accept-Encoding", "Content-Type"),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        read_bufsize=_READ_BUFFER_BYTES,
    )


def _is_address(host: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
