"""S3 over bad networks, on servers that end, and on a full disk."""

# ruff: noqa: ASYNC221 - here nothing else waits for the event loop

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tests.connectors.proxy import Proxy
from tests.connectors.s3.tools import PART, calls, uploads
from tests.connectors.s3_server import S3Server, shared_server
from tests.connectors.servers import free_port
from tests.connectors.test_conformance import MIB, listed

from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    InvalidLocation,
    NotFound,
    StorageFull,
    TransientError,
)
from coffret.connectors.registry import open_connector
from coffret.connectors.retry import RetryConnector

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coffret.connectors.s3 import S3Connector


pytestmark = pytest.mark.anyio


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[S3Server]:
    """One that the test may kill."""
    server = S3Server(tmp_path / "server")
    server.start()
    yield server
    server.kill()


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
        async with Proxy(server.port) as proxy, server.connector(bucket, port=proxy.port) as other:
            await other.create()
            await other.put("index/a", [bytes(MIB)])
            assert len(await other.get("index/a")) == MIB
            proxy.blackhole = True
            patience_s, other._client.stall_s = other._client.stall_s, 0.5
            for call in calls(other).values():
                with pytest.raises(ConnectionLost, match=r"no answer for 0\.5 s"):
                    await call()
            other._client.stall_s = patience_s
            proxy.blackhole = False
            proxy.cut()
            assert len(await other.get("index/a")) == MIB

    async def test_a_server_that_stands_still(self, own_server: S3Server, bucket: str) -> None:
        async with own_server.connector(bucket) as connector:
            await connector.create()
            own_server.pause(True)
            patience_s, connector._client.stall_s = connector._client.stall_s, 0.5
            with pytest.raises(ConnectionLost):
                await connector.put("index/a", [bytes(16 * MIB)])
            connector._client.stall_s = patience_s
            own_server.pause(False)
            await connector.put("index/a", [b"1"])
            assert await connector.get("index/a") == b"1"
        # What was left in the buffer of the given up connection goes nowhere: else uvloop's would outlive its loop.
        own_server.kill()
        await anyio.sleep(0.1)

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
