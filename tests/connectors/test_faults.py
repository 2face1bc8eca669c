"""The connector that fails when told to."""

from __future__ import annotations

import pytest
from tests.connectors.test_conformance import listed

from coffret.connectors.errors import ConnectionLost, NotFound, TransientError
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.memory import MemoryConnector

pytestmark = pytest.mark.anyio


async def test_without_faults_it_is_the_inner_one() -> None:
    inner = MemoryConnector("inner")
    async with FaultyConnector(inner, latency_s=0.001) as connector:
        await connector.create()
        await connector.put("index/a", [b"abc"])
        buffer = bytearray(2)
        await connector.get_into("index/a", 1, memoryview(buffer))
        assert await connector.get("index/a") == b"abc"
        assert buffer == b"bc"
        assert await listed(connector) == ["index/a"]
        assert await connector.stat("index/a") == await inner.stat("index/a")
        await connector.delete("index/a")
        assert (connector.location, connector.capabilities) == (inner.location, inner.capabilities)
    assert [method for method, _ in connector.calls] == ["create", "put", "get_into", "get", "list", "stat", "delete"]


async def test_a_call_fails_before_or_after_its_effect() -> None:
    inner = MemoryConnector()
    connector = FaultyConnector(
        inner,
        fail_before={0: TransientError("no"), 3: TransientError("no")},
        fail_after={1: ConnectionLost("lost"), 4: ConnectionLost("lost")},
    )
    with pytest.raises(TransientError):
        await connector.put("index/a", [b"1"])
    with pytest.raises(ConnectionLost):
        await connector.put("index/b", [b"2"])
    assert await listed(connector) == ["index/b"]
    for expected in (TransientError, ConnectionLost):
        with pytest.raises(expected):
            await listed(connector)
    with pytest.raises(NotFound):
        await connector.get("index/a")


async def test_a_short_read() -> None:
    connector = FaultyConnector(MemoryConnector(), short_reads={1})
    await connector.put("index/a", [b"abcd"])
    assert await connector.get("index/a") == b"ab"
    assert await connector.get("index/a") == b"abcd"


async def test_hooks_stand_around_the_effect() -> None:
    inner = MemoryConnector()
    seen: list[tuple[str, str, bool]] = []

    async def before(method: str, name: str) -> None:
        seen.append((method, name, bool(await listed(inner))))

    connector = FaultyConnector(inner, before=before, after=before)
    await connector.put("index/a", [b"1"])
    await connector.delete("index/a")
    assert seen == [
        ("put", "index/a", False),
        ("put", "index/a", True),
        ("delete", "index/a", True),
        ("delete", "index/a", False),
    ]
