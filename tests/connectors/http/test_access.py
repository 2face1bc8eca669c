"""Where a served repository is, and who may use it."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import aiohttp.client_exceptions
import aiohttp.http_exceptions
import aiohttp.resolver
import pytest
from tests.connectors.s3.tools import calls
from tests.connectors.test_conformance import listed

from coffret.connectors.base import READ_ONLY
from coffret.connectors.errors import (
    ConnectionLost,
    InvalidLocation,
    PermissionRefused,
)
from coffret.connectors.http import HTTPConnector
from coffret.connectors.httpplace import is_loopback, parse_location
from coffret.connectors.registry import Transfers, connect, open_connector

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.serving import Serving

pytestmark = pytest.mark.anyio


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
