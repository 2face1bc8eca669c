"""What answers instead of a served repository, and what becomes of errors on the way."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl
from typing import TYPE_CHECKING

import aiohttp.client_exceptions
import aiohttp.http_exceptions
import aiohttp.resolver
import pytest
from tests.connectors.s3.tools import calls
from tests.server.conftest import make_folder
from tests.server.serving import Serving

from coffret.connectors import httperrors
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    InvalidLocation,
    InvalidRange,
    NotFound,
    NotStorage,
    PermissionRefused,
    StorageFull,
    TransientError,
)
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.httpwire import OF_STORAGE, WORDS, refusal_of
from coffret.connectors.local import LocalConnector
from coffret.connectors.registry import open_connector

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


class TestOtherServers:
    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>Hi</html>", NotStorage),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", NotStorage),
            (b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"protocol": 2}', NotStorage),
            (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", NotStorage),
            (b"HTTP/1.1 302 No\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n", InvalidLocation),
            (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", PermissionRefused),
            (b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n", ConnectorError),
            (b"HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n", TransientError),
            (b"SSH-2.0-OpenSSH_9.2\r\n", NotStorage),
            (b"", ConnectionLost),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html", ConnectionLost),
        ],
    )
    async def test_what_answers_is_none_of_ours(self, answer: bytes, kind: type[ConnectorError]) -> None:
        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(reply, "127.0.0.1", 0) as other:
            port = other.sockets[0].getsockname()[1]
            async with open_connector(f"http://127.0.0.1:{port}", {}) as connector:
                for call in calls(connector).values():
                    with pytest.raises(ConnectorError) as raised:
                        await call()
                    assert type(raised.value) is kind, raised.value

    async def test_another_protocol_is_told_in_one_line(self) -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            await reader.read()
            writer.close()

        async with await asyncio.start_server(greet, "127.0.0.1", 0) as other:
            connector = open_connector(f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}", {})
            async with connector:
                with pytest.raises(NotStorage, match=r"is no coffret server \(Bad status line\)$"):
                    await connector.create()

    async def test_nobody_answers(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            async with open_connector(f"http://127.0.0.1:{free.getsockname()[1]}", {}) as connector:
                with pytest.raises(ConnectionLost, match="refused"):
                    await connector.create()


class TestErrors:
    def test_every_error_of_the_library_is_known(self) -> None:
        # What only web sockets, forms and redirects raise, which are not used.
        ours = {"WSServerHandshakeError", "WSMessageTypeError", "ContentTypeError", "TooManyRedirects"}
        modules = (aiohttp.client_exceptions, aiohttp.http_exceptions)
        found = {
            each
            for module in modules
            for _, each in inspect.getmembers(module, inspect.isclass)
            if issubclass(each, Exception) and each.__module__.startswith("aiohttp") and each.__name__ not in ours
        }
        assert len(found) > 25
        for each in found:
            with pytest.raises(ConnectorError), httperrors.mapped("https://h/config"):
                raise _renamed(each)

    def test_bugs_stay_bugs(self) -> None:
        with pytest.raises(KeyError), httperrors.mapped("here"):
            raise KeyError("x")

    @pytest.mark.parametrize(
        "kind", [AlreadyExists, ConnectionLost, InvalidRange, NotFound, NotStorage, PermissionRefused, StorageFull]
    )
    async def test_what_the_storage_raises_arrives(self, tmp_path: Path, kind: type[ConnectorError]) -> None:
        make_folder(tmp_path)

        async def fail(method: str, name: str) -> None:
            if method != "close":
                raise kind("so it is")

        def failing() -> FaultyConnector:
            return FaultyConnector(LocalConnector(tmp_path / "repository"), before=fail)

        with Serving(tmp_path, open_connector=failing) as server:
            async with server.connector() as connector:
                for name, call in calls(connector).items():
                    if name == "get nothing" or (kind is InvalidRange and name.startswith("get")):
                        continue  # these look at the size themselves
                    with pytest.raises(ConnectorError) as raised:
                        await call()
                    assert type(raised.value) is kind, name

    def test_each_refusal_has_a_word_of_its_own(self) -> None:
        assert len(WORDS) >= len(OF_STORAGE) + 10
        for refusal in OF_STORAGE:
            assert refusal_of(refusal.kind("x")) == refusal

    def test_tls(self) -> None:
        with pytest.raises(ConnectionLost), httperrors.mapped("https://h/config"):
            raise ssl.SSLError(1, "bad record")


def _renamed(kind: type[Exception]) -> Exception:
    """An error that is of a class, and can be made without what it is made from."""
    derived = type(kind.__name__, (kind,), {"__init__": lambda self: None, "__str__": lambda self: "so it is"})
    made: Exception = derived()
    return made
