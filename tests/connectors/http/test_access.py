"""Where a served repository is, who may use it, and what becomes of errors on the way."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import ssl
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import aiohttp.client_exceptions
import aiohttp.http_exceptions
import aiohttp.resolver
import pytest
from tests.connectors.proxy import Proxy
from tests.connectors.s3.tools import calls
from tests.connectors.test_conformance import MIB, aligned, listed
from tests.server.conftest import make_folder
from tests.server.serving import Serving

from coffret.connectors import httperrors
from coffret.connectors.base import READ_ONLY
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
from coffret.connectors.http import HTTPConnector
from coffret.connectors.httpplace import is_loopback, parse_location
from coffret.connectors.httpwire import OF_STORAGE, WORDS, refusal_of
from coffret.connectors.local import LocalConnector
from coffret.connectors.registry import Transfers, connect, open_connector
from coffret.connectors.retry import RetryConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("http")
    make_folder(folder)
    with Serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("https")
    make_folder(folder)
    with Serving(folder, tls=True) as server:
        yield server


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A token in a file, and names that resolve to this machine, or to others as well."""
    file = tmp_path / "token"
    file.write_text("coffret_secret")
    names = {"near.example": ["127.0.0.1"], "mixed.example": ["127.0.0.1", "192.0.2.1"]}

    async def resolve(self: object, host: str, port: int = 0, family: int = 0) -> list[dict[str, object]]:
        return [
            {"hostname": host, "host": each, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
            for each in names[host]
        ]

    monkeypatch.setattr(aiohttp.resolver.ThreadedResolver, "resolve", resolve)
    return file


class TestLocations:
    @pytest.mark.parametrize(
        ("url", "location"),
        [
            ("https://Host/", "https://host"),
            ("HTTPS://host:443", "https://host"),
            ("http://host:80/", "http://host"),
            ("http://127.0.0.1:8471/", "http://127.0.0.1:8471"),
            ("https://[::1]:8471/", "https://[::1]:8471"),
            ("https://host/some/path/", "https://host/some/path"),
            ("https://host/?ca=/a.pem&token-file=/b", "https://host"),
        ],
    )
    def test_forms(self, url: str, location: str) -> None:
        assert open_connector(url, {}).location == location
        assert open_connector(location, {}).location == location

    @pytest.mark.parametrize(
        "url",
        [
            *("https://", "https:///x", "https://host:port/", "https://[::1/", "https://user:secret@host/"),
            *(
                "https://h/#f",
                "https://user@h/",
                "https://h/?no=1",
                "https://h/a//b",
                "https://h/../x",
                "https://h h/",
                "https://h/%0a",
            ),
            *("http://h/?ca=/a.pem", "https://h:99999/"),
        ],
    )
    def test_what_is_none(self, url: str) -> None:
        with pytest.raises(InvalidLocation) as raised:
            open_connector(url, {})
        assert "secret" not in str(raised.value)

    def test_options_beat_the_query(self) -> None:
        place = parse_location("https://h/?ca=/one", {"ca": "/two"})
        assert place.ca == "/two"

    def test_nothing_is_imported_before_it_is_needed(self) -> None:
        code = (
            "import sys; from coffret.connectors.registry import open_connector; open_connector('https://h/', {});"
            "assert not {'aiohttp', 'yarl', 'aiobotocore'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize(
        ("address", "is_so"),
        [
            ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False),
            ("::", False), ("0.0.0.0", False), ("fe80::1%eth0", False), ("localhost", False), ("", False),
        ],
    )  # fmt: skip
    def test_loopback(self, address: str, is_so: bool) -> None:
        assert is_loopback(address) == is_so


