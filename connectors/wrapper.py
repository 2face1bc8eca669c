"""A connector around another, which passes every call on: what retry, limit, trace and faults are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.connectors.base import Connector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from coffret.connectors.base import Buffer, Capabilities, Listings, ObjectInfo
    from coffret.connectors.limit import Pace


class Wrapper(Connector):
    """Everything as `inner` does it; a subclass overrides what it does otherwise.

    But for `put_arriving`, which comes down to the wrapper's own `put`: what overrides that is not to be passed by.
    """

    def __init__(self, inner: Connector) -> None:
        self.inner = inner
        self.location = inner.location

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        return self.inner.capabilities

    @property
    def places(self) -> Sequence[Path]:
        return self.inner.places

    @property
    def notes(self) -> Sequence[str]:
        return self.inner.notes

    def set_connections(self, count: int) -> None:
        self.inner.set_connections(count)

    def set_insecure(self) -> None:
        self.inner.set_insecure()

    def set_pace(self, pace: Pace) -> bool:
        return self.inner.set_pace(pace)

    def expect_transfers(self) -> None:
        self.inner.expect_transfers()

    async def create(self) -> None:
        await self.inner.create()

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        await self.inner.put(name, body, if_absent=if_absent)

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return await self.inner.get(name, offset=offset, length=length)

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        await self.inner.get_into(name, offset, buffer)

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        return await self.inner.peek(name, limit_bytes)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        async for info in self.inner.list(prefix):
            yield info

    async def list_turns(self, turns: Sequence[Sequence[str]]) -> Listings:
        return await self.inner.list_turns(turns)

    async def stat(self, name: str) -> ObjectInfo:
        return await self.inner.stat(name)

    async def delete(self, name: str) -> None:
        await self.inner.delete(name)

    async def close(self) -> None:
        await self.inner.close()
