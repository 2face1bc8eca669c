"""A server from its first connection to its last: where it listens, with which certificate, and how it is stopped."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import re
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from coffret.connectors.httpwire import DEFAULT_PORT
from coffret.engine.errors import CoffretError, UsageError
from coffret.engine.server.app import App
from coffret.engine.server.connections import Connections
from coffret.engine.server.limits import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from coffret.connectors.base import Connector
    from coffret.connectors.limit import Pace
    from coffret.engine.server.app import Exchange
    from coffret.engine.server.attempts import Attempts
    from coffret.engine.server.tokens import TokenFile

_LISTEN = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:/\s]+)(?::([0-9]{1,5}))?")
_BACKLOG = 128
_HANDSHAKE_S = 15.0
# How often a certificate that was renewed is looked for.
_RENEWED_S = 60.0


class Address(msgspec.Struct, frozen=True):
    """Where to listen: a host, by name or address, its addresses, and a port (0: any that is free)."""

    host: str
    port: int
    addresses: Sequence[str]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can come here."""
        return all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in self.addresses)


class Settings(msgspec.Struct):
    """How to serve. `tokens`: None if nobody needs one. `certificate`: PEM files of the chain and of its key.

    `stop` is set by whoever wants it to end. `on_ready` is told the URLs, `on_note`, `on_exchange` and
    `pace` are as for `App`.
    """

    address: Address
    tokens: TokenFile | None
    attempts: Attempts
    stop: asyncio.Event
    on_ready: Callable[[Sequence[str]], None]
    on_note: Callable[[str], None]
    on_exchange: Callable[[Exchange], None] | None = None
    certificate: tuple[str, str] | None = None
    limits: Limits = msgspec.field(default_factory=Limits)
    pace: Pace | None = None


def parse_address(text: str) -> Address:
    """The address that HOST[:PORT] means; the host may be a name, an IPv4 address, or an IPv6 one in brackets.

    :raises UsageError: if it is none of this machine's
    """
    found = _LISTEN.fullmatch(text)
    # A number would be taken for an address: 8471 for 0.0.33.23.
    if found is None or found[1].isdecimal() or int(found[2] or 0) > 65535:
        remedy = "write it as in 127.0.0.1:8471 or [::1]:8471"
        raise UsageError(f"--listen wants HOST:PORT, not {text!r}", remedy=remedy)
    host, port = found[1].strip("[]"), int(found[2] or DEFAULT_PORT)
    try:
        known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--listen {text}: {reason}", remedy="give an address of this machine") from None
    return Address(host, port, sorted({str(each[4][0]) for each in known}))


def load_certificate(certificate: tuple[str, str]) -> ssl.SSLContext:
    """A context for TLS with a certificate and its key, in PEM files.

    :raises UsageError: if they can't be used
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, certificate)
    return context


async def serve(connector: Connector, settings: Settings) -> int:
    """Serve a storage until `settings.stop` is set and what is under way then is done; return how many requests came.

    :raises UsageError: if the certificate can't be used
    :raises CoffretError: if the address is not free
    """
    app = App(
        connector,
        settings.tokens,
        settings.attempts,
        settings.limits,
        on_note=settings.on_note,
        on_exchange=settings.on_exchange,
        pace=settings.pace,
    )
    context = load_certificate(settings.certificate) if settings.certificate else None
    connections = Connections(app.handle, settings.limits, settings.on_note)
    app.welcome = connections.welcome
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, found: settings.on_note(_told(found)))
    try:
        async with _listening(connections, settings.address, context) as listener:
            settings.on_ready(_urls(listener, context is not None))
            async with anyio.create_task_group() as group:
                if context is not None and settings.certificate is not None:
                    group.start_soon(_renew, context, settings.certificate, settings.on_note)
                await settings.stop.wait()
                group.cancel_scope.cancel()
            listener.close()
            await _drain(app, connections, settings)
    finally:
        loop.set_exception_handler(before)
    return app.requests


async def _drain(app: App, connections: Connections, settings: Settings) -> None:
    """Let what is under way end, for a while; then cut what is left."""
    connections.close_idle(app.busy)
    with anyio.move_on_after(settings.limits.grace_s) as scope:
        await app.stop()
    if scope.cancelled_caught:
        settings.on_note(f"{len(app.busy)} requests are cut off: they took longer than {settings.limits.grace_s:g} s")


@asynccontextmanager
async def _listening(
    connections: Connections, address: Address, context: ssl.SSLContext | None
) -> AsyncIterator[asyncio.Server]:
    """A server on an address; at the end neither it nor a connection is left."""
    tls: dict[str, Any] = {}
    if context is not None:
        tls = {"ssl": context, "ssl_handshake_timeout": _HANDSHAKE_S}
    try:
        listener = await asyncio.get_running_loop().create_server(
            connections, list(address.addresses), address.port, backlog=_BACKLOG, **tls
        )
    except OSError as error:
        # Of several addresses, none of which is this machine's, asyncio names no number.
        reason = os.strerror(error.errno or errno.EADDRNOTAVAIL)
        raise CoffretError(
            f"can't listen on {address.host}:{address.port}: {reason}",
            remedy="end what listens there, or choose another address with --listen",
        ) from None
    try:
        yield listener
    finally:
        listener.close()
        with anyio.CancelScope(shield=True):
            await connections.end()


def _urls(listener: asyncio.Server, is_tls: bool) -> list[str]:
    urls = []
    for each in listener.sockets:
        host, port = each.getsockname()[:2]
        urls.append(f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}/")
    return urls


def _load(context: ssl.SSLContext, certificate: tuple[str, str]) -> None:
    def refuse() -> str:
        raise ValueError("it is protected by a passphrase")

    try:
        context.load_cert_chain(*certificate, password=refuse)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UsageError(
            f"--tls-cert {certificate[0]}, --tls-key {certificate[1]}: {reason}",
            remedy="give PEM files of a certificate, with what signed it, and of its own key, without a passphrase",
        ) from None


async def _renew(context: ssl.SSLContext, certificate: tuple[str, str], on_note: Callable[[str], None]) -> None:
    """Take a certificate that was renewed for the connections to come; runs until cancelled."""
    seen = await _times(certificate)
    while True:
        await anyio.sleep(_RENEWED_S)
        found = await _times(certificate)
        if found == seen or None in found:
            continue
        seen = found
        try:
            load_certificate(certificate)  # first elsewhere: two files that don't fit would spoil the context
            _load(context, certificate)
        except UsageError as error:
            on_note(f"the certificate was changed, and can't be used: {error}")


async def _times(certificate: tuple[str, str]) -> list[int | None]:
    times: list[int | None] = []
    for path in certificate:
        try:
            times.append((await anyio.Path(path).stat()).st_mtime_ns)
        except OSError:
            times.append(None)
    return times


def _told(found: dict[str, Any]) -> str:
    """What the loop has to say, in one line."""
    error = found.get("exception")
    return " ".join(f"{found.get('message', '')}: {error!r}".split())[:500]
