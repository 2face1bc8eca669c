"""What only the S3 connector has: parts, credentials, certificates, and the errors of servers and networks."""

# ruff: noqa: ASYNC221 - here nothing else waits for the event loop

from __future__ import annotations

import asyncio
import errno
import inspect
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import aiohttp.client_exceptions
import anyio
import botocore.exceptions
import botocore.parsers
import pytest
from botocore.exceptions import ClientError
from tests.connectors.proxy import Proxy
from tests.connectors.s3_server import CREDENTIALS, S3Server, free_port, shared_server
from tests.connectors.test_conformance import MIB, aligned, listed

from coffret.connectors import s3client, s3errors
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
from coffret.connectors.limit import Bucket, LimitConnector
from coffret.connectors.registry import open_connector
from coffret.connectors.retry import RetryConnector
from coffret.connectors.s3 import S3Connector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from coffret.connectors.base import Connector

pytestmark = pytest.mark.anyio

PART = 5 * MIB  # the least a server takes


@pytest.fixture
def server() -> S3Server:
    return shared_server(tls=False)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[S3Server]:
    """One that the test may kill."""
    server = S3Server(tmp_path / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def bucket() -> str:
    return f"test-{os.urandom(8).hex()}"


@pytest.fixture
async def connector(server: S3Server, bucket: str) -> AsyncIterator[S3Connector]:
    async with server.connector(bucket) as connector:
        await connector.create()
        yield connector


@pytest.fixture
async def in_parts(server: S3Server, bucket: str) -> AsyncIterator[S3Connector]:
    """One that sends what is larger than 5 MiB in parts."""
    async with server.connector(bucket, single_bytes=PART, part_bytes=PART) as connector:
        await connector.create()
        yield connector


async def uploads(connector: S3Connector) -> list[str]:
    """The uploads in parts that nobody ended."""
    answer = await connector._client.ask("list_multipart_uploads", "")
    return [upload["Key"] for upload in answer.get("Uploads", ())]


def calls(connector: Connector) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Each call of the contract."""
    return {
        "create": connector.create,
        "put": lambda: connector.put("index/a", [b"1"]),
        "put large": lambda: connector.put("index/a", [bytes(2 * MIB)]),
        "put if absent": lambda: connector.put("index/a", [b"1"], if_absent=True),
        "get": lambda: connector.get("index/a"),
        "get a range": lambda: connector.get("index/a", offset=1, length=1),
        "get into": lambda: connector.get_into("index/a", 0, memoryview(bytearray(1))),
        "get nothing": lambda: connector.get("index/a", offset=0, length=0),
        "list": lambda: listed(connector),
        "stat": lambda: connector.stat("index/a"),
        "delete": lambda: connector.delete("index/a"),
    }


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


class TestCreate:
    async def test_it_makes_the_bucket(self, server: S3Server, bucket: str) -> None:
        async with server.connector(bucket) as connector:
            for call in list(calls(connector).values())[1:]:
                with pytest.raises(NotFound, match="no such bucket"):
                    await call()
            await connector.create()
            await connector.create()
            assert await listed(connector) == []

    async def test_other_objects_are_left_alone(self, server: S3Server, bucket: str, connector: S3Connector) -> None:
        await connector.put("photos/cat", [b"1"])
        with pytest.raises(NotStorage, match=r"'photos'.*prefix"):
            await connector.create()
        async with server.connector(f"{bucket}/backup") as below:
            await below.create()
            await below.put("config", [b"{}"])
            assert await listed(below) == ["config"]
            await below.create()

    async def test_a_repository_without_config(self, connector: S3Connector) -> None:
        await connector.put("snapshots/a", [b"1"])
        with pytest.raises(NotStorage, match="without its config"):
            await connector.create()

    async def test_names_that_are_no_bucket(self, server: S3Server) -> None:
        async with server.connector("B") as connector:
            with pytest.raises(InvalidLocation, match=r"s3://host"):
                await connector.create()

    async def test_the_region_is_found(self, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        server = S3Server(tmp_path, region="moon-north-7")
        server.start()
        try:
            async with server.connector(bucket, options={"region": "moon-north-7"}) as connector:
                await connector.create()
                await connector.put("config", [b"{}"])
            async with server.connector(bucket) as connector:
                assert await connector.get("config") == b"{}"
                await connector.put("index/a", [bytes(3 * MIB)], if_absent=True)
                assert await listed(connector) == ["config", "index/a"]
        finally:
            server.kill()


class TestLists:
    async def test_more_than_a_page(self, server: S3Server, bucket: str, connector: S3Connector) -> None:
        folder = server.buckets / bucket / "packs"
        names = [f"packs/{number % 256:02x}/{number:06}" for number in range(3456)]
        for name in names:
            path = server.buckets / bucket / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"1")
        (folder / "Not An Object").write_bytes(b"")
        found = [info.name async for info in connector.list("packs/")]
        assert found == sorted(names)
        assert connector.capabilities.ordered_lists
        assert [info.name async for info in connector.list("packs/a")] == sorted(n for n in names if n[6] == "a")


class TestParts:
    DATA = random.Random(2).randbytes(4 * PART + 12345)

    async def test_put_and_get(self, in_parts: S3Connector) -> None:
        for cuts in ((), (1,), (PART, 2 * PART), (PART - 1, PART + 1, 3 * PART + 7)):
            edges = [0, *cuts, len(self.DATA)]
            body = [aligned(self.DATA[begin:end]) for begin, end in pairwise(edges)]
            await in_parts.put("packs/aa/one", body)
            assert await in_parts.get("packs/aa/one") == self.DATA
        assert await uploads(in_parts) == []

    async def test_if_absent(self, server: S3Server, bucket: str, in_parts: S3Connector) -> None:
        won: list[int] = []

        async def put(number: int) -> None:
            try:
                await in_parts.put("packs/aa/one", [bytes([number]) * (PART + 1)], if_absent=True)
            except AlreadyExists:
                return
            won.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(put, number)
        assert len(won) == 1
        assert await in_parts.get("packs/aa/one") == bytes([won[0]]) * (PART + 1)
        with pytest.raises(AlreadyExists):
            await in_parts.put("packs/aa/one", [self.DATA], if_absent=True)
        assert await uploads(in_parts) == []

    @pytest.mark.parametrize("by_scope", [True, False])
    async def test_cancelled(self, in_parts: S3Connector, by_scope: bool) -> None:
        begin = time.perf_counter()
        await in_parts.put("packs/aa/one", [aligned(self.DATA)])
        whole_s = time.perf_counter() - begin
        await in_parts.delete("packs/aa/one")
        for number in range(8):
            body = aligned(self.DATA)
            delay_s = whole_s * 1.2 * number / 8
            if by_scope:
                with anyio.move_on_after(delay_s):
                    await in_parts.put("packs/aa/one", [body])
            else:
                task = asyncio.create_task(in_parts.put("packs/aa/one", [body]))
                await asyncio.sleep(delay_s)
                task.cancel()
                await asyncio.wait([task])
            body[:] = bytes(len(body))
            assert await uploads(in_parts) == []
            try:
                assert await in_parts.get("packs/aa/one") == self.DATA
                await in_parts.delete("packs/aa/one")
            except NotFound:
                pass

    async def test_a_part_that_fails(self, in_parts: S3Connector, monkeypatch: pytest.MonkeyPatch) -> None:
        send = in_parts._client.send

        async def refuse(operation: str, *rest: Any, **others: Any) -> Any:
            if others.get("PartNumber") == 3:
                raise StorageFull("full")
            return await send(operation, *rest, **others)

        monkeypatch.setattr(in_parts._client, "send", refuse)
        with pytest.raises(StorageFull):
            await in_parts.put("packs/aa/one", [self.DATA])
        assert await uploads(in_parts) == []
        assert await listed(in_parts) == []

    async def test_what_killed_processes_left(
        self, server: S3Server, bucket: str, in_parts: S3Connector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for key in ("packs/aa/one", "packs/aa/two"):
            await in_parts._client.ask("create_multipart_upload", "", Key=key)
        await in_parts.put("packs/aa/three", [self.DATA])
        assert len(await uploads(in_parts)) == 2  # they may be alive
        monkeypatch.setattr("coffret.connectors.s3parts._ABANDONED_AFTER_S", -60.0)
        async with server.connector(bucket, single_bytes=PART) as later:
            await later.put("packs/aa/four", [self.DATA])
        assert await uploads(in_parts) == []


class TestBuffers:
    async def test_they_are_the_callers_again(self, server: S3Server, bucket: str, connector: S3Connector) -> None:
        """Nothing refers to a buffer once its put is over, however it ended: it can be unmapped."""
        for delay_s in (0.0, 0.001, 0.01, 0.03, 5.0):
            memory = mmap.mmap(-1, 8 * MIB)
            view = memoryview(memory)
            with anyio.move_on_after(delay_s):
                await connector.put("packs/aa/one", [view])
            view.release()
            memory.close()

    @pytest.mark.parametrize("tls", [False, True])
    async def test_the_loop_is_not_blocked(self, bucket: str, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """What takes long of a large body, its hash or checksum, is for a thread."""
        where: list[int] = []

        def watched(digest: Callable[[Sequence[memoryview]], str]) -> Callable[[Sequence[memoryview]], str]:
            def run(views: Sequence[memoryview]) -> str:
                where.append(threading.get_ident())
                return digest(views)

            return run

        for name in ("sha256_hex", "crc32_base64"):
            monkeypatch.setattr(s3client, name, watched(getattr(s3client, name)))
        async with shared_server(tls=tls).connector(bucket) as connector:
            await connector.create()
            where.clear()
            await connector.put("packs/aa/one", [aligned(os.urandom(MIB))])
        assert where
        assert threading.get_ident() not in where

    async def test_a_server_without_checksums(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        async with shared_server(tls=True).connector(bucket) as connector:
            await connector.create()
            ask, refused = connector._client.ask, 0

            async def refuse(*rest: Any, **others: Any) -> Any:
                nonlocal refused
                if "ChecksumCRC32" in others:
                    refused += 1
                    raise ConnectorError("InvalidArgument: Unsupported header 'x-amz-checksum-crc32'")
                return await ask(*rest, **others)

            monkeypatch.setattr(connector._client, "ask", refuse)
            for number in range(3):
                await connector.put(f"packs/aa/{number}", [aligned(bytes(MIB))])
                assert await connector.get(f"packs/aa/{number}") == bytes(MIB)
            assert refused == 1

    async def test_rates_are_held_piece_by_piece(self, connector: S3Connector, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: dict[Bucket, list[int]] = {}
        take = Bucket.take

        async def watch(self: Bucket, size_bytes: int) -> None:
            taken.setdefault(self, []).append(size_bytes)
            await take(self, size_bytes)

        monkeypatch.setattr(Bucket, "take", watch)
        limited, data = LimitConnector(connector, upload=16 * MIB, download=16 * MIB), os.urandom(3 * MIB)
        await limited.put("packs/aa/one", [data])
        assert await limited.get("packs/aa/one") == data
        for pieces in (taken[limited._pace.upload], taken[limited._pace.download]):
            assert sum(pieces) == len(data)
            assert max(pieces) <= 256 << 10

    async def test_a_slow_rate_is_no_stall(self, server: S3Server, bucket: str, connector: S3Connector) -> None:
        async with server.connector(bucket, stall_s=2.0) as impatient:
            limited = LimitConnector(impatient, upload=4 << 10)
            await limited.put("index/a", [bytes(20 << 10)])
        assert len(await connector.get("index/a")) == 20 << 10

    async def test_the_storage_class_is_for_large_objects(
        self, server: S3Server, bucket: str, connector: S3Connector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with server.connector(bucket, options={"storage-class": "STANDARD"}) as other:
            send, sent = other._client.send, []

            async def note(*rest: Any, **others: Any) -> Any:
                sent.append(others.get("StorageClass"))
                return await send(*rest, **others)

            monkeypatch.setattr(other._client, "send", note)
            await other.put("leases/a", [b"1"])
            await other.put("packs/aa/one", [bytes(MIB)])
        assert sent == [None, "STANDARD"]


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

        with pytest.raises(PermissionRefused, match="credentials"):
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


class TestNetworks:
    async def test_nobody_listens(self, server: S3Server, bucket: str) -> None:
        async with server.connector(bucket, port=free_port()) as connector:
            for call in calls(connector).values():
                with pytest.raises(ConnectionLost, match="refused"):
                    await call()

    @pytest.mark.parametrize(
        ("number", "kind"), [(socket.EAI_NONAME, InvalidLocation), (socket.EAI_AGAIN, TransientError)]
    )
    async def test_a_host_that_does_not_resolve(
        self, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[ConnectorError]
    ) -> None:
        async def fail(*_: Any, **__: Any) -> None:
            raise socket.gaierror(number, "Name or service not known")

        loop = asyncio.get_running_loop()
        try:
            monkeypatch.setattr(loop, "getaddrinfo", fail)
        except AttributeError:
            pytest.skip("uvloop's methods can't be replaced")
        monkeypatch.setenv("S3_REPOSITORY_USER", "a")
        monkeypatch.setenv("S3_REPOSITORY_PASSWORD", "b")
        async with open_connector("s3://my-bucket/backup", {}) as connector:
            with pytest.raises(kind, match=r"my-bucket.*s3://host\[:port\]/bucket"):
                await listed(connector)

    @pytest.mark.parametrize("tls", [False, True])
    async def test_cut_anywhere(self, bucket: str, tls: bool) -> None:
        server, data, lost = shared_server(tls=tls), random.Random(3).randbytes(MIB), 0
        async with Proxy(server.port) as proxy, server.connector(bucket) as connector:
            await connector.create()
            await connector.put("packs/aa/there", [data])
            for cut in (0, 1, 100, 400, 700, 1000, 10_000, 300_000, MIB, MIB + 200, MIB + 600, MIB + 700, 2 * MIB):
                proxy.cut_after_bytes = cut
                async with server.connector(bucket, port=proxy.port, stall_s=10) as cutting:
                    for name, call in calls(cutting).items():
                        try:
                            await call()
                        except ConnectorError as error:
                            assert cut > 300 or isinstance(error, TransientError), name
                    buffer = bytearray(MIB)
                    try:
                        await cutting.get_into("packs/aa/there", 0, memoryview(buffer))
                        assert buffer == data
                    except TransientError:
                        lost += 1
                    try:
                        await cutting.put(f"packs/aa/{cut}", [data], if_absent=True)
                    except TransientError:
                        lost += 1
                    for name, wholes in ((f"packs/aa/{cut}", [data]), ("index/a", [b"1", bytes(2 * MIB)])):
                        with suppress(NotFound):
                            assert await connector.get(name) in wholes, "cut off, and made an object of"
        assert lost > 10

    async def test_a_bad_line_is_only_slow(self, server: S3Server, bucket: str, connector: S3Connector) -> None:
        objects = {f"packs/aa/{number}": os.urandom(random.Random(number).randrange(300_000)) for number in range(30)}
        async with Proxy(server.port) as proxy, server.connector(bucket, port=proxy.port, stall_s=10) as inner:
            proxy.cut_after_bytes = 800_000
            retrying = RetryConnector(inner, first_wait_s=0.01)
            async with anyio.create_task_group() as tasks:
                for name, data in objects.items():
                    tasks.start_soon(lambda name=name, data=data: retrying.put(name, [data], if_absent=True))  # type: ignore[misc]
            for name, data in objects.items():
                assert await retrying.get(name) == data
            assert await listed(retrying) == sorted(objects)

    @pytest.mark.parametrize("tls", [False, True])
    async def test_half_open_connections(self, bucket: str, tls: bool) -> None:
        server = shared_server(tls=tls)
        async with Proxy(server.port) as proxy, server.connector(bucket, port=proxy.port, stall_s=0.5) as other:
            await other.create()
            await other.put("index/a", [bytes(MIB)])
            assert len(await other.get("index/a")) == MIB
            proxy.blackhole = True
            for call in calls(other).values():
                with pytest.raises(ConnectionLost, match=r"no answer for 0\.5 s"):
                    await call()
            proxy.blackhole = False
            proxy.cut()
            assert len(await other.get("index/a")) == MIB

    async def test_a_server_that_stands_still(self, own_server: S3Server, bucket: str) -> None:
        async with own_server.connector(bucket, stall_s=0.5) as connector:
            await connector.create()
            own_server.pause(True)
            with pytest.raises(ConnectionLost):
                await connector.put("index/a", [bytes(16 * MIB)])
            own_server.pause(False)
            await connector.put("index/a", [b"1"])
            assert await connector.get("index/a") == b"1"

    async def test_delays_are_no_stalls(self, server: S3Server, bucket: str, connector: S3Connector) -> None:
        async with Proxy(server.port, delay_s=0.05) as proxy, server.connector(bucket, port=proxy.port) as far:
            await far.put("index/a", [bytes(8 * MIB)])
            assert len(await far.get("index/a")) == 8 * MIB

    async def test_a_lost_answer(self, server: S3Server, bucket: str, connector: S3Connector) -> None:
        """Put-if-absent took effect, nobody was told: it is neither taken for another's nor put over."""
        async with Proxy(server.port) as proxy, server.connector(bucket, port=proxy.port) as other:
            await other.create()  # so that connections are reused: aiohttp repeats requests on those by itself
            for size_bytes in (0, 100, 2 * MIB):
                data, name = os.urandom(size_bytes), f"snapshots/{size_bytes}"
                proxy.cut_answers = True
                with pytest.raises(ConnectionLost):
                    await other.put(name, [data], if_absent=True)
                assert await connector.get(name) == data
                proxy.cut_answers = False
                with pytest.raises(AlreadyExists):
                    await other.put(name, [os.urandom(size_bytes)], if_absent=True)
            failures: list[str] = []

            def noted(what: str, error: ConnectorError) -> None:
                failures.append(what)
                proxy.cut_answers = False

            proxy.cut_answers = True
            retrying = RetryConnector(other, first_wait_s=0.01, on_retry=noted)
            await retrying.put("snapshots/mine", [b"mine"], if_absent=True)
            assert len(failures) == 1
            with pytest.raises(AlreadyExists):
                await retrying.put("snapshots/mine", [b"other"], if_absent=True)

    async def test_idle_connections_are_closed(self, server: S3Server, bucket: str, connector: S3Connector) -> None:
        async with Proxy(server.port) as proxy, server.connector(bucket, port=proxy.port) as other:
            retrying = RetryConnector(other, first_wait_s=0.01)
            for number in range(5):
                await retrying.put(f"snapshots/{number}", [os.urandom(MIB)], if_absent=True)
                proxy.cut()

    async def test_a_server_that_is_restarted(self, own_server: S3Server, bucket: str) -> None:
        objects = {f"packs/aa/{number}": os.urandom(2 * MIB) for number in range(20)}
        async with own_server.connector(bucket, stall_s=10) as inner:
            await inner.create()
            retrying = RetryConnector(inner, first_wait_s=0.05)

            async def restart() -> None:
                for _ in range(3):
                    await anyio.sleep(0.05)
                    own_server.kill()
                    await anyio.sleep(0.1)
                    await anyio.to_thread.run_sync(own_server.start)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(restart)
                for name, data in objects.items():
                    await retrying.put(name, [data], if_absent=True)
            for name, data in objects.items():
                assert await retrying.get(name) == data
            assert await listed(retrying) == sorted(objects)


class TestFullDisk:
    async def test_nothing_is_left_behind(self, tmp_path: Path, bucket: str) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk: {done.stderr.strip()}")
        server = S3Server(tmp_path / "server", objects=disk)
        try:
            server.start()
            async with server.connector(bucket, single_bytes=12 * MIB, part_bytes=PART) as connector:
                await connector.create()
                data = os.urandom(10 * MIB)
                await connector.put("packs/aa/one", [data])
                for size_bytes in (12 * MIB, 16 * MIB, 40 * MIB):
                    for _ in range(2):
                        if size_bytes == 12 * MIB:
                            await connector.put("packs/aa/fill", [os.urandom(6 * MIB)])
                        with pytest.raises(StorageFull):
                            await connector.put("packs/aa/two", [bytes(size_bytes)], if_absent=True)
                assert await listed(connector) == ["packs/aa/fill", "packs/aa/one"]
                assert await uploads(connector) == []
                assert await connector.get("packs/aa/one") == data
                await connector.delete("packs/aa/fill")
                await connector.put("packs/aa/two", [data])
        finally:
            server.kill()
            subprocess.run(["umount", "-l", disk], check=True)


def answered(code: str, status: int = 400) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": "so it is"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


def translated(error: Exception) -> ConnectorError:
    with pytest.raises(ConnectorError) as raised, s3errors.mapped("s3://h/b/config"):
        raise error
    assert "s3://h/b/config" in str(raised.value)
    return raised.value


# What does not depend on server, network or user, but on us alone. Whoever adds to this has looked at it.
OURS = {
    *("BotoCoreError", "ClientError", "DataNotFoundError", "UnknownServiceError", "ApiVersionNotFoundError"),
    *("HTTPClientError", "UnknownSignatureVersionError", "MissingParametersError", "ValidationError"),
    *("UnknownKeyError", "RangeError", "UnknownParameterError", "AliasConflictParameterError", "ParamValidationError"),
    *("UnknownServiceStyle", "PaginationError", "OperationNotPageableError", "UnseekableStreamError", "WaiterError"),
    *("InvalidExpressionError", "WaiterConfigError", "UnknownClientMethodError", "AwsChunkedWrapperError"),
    *("UnsupportedSignatureVersionError", "UnsupportedS3ControlArnError", "UnsupportedOutpostResourceError"),
    *("UnsupportedS3ControlConfigurationError", "StubResponseError", "StubAssertionError", "UnStubbedResponseError"),
    *("MD5UnavailableError", "MissingDependencyException", "UnsupportedServiceProtocolsError", "EventStreamError"),
}


def library_errors() -> list[type[Exception]]:
    """The classes of errors of the libraries below us, of the versions that are installed."""
    modules = (botocore.exceptions, botocore.parsers, aiohttp.client_exceptions, aiohttp.http_exceptions)
    classes = {
        value
        for module in modules
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, Exception) and not issubclass(value, Warning)
        if value.__module__.partition(".")[0] in ("botocore", "aiohttp")
    }
    return sorted(classes, key=lambda each: each.__name__)


