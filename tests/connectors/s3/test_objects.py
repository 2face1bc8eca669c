"""What only S3 has of objects: buckets, pages of a list, parts, and what is sent of a buffer."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tests.connectors.s3.tools import PART, calls, uploads
from tests.connectors.s3_server import S3Server, shared_server
from tests.connectors.test_conformance import MIB, aligned, listed

from coffret.connectors import s3client
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectorError,
    InvalidLocation,
    NotFound,
    NotStorage,
    StorageFull,
)
from coffret.connectors.limit import Bucket, LimitConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from coffret.connectors.s3 import S3Connector
    from coffret.connectors.s3client import Answer


pytestmark = pytest.mark.anyio


@pytest.fixture
async def in_parts(server: S3Server, bucket: str) -> AsyncIterator[S3Connector]:
    """One that sends what is larger than 5 MiB in parts."""
    async with server.connector(bucket, single_bytes=PART, part_bytes=PART) as connector:
        await connector.create()
        yield connector


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
    async def test_an_object_that_is_listed_twice(
        self, connector: S3Connector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As rclone's server does with one that is replaced meanwhile."""
        for name in ("leases/a", "leases/b"):
            await connector.put(name, [b"1"])
        ask = connector._list

        async def doubled(**arguments: object) -> Answer:
            page = await ask(**arguments)
            return page | {"Contents": [entry for entry in page["Contents"] for _ in range(2)]}

        monkeypatch.setattr(connector, "_list", doubled)
        assert await listed(connector) == ["leases/a", "leases/b"]

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
