"""Retry, limit and trace: connectors around a connector."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio
import pytest

from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    NotFound,
    PermissionRefused,
    StorageFull,
    TransientError,
)
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.limit import Bucket, LimitConnector, Pace
from coffret.connectors.memory import MemoryConnector
from coffret.connectors.retry import RetryConnector
from coffret.connectors.trace import TraceConnector
from coffret.connectors.wrapper import Wrapper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coffret.connectors.base import Buffer, Connector, ObjectInfo

pytestmark = pytest.mark.anyio
BODY: list[Buffer] = [b"12", memoryview(b"345")]


def retrying(inner: Connector, *, give_up_s: float = 60.0) -> RetryConnector:
    return RetryConnector(inner, give_up_s=give_up_s, first_wait_s=0.001)


class TestRetry:
    async def test_every_call_is_repeated(self) -> None:
        failures = {number: (TransientError, ConnectionLost)[number % 2]("busy") for number in range(0, 40, 2)}
        faulty = FaultyConnector(MemoryConnector(), fail_before=failures)
        told: list[str] = []
        connector = RetryConnector(faulty, first_wait_s=0.001, on_retry=lambda what, _: told.append(what))
        await connector.create()
        await connector.put("index/a", BODY)
        await connector.put("index/b", BODY, if_absent=True)
        assert await connector.get("index/a", offset=1, length=3) == b"234"
        buffer = bytearray(3)
        await connector.get_into("index/b", 2, memoryview(buffer))
        assert buffer == b"345"
        assert await connector.peek("index/a", 3) == b"123"
        assert (await connector.stat("index/a")).size_bytes == 5
        assert [info.name async for info in connector.list("index/")] == ["index/a", "index/b"]
        await connector.delete("index/a")
        assert [info.name async for info in connector.list("index/")] == ["index/b"]
        assert [method for method, _ in faulty.calls[1::2]] == [method for method, _ in faulty.calls[::2]]
        read = ("get index/a", "get index/b", "get index/a", "stat index/a", "list index/")
        assert told == ["create", "put index/a", "put index/b", *read, "delete index/a", "list index/"]

    async def test_a_lost_answer_of_a_put_if_absent(self) -> None:
        """The put took place: its own bytes are there."""
        memory = MemoryConnector()
        connector = retrying(FaultyConnector(memory, fail_after={0: ConnectionLost("reset")}))
        await connector.put("snapshots/a", BODY, if_absent=True)
        assert await memory.get("snapshots/a") == b"12345"

    @pytest.mark.parametrize("other", [b"54321", b"1234", b"123456", b""])
    async def test_a_lost_answer_and_another_was_faster(self, other: bytes) -> None:
        memory = MemoryConnector()

        async def before(method: str, name: str) -> None:
            if method == "put":
                await memory.put(name, [other])

        faulty = FaultyConnector(memory, before=before, fail_before={0: ConnectionLost("reset")})
        with pytest.raises(AlreadyExists):
            await retrying(faulty).put("snapshots/a", BODY, if_absent=True)
        assert await memory.get("snapshots/a") == other

    async def test_a_taken_name_is_no_lost_answer(self) -> None:
        memory = MemoryConnector()
        await memory.put("snapshots/a", BODY)
        with pytest.raises(AlreadyExists):
            await retrying(memory).put("snapshots/a", BODY, if_absent=True)

    @pytest.mark.parametrize("error", [NotFound, PermissionRefused, StorageFull])
    async def test_what_does_not_pass_is_raised_at_once(self, error: type[Exception]) -> None:
        faulty = FaultyConnector(MemoryConnector(), fail_before={0: error("no")})
        with pytest.raises(error):
            await retrying(faulty).put("index/a", BODY)
        assert len(faulty.calls) == 1

    async def test_it_gives_up(self) -> None:
        faulty = FaultyConnector(MemoryConnector(), fail_before={n: TransientError(f"{n}") for n in range(100)})
        with pytest.raises(TransientError) as raised:
            await retrying(faulty, give_up_s=0.05).get("index/a")
        assert 2 <= len(faulty.calls) <= 50
        assert str(raised.value) == str(len(faulty.calls) - 1)

    async def test_what_never_answered_is_given_up_sooner(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("coffret.connectors.retry.FIRST_GIVE_UP_S", 0.0)
        memory = MemoryConnector()
        faulty = FaultyConnector(memory, fail_before={0: ConnectionLost("refused"), 2: ConnectionLost("restarted")})
        connector = retrying(faulty)
        with pytest.raises(ConnectionLost):
            await connector.stat("config")
        with pytest.raises(NotFound):
            await connector.stat("config")
        with pytest.raises(NotFound):
            await connector.stat("config")
        assert len(faulty.calls) == 4

    async def test_a_short_answer_is_asked_for_again(self) -> None:
        memory = MemoryConnector()
        await memory.put("index/a", BODY)
        faulty = FaultyConnector(memory, short_reads={0})
        assert await retrying(faulty).get("index/a", length=5) == b"12345"
        assert len(faulty.calls) == 2

    async def test_a_listing_that_breaks_off_is_taken_up(self) -> None:
        names = [f"index/{number:03}" for number in range(100)]
        ordered = BreakingLists(MemoryConnector(), ordered=True)
        for name in names:
            await ordered.put(name, [])
        assert [info.name async for info in retrying(ordered).list("index/")] == names
        assert ordered.broken == 9

    async def test_a_listing_without_an_order_can_not_be_taken_up(self) -> None:
        unordered = BreakingLists(MemoryConnector(), ordered=False)
        for number in range(100):
            await unordered.put(f"index/{number}", [])
        with pytest.raises(ConnectionLost):
            assert [info async for info in retrying(unordered).list("index/")]
        assert unordered.broken == 1


class BreakingLists(Wrapper):
    """Its listings break off after 1, 11, 21 … objects."""

    def __init__(self, inner: MemoryConnector, *, ordered: bool) -> None:
        super().__init__(inner)
        inner.capabilities = type(inner.capabilities)(ordered_lists=ordered)
        self.broken = 0

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        found = [info async for info in self.inner.list(prefix)]
        for number, info in enumerate(sorted(found, key=lambda info: info.name)):
            if number == 10 * self.broken + 1 and number < 90:
                self.broken += 1
                raise ConnectionLost("cut")
            yield info


class TestLimit:
    @pytest.fixture
    def slept(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """A clock that moves when somebody sleeps, and how long they did."""
        durations: list[float] = []

        async def sleep(duration_s: float) -> None:
            durations.append(duration_s)

        monkeypatch.setattr("coffret.connectors.limit.anyio.current_time", lambda: 1000.0 + sum(durations))
        monkeypatch.setattr("coffret.connectors.limit.anyio.sleep", sleep)
        return durations

    async def test_the_rate_over_all_transfers(self, slept: list[float]) -> None:
        bucket = Bucket(1000.0)
        for size_bytes in random.Random(1).choices(range(1, 5000), k=50):
            await bucket.take(size_bytes)
        total = sum(random.Random(1).choices(range(1, 5000), k=50))
        last = random.Random(1).choices(range(1, 5000), k=50)[-1]
        assert (total - last) / 1000 - 0.25 <= sum(slept) <= total / 1000

    async def test_no_limit_is_no_wait(self, slept: list[float]) -> None:
        await Bucket(None).take(1 << 40)
        assert not slept

    async def test_whole_objects_are_paid_for(self, slept: list[float]) -> None:
        connector = LimitConnector(MemoryConnector(), upload=10.0, download=5.0)
        for number in range(3):
            await connector.put(f"index/{number}", BODY)
        up = sum(slept)
        assert 0.5 <= up <= 1.5
        for number in range(3):
            assert await connector.get(f"index/{number}") == b"12345"
            await connector.get_into(f"index/{number}", 0, memoryview(bytearray(5)))
        assert 4.5 <= sum(slept) - up <= 6.0

    async def test_one_that_paces_itself_is_left_to_it(self, slept: list[float]) -> None:
        inner = Pacing(MemoryConnector())
        connector = LimitConnector(TraceConnector(inner), upload=1.0)
        await connector.put("index/a", BODY)
        await connector.put("index/b", BODY)
        assert inner.pace is not None
        assert inner.pace.upload.limited
        assert not inner.pace.download.limited
        assert not slept


class Pacing(Wrapper):
    """Says that it paces itself, and does not."""

    pace: Pace | None = None

    def set_pace(self, pace: Pace) -> bool:
        self.pace = pace
        return True


class TestTrace:
    async def test_calls_are_counted(self) -> None:
        told: list[tuple[str, str, int, str]] = []
        faulty = FaultyConnector(MemoryConnector(), fail_before={1: TransientError("busy")})
        connector = TraceConnector(faulty, on_call=lambda m, n, b, _, e: told.append((m, n, b, e)))
        await connector.put("index/a", BODY)
        with pytest.raises(TransientError):
            await connector.put("index/b", BODY)
        await connector.get("index/a", length=2)
        await connector.get_into("index/a", 0, memoryview(bytearray(3)))
        assert [info.name async for info in connector.list("")] == ["index/a"]
        await connector.stat("index/a")
        await connector.delete("index/a")
        assert told[:3] == [
            ("put", "index/a", 5, ""), ("put", "index/b", 0, "TransientError"), ("get", "index/a", 2, "")
        ]  # fmt: skip
        calls = connector.calls
        assert {method: (c.calls, c.failed, c.size_bytes) for method, c in calls.items()} == {
            "put": (2, 1, 5), "get": (2, 0, 5), "list": (1, 0, 0), "stat": (1, 0, 0), "delete": (1, 0, 0)
        }  # fmt: skip

    async def test_latencies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = 0.0

        async def before(method: str, name: str) -> None:
            nonlocal clock
            clock += float(name.partition("/")[2]) / 1000

        monkeypatch.setattr("coffret.connectors.trace.time.perf_counter", lambda: clock)
        connector = TraceConnector(FaultyConnector(MemoryConnector(), before=before))
        for milliseconds in range(1, 101):
            await connector.put(f"index/{milliseconds}", [])
        puts = connector.calls["put"]
        assert puts.total_s == pytest.approx(5.05)
        for share in (0.5, 0.9, 0.99):
            assert share * 0.1 <= puts.latency_s(share) <= share * 0.1 * 1.26


async def test_wrapped_thrice_it_is_still_a_storage() -> None:
    connector = RetryConnector(LimitConnector(TraceConnector(MemoryConnector("x"))))
    async with connector:
        assert connector.location == "memory://x"
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(connector.put, f"index/{number}", BODY)
        assert len([info async for info in connector.list("index/")]) == 20
        assert not connector.places
        assert not connector.notes