class TestTokens:
    async def test_where_they_come_from(self, server: Serving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("COFFRET_SERVER_TOKEN", raising=False)
        file = tmp_path / "token"

        async def look(**options: str) -> str:
            async with open_connector(server.url, options) as connector:
                assert isinstance(connector, HTTPConnector)
                await listed(connector)
                return connector.capabilities.right

        with pytest.raises(PermissionRefused, match=r"COFFRET_SERVER_TOKEN.*token add"):
            await look()
        monkeypatch.setenv("COFFRET_SERVER_TOKEN", server.token())
        assert await look() == "full"
        file.write_text(f"{server.token(READ_ONLY)}\n")
        assert await look(**{"token-file": str(file)}) == "read-only"
        monkeypatch.setenv("COFFRET_SERVER_TOKEN", "wrong-one")
        with pytest.raises(PermissionRefused, match=r"does not know the token \(COFFRET_SERVER_TOKEN\)") as raised:
            await look()
        assert "wrong-one" not in str(raised.value)
        file.write_text("wrong-one")
        with pytest.raises(PermissionRefused, match=r"token-file=.*token add") as raised:
            await look(**{"token-file": str(file)})
        assert "wrong-one" not in str(raised.value)

    @pytest.mark.parametrize("text", ["", " ", "a b", "a\r\nX-Evil: 1", "é", "a" * 5000, "\x00"])
    async def test_what_is_none(self, server: Serving, tmp_path: Path, text: str) -> None:
        file = tmp_path / "token"
        file.write_text(text)
        async with open_connector(server.url, {"token-file": str(file)}) as connector:
            with pytest.raises(InvalidLocation, match="token-file"):
                await listed(connector)

    async def test_a_file_that_is_missing(self, server: Serving, tmp_path: Path) -> None:
        async with open_connector(server.url, {"token-file": str(tmp_path / "none")}) as connector:
            with pytest.raises(InvalidLocation, match="No such file"):
                await listed(connector)

    async def test_rights_are_told(self, server: Serving) -> None:
        async with server.connector(READ_ONLY) as connector:
            for name, call in calls(connector).items():
                if name.startswith(("put", "create", "delete")):
                    with pytest.raises(PermissionRefused, match="read-only"):
                        await call()


class TestInTheClear:
    """Without TLS, to another host."""

    @pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]", "mixed.example"])
    async def test_nothing_is_sent(self, elsewhere: Path, host: str) -> None:
        async with open_connector(f"http://{host}:1/", {"token-file": str(elsewhere)}) as connector:
            for call in calls(connector).values():
                with pytest.raises(PermissionRefused, match="--insecure"):
                    await call()

    @pytest.fixture
    def known(self, elsewhere: Path, server: Serving) -> Path:
        """A good token."""
        elsewhere.write_text(server.token())
        return elsewhere

    async def test_this_machine_by_another_name(self, known: Path, server: Serving) -> None:
        async with open_connector(f"http://near.example:{server.port}/", {"token-file": str(known)}) as connector:
            assert isinstance(await listed(connector), list)

    async def test_if_one_says_so(self, known: Path, server: Serving) -> None:
        options = {"token-file": str(known)}
        url = f"http://mixed.example:{server.port}/"
        connector, _ = connect(url, options, Transfers(insecure=True))
        async with connector:
            assert isinstance(await listed(connector), list)


class TestCertificates:
    async def test_an_authority_nobody_knows(self, encrypted: Serving, tmp_path: Path) -> None:
        async with open_connector(f"https://127.0.0.1:{encrypted.port}", {}) as connector:
            for call in calls(connector).values():
                with pytest.raises(PermissionRefused, match="-o ca="):
                    await call()

    async def test_another_name(self, encrypted: Serving, elsewhere: Path) -> None:
        async with open_connector(f"https://near.example:{encrypted.port}", {"ca": str(encrypted.ca)}) as connector:
            with pytest.raises(PermissionRefused, match="certificate"):
                await listed(connector)

    async def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "garbage").write_text("nothing\n")
        for name in ("missing", "garbage", "."):
            async with open_connector("https://127.0.0.1:1", {"ca": str(tmp_path / name)}) as connector:
                with pytest.raises(InvalidLocation, match="-o ca="):
                    await connector.create()

    async def test_without_tls_where_it_is_needed_and_the_reverse(self, server: Serving, encrypted: Serving) -> None:
        async with open_connector(f"https://127.0.0.1:{server.port}", {"ca": str(encrypted.ca)}) as connector:
            with pytest.raises(InvalidLocation, match="http://"):
                await connector.create()
        async with open_connector(f"http://127.0.0.1:{encrypted.port}", {}) as connector:
            with pytest.raises(ConnectionLost, match="https://"):
                await connector.create()


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


