"""Who may use which bucket, and where it is: locations, credentials, certificates."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.connectors.s3.tools import calls
from tests.connectors.s3_server import CREDENTIALS, S3Server, shared_server
from tests.connectors.test_conformance import listed

from coffret.connectors.errors import (
    AccessDenied,
    ConnectorError,
    InvalidLocation,
    PermissionRefused,
)
from coffret.connectors.registry import open_connector
from coffret.connectors.s3 import S3Connector

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.anyio


class TestLocations:
    @pytest.mark.parametrize(
        ("url", "location", "endpoint", "path_style", "region"),
        [
            ("s3://Host/bucket", "s3://host/bucket", "https://host", True, None),
            ("S3://host:443/bucket/", "s3://host/bucket", "https://host", True, None),
            ("s3://host:9000/bucket/a/b/", "s3://host:9000/bucket/a/b", "https://host:9000", True, None),
            ("s3+http://10.0.0.1/b/a%20b", "s3+http://10.0.0.1/b/a%20b", "http://10.0.0.1", True, None),
            ("s3+http://[::1]:80/b", "s3+http://[::1]/b", "http://[::1]", True, None),
            ("s3://s3.amazonaws.com/b", "s3://s3.amazonaws.com/b", None, False, None),
            ("s3://s3.eu-west-1.amazonaws.com/b", "s3://s3.eu-west-1.amazonaws.com/b", None, False, "eu-west-1"),
            ("s3://s3.amazonaws.com/b.c", "s3://s3.amazonaws.com/b.c", None, True, None),
            ("s3://h/b?path-style=false&region=x", "s3://h/b", "https://h", False, "x"),
        ],
    )
    def test_forms(self, url: str, location: str, endpoint: str | None, path_style: bool, region: str | None) -> None:
        connector = open_connector(url, {})
        assert isinstance(connector, S3Connector)
        place = connector.place
        assert (connector.location, place.endpoint, place.path_style, place.region) == (
            location, endpoint, path_style, region,
        )  # fmt: skip
        again = open_connector(connector.location, {})
        assert again.location == location

    def test_options_beat_the_query(self) -> None:
        connector = open_connector("s3://h/b?region=one", {"region": "two", "storage-class": "STANDARD_IA"})
        assert isinstance(connector, S3Connector)
        assert (connector.place.region, connector.place.storage_class) == ("two", "STANDARD_IA")

    @pytest.mark.parametrize(
        "url",
        [
            *("s3://", "s3://bucket", "s3://bucket/", "s3:///bucket", "s3://h/b/../c", "s3://h/b//c", "s3://h/b#f"),
            *("s3://h/b?no=1", "s3://h:port/b", "s3://[::1/b", "s3://user:secret@h/b", "s3://h/b?path-style=maybe"),
            *("s3://h/b?storage-class=GLACIER", "s3://h/b?storage-class=", "s3://h/b/%00"),
        ],
    )
    def test_what_is_none(self, url: str) -> None:
        with pytest.raises(InvalidLocation) as raised:
            open_connector(url, {})
        assert "secret" not in str(raised.value)

    def test_nothing_is_imported_before_it_is_needed(self) -> None:
        code = (
            "import sys; from coffret.connectors.registry import open_connector; open_connector('s3://h/b', {});"
            "assert not {'aiobotocore', 'botocore', 'aiohttp'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestCredentials:
    @pytest.mark.parametrize(
        ("credentials", "text"),
        [
            (("nobody", CREDENTIALS[1]), "does not know the access key.*S3_REPOSITORY_USER"),
            ((CREDENTIALS[0], "not-this-one"), "secret key is wrong.*S3_REPOSITORY_PASSWORD"),
        ],
    )
    async def test_wrong_ones(
        self, server: S3Server, bucket: str, connector: S3Connector, credentials: tuple[str, str], text: str
    ) -> None:
        await connector.put("index/b", [b"1"])
        async with server.connector(bucket, credentials=credentials) as other:
            for name, call in calls(other).items():
                with pytest.raises(PermissionRefused, match=text) as raised:
                    await call()
                assert credentials[1] not in str(raised.value), name

    async def test_from_the_environment(
        self, server: S3Server, bucket: str, connector: S3Connector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in [name for name in os.environ if name.startswith(("AWS_", "S3_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

        async def look() -> list[str]:
            async with server.connector(bucket, credentials=None) as other:
                return await listed(other)

        with pytest.raises(AccessDenied, match="credentials: set S3_REPOSITORY_USER and S3_REPOSITORY_PASSWORD"):
            await look()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", CREDENTIALS[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CREDENTIALS[1])
        assert await look() == []
        monkeypatch.setenv("S3_REPOSITORY_USER", "nobody")
        with pytest.raises(PermissionRefused, match="S3_REPOSITORY_PASSWORD is not set"):
            await look()
        monkeypatch.setenv("S3_REPOSITORY_PASSWORD", "none")
        with pytest.raises(PermissionRefused, match="access key"):
            await look()
        monkeypatch.setenv("S3_REPOSITORY_USER", CREDENTIALS[0])
        monkeypatch.setenv("S3_REPOSITORY_PASSWORD", CREDENTIALS[1])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        assert await look() == []


class TestCertificates:
    async def test_an_authority_nobody_knows(self, bucket: str) -> None:
        async with shared_server(tls=True).connector(bucket, options={}) as connector:
            for call in calls(connector).values():
                with pytest.raises(PermissionRefused, match="-o ca="):
                    await call()

    async def test_a_file_that_is_none(self, bucket: str, tmp_path: Path) -> None:
        (tmp_path / "garbage").write_text("nothing\n")
        for name in ("missing", "garbage", "."):
            async with shared_server(tls=True).connector(bucket, options={"ca": str(tmp_path / name)}) as connector:
                with pytest.raises(InvalidLocation, match="-o ca="):
                    await connector.create()

    async def test_without_tls_where_it_is_needed_and_the_reverse(self, bucket: str) -> None:
        plain, encrypted = shared_server(tls=False), shared_server(tls=True)
        async with encrypted.connector(bucket, port=plain.port) as connector:
            with pytest.raises(InvalidLocation, match=r"s3\+http://"):
                await connector.create()
        async with plain.connector(bucket, port=encrypted.port) as connector:
            with pytest.raises(ConnectorError):
                await connector.create()

    async def test_something_that_is_no_s3_server(self, server: S3Server, bucket: str) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>Hi</html>")
            await writer.drain()
            writer.close()

        async with (
            await asyncio.start_server(answer, "127.0.0.1", 0) as other,
            server.connector(bucket, port=other.sockets[0].getsockname()[1]) as connector,
        ):
            for call in (connector.create, lambda: connector.get("config", offset=1), lambda: listed(connector)):
                with pytest.raises(ConnectorError):
                    await call()
