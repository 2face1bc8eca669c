"""The bridge from the scan's thread to the event loop answers every call, whatever is cancelled when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from anyio import to_thread

from coffret.engine.bridge import LoadBridge, Stopped

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.anyio


async def test_calls_are_answered_in_order() -> None:
    async def load(refs: Sequence[bytes]) -> list[bytes]:
        await anyio.lowlevel.checkpoint()
        return [ref * 2 for ref in refs]

    bridge = LoadBridge(load)
    async with anyio.create_task_group() as group:
        await group.start(bridge.serve)
        for number in range(50):
            assert await to_thread.run_sync(bridge, [b"%d" % number]) == [b"%d" % number * 2]
        group.cancel_scope.cancel()


async def test_an_error_reaches_the_caller_and_the_bridge_goes_on() -> None:
    async def load(refs: Sequence[bytes]) -> list[bytes]:
        if refs == [b"bad"]:
            raise ValueError("no such chunk")
        return list(refs)

    bridge = LoadBridge(load)
    async with anyio.create_task_group() as group:
        await group.start(bridge.serve)
        with pytest.raises(ValueError, match="no such chunk"):
            await to_thread.run_sync(bridge, [b"bad"])
        assert await to_thread.run_sync(bridge, [b"good"]) == [b"good"]
        group.cancel_scope.cancel()


@pytest.mark.parametrize("steps", range(1, 9))
async def test_cancelling_at_any_step_leaves_no_thread_waiting(steps: int) -> None:
    """The thread calls again and again; the scope is cancelled after some turns of the loop, wherever that is."""

    async def load(refs: Sequence[bytes]) -> list[bytes]:
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        return list(refs)

    bridge = LoadBridge(load)
    stopped = []

    def call() -> None:
        try:
            while True:
                bridge([b"x"])
        except Stopped:
            stopped.append(True)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            await group.start(bridge.serve)
            group.start_soon(to_thread.run_sync, call)
            for _ in range(steps * 5):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    assert stopped == [True]


async def test_a_call_after_the_end_is_refused() -> None:
    async def load(refs: Sequence[bytes]) -> list[bytes]:
        return list(refs)

    bridge = LoadBridge(load)
    async with anyio.create_task_group() as group:
        await group.start(bridge.serve)
        await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    with pytest.raises(Stopped):
        await to_thread.run_sync(bridge, [b"x"])
