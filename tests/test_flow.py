"""Channels and waiters: bounds, ends, and that cancelling anybody loses nothing and wakes the next."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

from coffret.engine.flow import Channel, Waiters, together

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio
# Far above what anything here takes: a test that hangs is to say so.
PATIENCE_S = 30.0


def channel(max_items: int = 4, max_bytes: int = 100) -> Channel[int]:
    """A channel of integers, each as large as its value."""
    return Channel("test", max_items=max_items, max_bytes=max_bytes, size=lambda item: item)


async def settle() -> None:
    """Let every other task run until it waits."""
    for _ in range(20):
        await checkpoint()


class TestTogether:
    async def test_results_come_in_order(self) -> None:
        async def after(count: int) -> int:
            for _ in range(count):
                await checkpoint()
            return count

        assert await together(lambda: after(5), lambda: after(0), lambda: after(2)) == [5, 0, 2]

    async def test_one_that_fails_ends_the_others_and_is_raised_as_it_is(self) -> None:
        ended: list[str] = []

        async def waits() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("waits")

        async def fails() -> None:
            await settle()
            raise ValueError("so it is")

        with pytest.raises(ValueError, match="so it is"):
            await together(waits, fails)
        assert ended == ["waits"]


class TestWaiters:
    async def test_the_longest_waiting_goes_first(self) -> None:
        waiters, order = Waiters(), list[int]()

        async def wait(number: int) -> None:
            await waiters.wait()
            order.append(number)

        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(wait, number)
                await settle()
            waiters.wake(2)
            await settle()
            assert order == [0, 1]
            waiters.wake_all()
        assert order == [0, 1, 2, 3]

    async def test_a_wake_up_is_not_kept(self) -> None:
        waiters = Waiters()
        waiters.wake(3)
        with anyio.move_on_after(0) as scope:
            await waiters.wait()
        assert scope.cancelled_caught

    async def test_one_that_is_cancelled_waits_no_more(self) -> None:
        waiters, woken = Waiters(), list[int]()

        async def wait(number: int, scope: anyio.CancelScope) -> None:
            with scope:
                await waiters.wait()
                woken.append(number)

        scopes = [anyio.CancelScope() for _ in range(3)]
        async with anyio.create_task_group() as group:
            for number, scope in enumerate(scopes):
                group.start_soon(wait, number, scope)
                await settle()
            scopes[0].cancel()
            await settle()
            waiters.wake()
            await settle()
            assert woken == [1]
            waiters.wake()
        assert woken == [1, 2]

    async def test_a_wake_up_for_one_that_is_being_cancelled_is_passed_on(self) -> None:
        """Both in the same step of the loop, in either order: whoever still waits gets it."""
        for wake_first in (True, False):
            waiters, woken = Waiters(), list[int]()

            async def wait(
                number: int, scope: anyio.CancelScope, waiters: Waiters = waiters, woken: list[int] = woken
            ) -> None:
                with scope:
                    await waiters.wait()
                    woken.append(number)

            scopes = [anyio.CancelScope() for _ in range(2)]
            async with anyio.create_task_group() as group:
                for number, scope in enumerate(scopes):
                    group.start_soon(wait, number, scope)
                    await settle()
                if wake_first:
                    waiters.wake()
                scopes[0].cancel()
                if not wake_first:
                    waiters.wake()
                await settle()
                # An event that is set may also reach its task before the cancellation does.
                assert woken in ([0], [1])
                waiters.wake_all()

    @pytest.mark.parametrize("seed", range(20))
    async def test_no_wake_up_is_lost_among_many_that_come_and_go(self, seed: int) -> None:
        """A counter of permits, the plainest user: while there are permits, nobody waits for long."""
        chance, waiters, permits, waiting = random.Random(seed), Waiters(), 0, 0

        async def take(patience: int) -> None:
            nonlocal permits, waiting
            with anyio.CancelScope() as scope:
                group.start_soon(cancel_later, scope, patience)
                while not permits:
                    waiting += 1
                    try:
                        await waiters.wait()
                    finally:
                        waiting -= 1
                permits -= 1

        async def cancel_later(scope: anyio.CancelScope, patience: int) -> None:
            for _ in range(patience):
                await checkpoint()
            scope.cancel()

        async with anyio.create_task_group() as group:
            for _ in range(200):
                if chance.random() < 0.6:
                    group.start_soon(take, chance.choice([0, 1, 2, 5, 60]))
                else:
                    permits += 1
                    waiters.wake()
                if chance.random() < 0.4:
                    await checkpoint()
                if chance.random() < 0.1:
                    await settle()
                    assert not (permits and waiting)


class TestChannel:
    async def test_order_and_end(self) -> None:
        pipe, got = channel(), list[int]()

        async def produce() -> None:
            with outlet:
                for item in range(50):
                    await outlet.send(item)

        outlet = pipe.sender()
        async with anyio.create_task_group() as group:
            group.start_soon(produce)
            async for item in pipe:
                got.append(item)
        assert got == list(range(50))
        with pytest.raises(anyio.EndOfStream):
            await pipe.receive()

    @pytest.mark.parametrize(
        ("sizes", "let_in"),
        [
            ([1] * 9, 4),  # by number
            ([60, 40, 1], 2),  # by bytes, up to the last
            ([60, 41], 1),
            ([1000, 1], 1),  # one always fits, and then nothing
            ([1, 1000], 1),
            ([0, 0, 0, 0, 0], 4),
        ],
    )
    async def test_bounds(self, sizes: list[int], let_in: int) -> None:
        pipe, sent = channel(), list[int]()

        async def produce() -> None:
            for size in sizes:
                await pipe.send(size)
                sent.append(size)

        async with anyio.create_task_group() as group:
            group.start_soon(produce)
            await settle()
            assert sent == sizes[:let_in]
            for size in sizes:
                assert await pipe.receive() == size
                await settle()
        statistics = pipe.statistics
        assert (statistics.items, statistics.size_bytes) == (len(sizes), sum(sizes))
        assert statistics.peak_items == let_in
        assert statistics.peak_bytes <= max(100, *sizes)
        assert (statistics.sender_wait_s > 0) == (let_in < len(sizes))

    async def test_room_for_several_wakes_several(self) -> None:
        pipe, sent = channel(), list[int]()

        async def produce(size: int) -> None:
            await pipe.send(size)
            sent.append(size)

        await pipe.send(100)
        async with anyio.create_task_group() as group:
            for size in (30, 31, 32):
                group.start_soon(produce, size)
            await settle()
            assert not sent
            await pipe.receive()
            await settle()
            assert sorted(sent) == [30, 31, 32]

    async def test_more_is_what_is_there(self) -> None:
        """Taken without waiting; those who wait for the room get it."""
        pipe = channel(max_items=3)
        outlet, sent = pipe.sender(), list[int]()

        async def produce(item: int) -> None:
            await outlet.send(item)
            sent.append(item)

        assert pipe.receive_more(5) == []
        async with anyio.create_task_group() as group:
            for item in range(5):
                group.start_soon(produce, item)
            await settle()
            assert sent == [0, 1, 2]
            assert pipe.receive_more(0) == []
            assert pipe.receive_more(2) == [0, 1]
            await settle()
            assert sent == [0, 1, 2, 3, 4]
            assert pipe.receive_more(9) == [2, 3, 4]
        assert pipe.idle

    async def test_it_ends_when_the_last_sender_is_closed(self) -> None:
        pipe = channel()
        first, second = pipe.sender(), pipe.sender()
        first.close()
        first.close()  # twice is once
        await second.send(1)
        second.close()
        assert await pipe.receive() == 1
        with pytest.raises(anyio.EndOfStream):
            await pipe.receive()

    async def test_the_end_wakes_every_receiver(self) -> None:
        pipe = channel()
        outlet, got = pipe.sender(), list[int]()

        async def consume() -> None:
            async for item in pipe:
                got.append(item)

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(consume)
                await settle()
                with outlet:
                    await outlet.send(5)
        assert got == [5]

    async def test_an_error_is_no_end(self) -> None:
        """What was sent until then must not be taken for everything: the task group cancels the receivers."""
        pipe = channel()
        with pytest.raises(ValueError, match="broken"), pipe.sender():
            raise ValueError("broken")
        with anyio.move_on_after(0.01) as scope:
            await pipe.receive()
        assert scope.cancelled_caught

    async def test_idle(self) -> None:
        pipe = channel()
        assert pipe.idle
        await pipe.send(1)
        assert not pipe.idle

    async def test_a_receiver_cancelled_as_an_item_comes_leaves_it_to_another(self) -> None:
        for send_first in (True, False):
            pipe, got, scope = channel(), list[int](), anyio.CancelScope()

            async def doomed(pipe: Channel[int] = pipe, got: list[int] = got, scope: anyio.CancelScope = scope) -> None:
                with scope:
                    got.append(await pipe.receive())

            async def patient(pipe: Channel[int] = pipe, got: list[int] = got) -> None:
                got.append(await pipe.receive())

            with anyio.fail_after(PATIENCE_S):
                async with anyio.create_task_group() as group:
                    group.start_soon(doomed)
                    await settle()
                    group.start_soon(patient)
                    await settle()
                    if send_first:
                        await pipe.send(7)
                    scope.cancel()
                    if not send_first:
                        await pipe.send(7)
                    await settle()
                    assert got == [7]
                    await pipe.send(8)  # for the patient one, should the first have reached the other after all
            assert got[0] == 7

    async def test_a_sender_cancelled_while_it_waits_sends_nothing(self) -> None:
        pipe = channel(max_items=1)
        await pipe.send(1)
        with anyio.move_on_after(0.01) as scope:
            await pipe.send(2)
        assert scope.cancelled_caught
        assert await pipe.receive() == 1
        assert pipe.idle
        assert pipe.statistics.items == 1

    @pytest.mark.parametrize("seed", range(20))
    async def test_many_senders_and_receivers_that_are_cancelled_at_any_moment(self, seed: int) -> None:
        """Each item comes once or not at all, and not at all only if its sender or receiver was cancelled."""
        chance, pipe = random.Random(seed), channel(max_items=chance_items(seed), max_bytes=60)
        sent, got, begun = list[int](), list[int](), set[int]()
        outlets = [pipe.sender() for _ in range(5)]

        async def produce(number: int, leaves_at: Callable[[], bool]) -> None:
            outlet = outlets[number]
            for item in range(number, 200, 5):
                with anyio.CancelScope() as scope:
                    if leaves_at():
                        group.start_soon(cancel_later, scope)
                    begun.add(item)
                    await outlet.send(item)
                    sent.append(item)
            outlet.close()

        async def consume(leaves_at: Callable[[], bool]) -> None:
            while True:
                with anyio.CancelScope() as scope:
                    if leaves_at():
                        group.start_soon(cancel_later, scope)
                    try:
                        got.append(await pipe.receive())
                    except anyio.EndOfStream:
                        return
                await checkpoint()

        async def cancel_later(scope: anyio.CancelScope) -> None:
            for _ in range(chance.randint(0, 3)):
                await checkpoint()
            scope.cancel()

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as group:
                for number in range(5):
                    group.start_soon(produce, number, lambda: chance.random() < 0.3)
                for _ in range(3):
                    group.start_soon(consume, lambda: chance.random() < 0.3)
        assert sorted(got) == sorted(sent)
        assert len(set(got)) == len(got)
        assert pipe.statistics.items == len(sent)
        assert begun == set(range(200))


def chance_items(seed: int) -> int:
    """A bound in items, from 1 on."""
    return 1 + seed % 4