class TestNetworks:
    """What bad networks do between the two."""

    @pytest.fixture
    async def proxy(self, server: Serving) -> AsyncIterator[Proxy]:
        async with Proxy(server.port) as proxy:
            yield proxy

    async def test_silence_ends(self, server: Serving, proxy: Proxy) -> None:
        async with server.connector(port=proxy.port, stall_s=0.3) as connector:
            await connector.put("index/a", [b"123"])
            proxy.blackhole = True
            for name, call in calls(connector).items():
                with pytest.raises(ConnectionLost, match="no answer"):
                    await call()
                assert name
            body = aligned(bytes(4 * MIB))
            with pytest.raises(ConnectionLost):
                await connector.put("index/b", [body])
            body[:] = b"1" * len(body)  # the buffer is its owner's again

    async def test_a_lost_answer_is_found_out(self, server: Serving, proxy: Proxy) -> None:
        name = f"snapshots/{os.urandom(16).hex()}"
        inner = server.connector(port=proxy.port)
        async with RetryConnector(inner, first_wait_s=0.01, on_retry=lambda *_: _heal(proxy)) as connector:
            await connector.put("index/a", [b"1"])
            proxy.cut_answers = True
            await connector.put(name, [b"mine"], if_absent=True)
            proxy.cut_answers = True
            with pytest.raises(AlreadyExists):
                await connector.put(name, [b"other"], if_absent=True)
        assert (server.path / name).read_bytes() == b"mine"

    async def test_cut_anywhere(self, server: Serving, proxy: Proxy) -> None:
        data = os.urandom(MIB)
        async with server.connector(port=proxy.port) as connector:
            await connector.put("index/large", [data])
            for cut in (10, 400, 100_000, 700_000):
                proxy.cut_after_bytes = cut
                proxy.cut()
                with pytest.raises(ConnectionLost):
                    await connector.get("index/large")
                with pytest.raises(ConnectionLost):
                    await connector.put("index/none", [data], if_absent=True)
            proxy.cut_after_bytes = None
            proxy.cut()
            with pytest.raises(NotFound):
                await connector.get("index/none")
            assert await connector.get("index/large") == data

    async def test_a_connection_that_was_closed_meanwhile(self, server: Serving, proxy: Proxy) -> None:
        """By the server, or by a proxy that has waited for long: nobody notices."""
        async with RetryConnector(server.connector(port=proxy.port), first_wait_s=0.01) as connector:
            for name, call in calls(connector).items():
                if name != "create":
                    await connector.put("index/a", [b"12"])
                    proxy.cut()
                    with suppress(AlreadyExists):
                        await call()

    async def test_a_refusal_arrives_before_the_body_has_gone(self, server: Serving) -> None:
        async with server.connector(READ_ONLY) as connector:
            with pytest.raises(PermissionRefused, match="read-only"):
                await connector.put("packs/aa/large", [bytes(100 * MIB)])

    async def test_what_it_can_do_is_known_after_the_first_request(self, server: Serving) -> None:
        async with server.connector() as connector:
            await listed(connector)
            assert (connector.capabilities.parallel_puts, connector.capabilities.parallel_gets) == (3, 16)
            assert connector.capabilities.exclusive_puts
        chosen = server.connector()
        chosen.set_connections(7)
        async with chosen:
            await listed(chosen)
            assert (chosen.capabilities.parallel_puts, chosen.capabilities.parallel_gets) == (7, 7)

    async def test_limits(self, server: Serving) -> None:
        """Objects are moved piece by piece, and whole."""
        data = os.urandom(300_000)
        url = f"http://127.0.0.1:{server.port}/"
        file = server.folder / "token-limit"
        file.write_text(server.token())
        transfers = Transfers(upload=2e6, download=2e6)
        connector, _ = connect(url, {"token-file": str(file)}, transfers)
        async with connector:
            await connector.put("index/limited", [data])
            assert await connector.get("index/limited") == data


def _heal(proxy: Proxy) -> None:
    proxy.cut_answers = False
