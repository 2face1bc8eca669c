"""Every clause of the contract in `coffret.connectors.base`, for every connector."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar

import anyio
import anyio.lowlevel
import pytest
from tests.connectors.stores import STORES, Store

from coffret.connectors.base import Arriving, Connector, ObjectInfo
from coffret.connectors.errors import AlreadyExists, InvalidName, InvalidRange, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.anyio

PAGE = 4096
MIB = 1 << 20
INVALID_NAMES = [
    "", "/", "a/", "/a", "a//b", "..", "../a", "a/../b", ".hidden", "a/.b", "-a", "A", "é", "a b", "a\n", "a\0", "a\\b",
    "a/b/c/d/e", "a" * 201, "tmp", "tmp/a",
]  # fmt: skip


@pytest.fixture(params=STORES, ids=lambda kind: kind.__name__.removesuffix("Store").lower())
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store: Store = request.param(tmp_path)
    yield store
    store.remove()


@pytest.fixture
async def connector(store: Store) -> AsyncIterator[Connector]:
    async with store.connector() as connector:
        await connector.create()
        yield connector


async def listed(connector: Connector, prefix: str = "") -> list[str]:
    return sorted([info.name async for info in connector.list(prefix)])


def aligned(data: bytes) -> memoryview:
    """The same bytes in a page-aligned buffer with room behind them."""
    buffer = mmap.mmap(-1, len(data) + 2 * PAGE)
    buffer[: len(data)] = data
    return memoryview(buffer)[: len(data)]


async def race(connectors: Sequence[Connector], size_bytes: int = 10) -> list[bytes]:
    """What thirty put at once that all want to be the first: the bodies of those that were told they are."""
    won: list[bytes] = []

    async def put(connector: Connector, data: bytes) -> None:
        try:
            await connector.put("snapshots/a", [aligned(data)], if_absent=True)
        except AlreadyExists:
            return
        won.append(data)

    async with anyio.create_task_group() as tasks:
        for number in range(30):
            tasks.start_soon(put, connectors[number % len(connectors)], bytes([number]) * size_bytes)
    return won


class TestPutAndGet:
    @pytest.mark.parametrize("if_absent", [False, True])
    async def test_what_was_put_is_stored(self, store: Store, connector: Connector, if_absent: bool) -> None:
        for size_bytes in (0, 1, PAGE - 1, PAGE, PAGE + 1, MIB, 3 * MIB + 17):
            data, name = os.urandom(size_bytes), f"packs/aa/{size_bytes}"
            await connector.put(name, [data], if_absent=if_absent)
            assert store.raw_get(name) == data
            assert await connector.get(name) == data
        assert len(store.raw_names()) == 7

    async def test_an_aligned_buffer_of_any_length(self, store: Store, connector: Connector) -> None:
        for blocks, tail_bytes in itertools.product((0, 255, 256, 2049), (0, 1, 511, PAGE - 1)):
            data = os.urandom(blocks * PAGE + tail_bytes)
            body = aligned(data)
            await connector.put("packs/aa/one", [body])
            body[:] = bytes(len(body))  # the buffer is its owner's again
            assert store.raw_get("packs/aa/one") == data

    async def test_a_large_buffer_at_any_address(self, store: Store, connector: Connector) -> None:
        data = os.urandom(2 * MIB + 5)
        for shift in (1, 16, 512):
            await connector.put("packs/aa/one", [aligned(data)[shift:]])
            assert store.raw_get("packs/aa/one") == data[shift:]

    async def test_a_body_of_many_parts(self, store: Store, connector: Connector) -> None:
        parts = [bytes([n % 256]) * (n % 5) for n in range(3000)]
        body = [kind(part) for part, kind in zip(parts, [bytes, bytearray, memoryview] * 1000, strict=True)]
        await connector.put("index/many", body)
        await connector.put("index/large", [aligned(os.urandom(MIB)), b"", aligned(bytes(2 * MIB + 1)), b"end"])
        await connector.put("index/none", [])
        assert store.raw_get("index/many") == b"".join(parts)
        assert len(await connector.get("index/large")) == 3 * MIB + 4
        assert await connector.get("index/none") == b""

    async def test_what_others_put_is_seen_at_once(self, store: Store, connector: Connector) -> None:
        async with store.connector() as other:
            for number in range(5):
                await other.put("leases/a", [b"%d" % number])
                assert await connector.get("leases/a") == b"%d" % number
                await other.put(f"index/{number}", [b""])
                assert f"index/{number}" in await listed(connector)
                await other.delete(f"index/{number}")
                assert f"index/{number}" not in await listed(connector)

    async def test_many_at_once(self, connector: Connector) -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(60):
                tasks.start_soon(connector.put, f"index/{number}", [b"%d" % number])
        for number in range(60):
            assert await connector.get(f"index/{number}") == b"%d" % number


class Slowly(Arriving):
    """A body that comes in by pieces; `refused`: it turns out that it must not be stored."""

    def __init__(self, data: bytes, *, refused: Exception | None = None) -> None:
        self.view = aligned(bytes(len(data)))
        self._data, self._refused = data, refused

    async def reach(self, size_bytes: int) -> None:
        await anyio.lowlevel.checkpoint()
        # Nothing behind it: who reads further than he has waited for stores zeros.
        self.view[:size_bytes] = self._data[:size_bytes]

    async def accept(self) -> None:
        await super().accept()
        if self._refused:
            raise self._refused


class TestArriving:
    @pytest.mark.parametrize("if_absent", [False, True])
    async def test_what_has_come_in_is_stored(self, store: Store, connector: Connector, if_absent: bool) -> None:
        for size_bytes in (0, 1, PAGE, MIB + 1, 4 * MIB, 9 * MIB + 17):
            data, name = os.urandom(size_bytes), f"packs/aa/{size_bytes}"
            await connector.put_arriving(name, Slowly(data), if_absent=if_absent)
            assert store.raw_get(name) == data
        assert len(store.raw_names()) == 6

    async def test_a_name_that_is_taken(self, store: Store, connector: Connector) -> None:
        await connector.put("packs/aa/one", [b"1"])
        with pytest.raises(AlreadyExists):
            await connector.put_arriving("packs/aa/one", Slowly(bytes(5 * MIB)), if_absent=True)
        assert store.raw_get("packs/aa/one") == b"1"
        await connector.put_arriving("packs/aa/one", Slowly(b"2"))
        assert store.raw_get("packs/aa/one") == b"2"

    async def test_what_must_not_be_stored_is_not(self, store: Store, connector: Connector) -> None:
        with pytest.raises(ZeroDivisionError):
            await connector.put_arriving("packs/aa/one", Slowly(bytes(9 * MIB), refused=ZeroDivisionError()))
        assert store.raw_names() == set()

    async def test_a_sender_that_goes_away(self, store: Store, connector: Connector) -> None:
        class Gone(Slowly):
            async def reach(self, size_bytes: int) -> None:
                if size_bytes > 5 * MIB:
                    reached.set()
                    await anyio.sleep_forever()
                await super().reach(size_bytes)

        reached = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connector.put_arriving, "packs/aa/one", Gone(bytes(9 * MIB)))
            await reached.wait()
            tasks.cancel_scope.cancel()
        assert store.raw_names() == set()


class TestRanges:
    DATA = bytes(range(256)) * 20
    SIZE = len(DATA)
    WITHIN = ((0, 0), (0, 1), (0, None), (7, 100), (SIZE - 1, 1), (SIZE, 0), (SIZE, None), (100, SIZE - 100))
    OUTSIDE = ((0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (SIZE + 1, None), (-1, 1), (1, -1))

    async def test_within_the_object(self, connector: Connector) -> None:
        await connector.put("index/a", [self.DATA])
        for offset, length in self.WITHIN:
            expected = self.DATA[offset:] if length is None else self.DATA[offset : offset + length]
            assert await connector.get("index/a", offset=offset, length=length) == expected
            buffer = bytearray(len(expected) + 2)
            await connector.get_into("index/a", offset, memoryview(buffer)[1:-1])
            assert buffer == b"\0" + expected + b"\0"

    async def test_outside_the_object(self, connector: Connector) -> None:
        await connector.put("index/a", [self.DATA])
        for offset, length in self.OUTSIDE:
            with pytest.raises(InvalidRange):
                await connector.get("index/a", offset=offset, length=length)
            if length is not None and length >= 0:
                with pytest.raises(InvalidRange):
                    await connector.get_into("index/a", offset, memoryview(bytearray(length)))

    async def test_an_empty_object(self, connector: Connector) -> None:
        await connector.put("index/a", [])
        assert await connector.get("index/a") == await connector.get("index/a", offset=0, length=0) == b""
        with pytest.raises(InvalidRange):
            await connector.get("index/a", offset=0, length=1)

    async def test_of_unknown_size(self, connector: Connector) -> None:
        large = os.urandom(3 * MIB)
        for data in (b"", b"1", self.DATA, large):
            await connector.put("index/a", [data])
            for limit_bytes in (1, self.SIZE - 1, self.SIZE, self.SIZE + 1, 2 * MIB, 4 * MIB):
                assert await connector.peek("index/a", limit_bytes) == data[:limit_bytes]

    async def test_large_into_an_aligned_buffer(self, connector: Connector) -> None:
        data = os.urandom(5 * MIB + 3)
        await connector.put("packs/aa/one", [aligned(data)])
        buffer = aligned(bytes(4 * MIB))
        for offset in (0, PAGE, 12345, len(data) - len(buffer)):
            await connector.get_into("packs/aa/one", offset, buffer)
            assert buffer == data[offset : offset + len(buffer)]


async def test_lists_in_turns(connector: Connector) -> None:
    names = {f"{folder}/{number}" for folder in ("trash", "index", "removed") for number in range(3)}
    for name in names:
        await connector.put(name, [name.encode()])
    found = await connector.list_turns([("trash/",), ("index/",), ("snapshots/", "removed/")])
    assert found.keys() == {"trash/", "index/", "snapshots/", "removed/"}
    for prefix, infos in found.items():
        expected = [(name, len(name)) for name in sorted(names) if name.startswith(prefix)]
        assert sorted((info.name, info.size_bytes) for info in infos) == expected


class TestAbsence:
    async def test_no_such_object(self, connector: Connector) -> None:
        await connector.put("packs/aa/one", [b"1"])
        await connector.put("index/a", [b"2"])
        for name in ("config", "packs", "packs/aa", "packs/aa/none", "other/deep/er", "index/a/below"):
            with pytest.raises(NotFound):
                await connector.get(name)
            with pytest.raises(NotFound):
                await connector.get_into(name, 0, memoryview(bytearray(1)))
            with pytest.raises(NotFound):
                await connector.peek(name, 10)
            with pytest.raises(NotFound):
                await connector.stat(name)
            await connector.delete(name)
        assert await listed(connector) == ["index/a", "packs/aa/one"]

    async def test_deleted(self, store: Store, connector: Connector) -> None:
        await connector.put("index/a", [b"1"])
        await connector.delete("index/a")
        await connector.delete("index/a")
        assert store.raw_names() == set()
        await connector.put("index/a", [b"2"], if_absent=True)
        assert await connector.get("index/a") == b"2"

    async def test_invalid_names(self, store: Store, connector: Connector) -> None:
        for name in INVALID_NAMES:
            for call in (
                connector.put(name, [b""]),
                connector.put(name, [b""], if_absent=True),
                connector.get(name),
                connector.get_into(name, 0, memoryview(bytearray(1))),
                connector.peek(name, 1),
                connector.stat(name),
                connector.delete(name),
            ):
                with pytest.raises(InvalidName):
                    await call
        assert store.raw_names() == set()
        for prefix in set(INVALID_NAMES) - {"", "a/"}:
            with pytest.raises(InvalidName):
                await listed(connector, prefix)


class TestPutIfAbsent:
    async def test_a_taken_name(self, store: Store, connector: Connector) -> None:
        await connector.put("snapshots/a", [b"first"], if_absent=True)
        for body in (b"first", b"second", bytes(2 * MIB)):
            with pytest.raises(AlreadyExists):
                await connector.put("snapshots/a", [body], if_absent=True)
        assert store.raw_get("snapshots/a") == b"first"
        assert store.raw_names() == {"snapshots/a"}

    @pytest.mark.parametrize("size_bytes", [10, 2 * MIB])
    async def test_of_racing_puts_one_wins(self, store: Store, connector: Connector, size_bytes: int) -> None:
        async with store.connector() as other:
            won = await race([connector, other], size_bytes)
        assert [store.raw_get("snapshots/a")] == won
        assert store.raw_names() == {"snapshots/a"}


class TestReplace:
    async def test_a_reader_sees_one_or_the_other(self, connector: Connector) -> None:
        bodies = [b"a" * 10, b"b" * (2 * MIB + 3)]
        await connector.put("leases/a", [bodies[0]])
        seen = 0

        async def read() -> None:
            nonlocal seen
            while True:
                assert await connector.get("leases/a") in bodies
                assert (await connector.stat("leases/a")).size_bytes in map(len, bodies)
                assert await listed(connector) == ["leases/a"]
                seen += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for body in itertools.cycle(map(aligned, bodies)):
                await connector.put("leases/a", [body])
                await anyio.lowlevel.checkpoint()
                if seen >= 20:
                    break
            tasks.cancel_scope.cancel()

    async def test_the_time_moves_on(self, store: Store, connector: Connector) -> None:
        await connector.put("leases/a", [b"1"])
        first = await connector.stat("leases/a")
        await anyio.sleep(store.tick_s)
        await connector.put("leases/a", [b"23"])
        second = await connector.stat("leases/a")
        assert second.mtime_s > first.mtime_s
        assert second == ObjectInfo("leases/a", 2, second.mtime_s)


class TestList:
    NAMES = ("config", "keys/k", "packs/0f/one", "packs/0f/two", "packs/f0/three", "snapshots/s", "trash/5-seen")
    PREFIXES: ClassVar = {
        "": NAMES,
        "packs/": NAMES[2:5],
        "packs/0f/": NAMES[2:4],
        "packs/0": NAMES[2:4],
        "packs/0f/t": NAMES[3:4],
        "trash/5": NAMES[6:],
        "c": NAMES[:1],
        "config": NAMES[:1],
        "config/": (),
        "leases/": (),
        "other/": (),
        "packs/0f/one/": (),
    }

    async def test_by_prefix(self, connector: Connector) -> None:
        for name in self.NAMES:
            await connector.put(name, [name.encode()])
        for prefix, expected in self.PREFIXES.items():
            infos = [info async for info in connector.list(prefix)]
            assert sorted(info.name for info in infos) == sorted(expected)
            for info in infos:
                assert info == await connector.stat(info.name)
                assert info.size_bytes == len(info.name)

    async def test_while_it_changes(self, store: Store, connector: Connector) -> None:
        stay = {f"index/{number}" for number in range(100)}
        moved = {f"leases/{number}" for number in range(1500)}
        gone = {f"trash/{number}" for number in range(50)}
        for name in stay | moved | gone:
            store.raw_set(name, b"")
        names: list[str] = []
        async with aclosing(connector.list("")) as infos:  # type: ignore[type-var]
            async for info in infos:
                if len(names) in (0, 900):
                    for name in moved:
                        store.raw_set(name, b"")
                    for number in range(10):
                        store.raw_set(f"index/new-{len(names)}-{number}", b"")
                        store.raw_delete(gone.pop()) if gone else None
                names.append(info.name)
        assert len(set(names)) == len(names)
        assert set(names) >= stay | moved

    async def test_given_up_early(self, store: Store, connector: Connector) -> None:
        for number in range(50):
            store.raw_set(f"index/{number}", b"")
        async with aclosing(connector.list("")) as infos:  # type: ignore[type-var]
            async for _ in infos:
                break
        assert len(await listed(connector)) == 50


class TestCancellation:
    """A cancelled put leaves the object whole or absent, and the buffer is its owner's again at once."""

    NAMES = tuple(f"packs/aa/{number}" for number in range(12))
    DATA = random.Random(1).randbytes(4 * MIB + 1)

    @pytest.fixture
    async def body(self, store: Store, connector: Connector) -> AsyncIterator[memoryview]:
        body = aligned(self.DATA)
        yield body
        await anyio.sleep(0.05)  # for a thread that was left behind
        assert store.raw_names() <= set(self.NAMES)
        for name in self.NAMES:
            assert store.raw_get(name) in (None, self.DATA)

    @pytest.mark.parametrize("if_absent", [False, True])
    async def test_by_a_scope(self, store: Store, connector: Connector, body: memoryview, if_absent: bool) -> None:
        for number, name in enumerate(self.NAMES):
            body[:] = self.DATA
            with anyio.move_on_after(number * 0.0005):
                await connector.put(name, [body], if_absent=if_absent)
            assert store.raw_names() <= set(self.NAMES)
            body[:] = bytes(len(body))

    async def test_of_a_task(self, store: Store, connector: Connector, body: memoryview) -> None:
        for number, name in enumerate(self.NAMES):
            body[:] = self.DATA
            task = asyncio.create_task(connector.put(name, [body]))
            await asyncio.sleep(number * 0.0005)
            task.cancel()
            await asyncio.wait([task])
            assert store.raw_names() <= set(self.NAMES)
            body[:] = bytes(len(body))

    async def test_it_works_on_afterwards(self, connector: Connector) -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(40):
                tasks.start_soon(connector.put, f"index/{number}", [bytes(MIB)])
            await anyio.sleep(0.002)
            tasks.cancel_scope.cancel()
        await connector.put("index/last", [b"1"])
        assert await connector.get("index/last") == b"1"


class TestCreate:
    async def test_again(self, store: Store, connector: Connector) -> None:
        await connector.create()
        assert await listed(connector) == []
        await connector.put("keys/a", [b"1"])
        await connector.create()  # cut short before config was put
        await connector.put("config", [b"{}"], if_absent=True)
        await connector.put("snapshots/a", [b"2"])
        await connector.create()
        assert await listed(connector) == ["config", "keys/a", "snapshots/a"]

    async def test_the_location_is_the_same_for_all(self, store: Store, connector: Connector) -> None:
        async with store.connector() as other:
            assert other.location == connector.location
            assert "://" in connector.location