class TestErrors:
    @pytest.mark.parametrize("error_class", library_errors(), ids=lambda each: each.__name__)
    def test_every_class_is_mapped(self, error_class: type[Exception]) -> None:
        if error_class.__name__ in ("WSMessageTypeError", "NoInitialResponseError"):
            pytest.skip("there are no web sockets here")
        kind = s3errors.kind_of(error_class)
        if error_class in (ClientError, botocore.exceptions.EventStreamError):
            return  # by its code: below
        assert kind is not None, "add it to s3errors.KINDS"
        if error_class.__module__.startswith("botocore"):
            assert (kind is ConnectorError) == (error_class.__name__ in OURS), "add it to s3errors.KINDS"

    def test_no_kind_is_for_nothing(self) -> None:
        names = {base.__name__ for each in library_errors() for base in each.__mro__} | {"OSError", "EOFError"}
        assert set(s3errors.KINDS) - names <= {"UploadAbortedError"}  # of newer versions

    @pytest.mark.parametrize(
        ("code", "status", "kind", "text"),
        [
            ("NoSuchKey", 404, NotFound, ""),
            ("NoSuchBucket", 404, NotFound, "no such bucket"),
            ("404", 404, NotFound, ""),
            ("PreconditionFailed", 412, AlreadyExists, ""),
            ("InvalidRange", 416, InvalidRange, ""),
            ("ConditionalRequestConflict", 409, TransientError, ""),
            ("InsufficientStorage", 507, StorageFull, ""),
            ("507", 507, StorageFull, ""),
            ("QuotaExceeded", 403, StorageFull, ""),
            ("XMinioStorageFull", 507, StorageFull, ""),
            ("InvalidAccessKeyId", 403, PermissionRefused, "does not know the access key"),
            ("XAdminUserNotFound", 404, PermissionRefused, "does not know the access key"),
            ("SignatureDoesNotMatch", 403, PermissionRefused, "secret key is wrong"),
            ("RequestTimeTooSkewed", 403, PermissionRefused, "clocks"),
            ("ExpiredToken", 400, PermissionRefused, "log in"),
            ("AccessDenied", 403, PermissionRefused, "may not"),
            ("SomethingNew", 403, PermissionRefused, "SomethingNew"),
            ("SlowDown", 503, TransientError, ""),
            ("SlowDown", 429, TransientError, ""),
            ("InternalError", 200, TransientError, ""),
            ("InternalError", 500, TransientError, ""),
            ("502", 502, TransientError, ""),
            ("504", 504, TransientError, ""),
            ("RequestTimeout", 400, TransientError, ""),
            ("NotImplemented", 501, ConnectorError, "put-if-absent"),
            ("InvalidStorageClass", 400, InvalidLocation, "storage-class"),
            ("SomethingElse", 400, ConnectorError, "SomethingElse: so it is"),
        ],
    )
    def test_answers(self, code: str, status: int, kind: type[ConnectorError], text: str) -> None:
        error = translated(answered(code, status))
        assert isinstance(error, kind)
        assert error.retryable == issubclass(kind, TransientError)
        assert text in str(error)

    def test_wrapped_errors(self) -> None:
        def wrapped(error: Exception) -> ConnectorError:
            return translated(botocore.exceptions.HTTPClientError(error=error))

        assert isinstance(wrapped(OSError(errno.ECONNRESET, "Connection reset by peer")), ConnectionLost)
        assert isinstance(wrapped(aiohttp.ClientPayloadError("short")), ConnectionLost)
        assert isinstance(wrapped(TimeoutError()), ConnectionLost)
        assert not wrapped(ValueError("a bug")).retryable

    def test_bugs_stay_bugs(self) -> None:
        with pytest.raises(KeyError), s3errors.mapped("here"):
            raise KeyError("x")
