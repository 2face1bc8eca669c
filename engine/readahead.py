"""Read ahead: what a reader asks for first is fetched while the repository is opened, before its key is known.

Listings and the bytes of sealed objects need no key. Fetched one after the other, once the key is there, they cost a
line of 50 ms half a second; beside config, key slots and the derivation of the key they cost nothing.

The order is the readers': `snapshots/` is listed before `index/`, so that of a snapshot that is found all index objects
are there. Writers list after their lease, and use none of this.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio

from coffret.connectors.base import Connector
from coffret.connectors.errors import ConnectorError
from coffret.engine.flow import together
from coffret.engine.objects import INDEX, REMOVED, SNAPSHOTS, list_objects

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence

    from coffret.connectors.base import Buffer, ObjectInfo

    #: Which of some names are not known on this machine.
    Lacking = Callable[[Sequence[str]], Awaitable[Collection[str]]]

# What is fetched ahead at most, of a kind: what is more, on a machine that sees the repository for the first time, is
# fetched as ever, many at a time.
_AT_ONCE, _TOGETHER_BYTES = 16, 16 << 20


class ReadAhead(Connector):
    """The storage, for the first that a reader asks of it: what was fetched ahead is handed out, once.

    What could not be fetched ahead is asked for anew, and fails then if it must.
    """

    def __init__(self, inner: Connector) -> None:
        self._inner = inner
        self.location, self.capabilities = inner.location, inner.capabilities
        self._listed: dict[str, list[ObjectInfo]] = {}
        self._found: dict[str, bytes] = {}

    async def fetch_lists(self) -> None:
        """List snapshots and removals, then index objects."""
        with suppress(ConnectorError):
            await together(partial(self._list_ahead, SNAPSHOTS), partial(self._list_ahead, REMOVED))
            await self._list_ahead(INDEX)

    async def fetch_objects(self, lacking_snapshots: Lacking, lacking_index: Lacking) -> None:
        """Get what was listed and is not known here."""
        wanted = []
        for prefix, lacking in ((SNAPSHOTS, lacking_snapshots), (INDEX, lacking_index)):
            names = await lacking([info.name for info in self._listed.get(prefix, ())])
            wanted += _few([info for info in self._listed.get(prefix, ()) if info.name in names])
        async with anyio.create_task_group() as group:
            for info in wanted:
                group.start_soon(self._get_ahead, info)

    async def _list_ahead(self, prefix: str) -> None:
        self._listed[prefix] = await list_objects(self._inner, prefix)

    async def _get_ahead(self, info: ObjectInfo) -> None:
        with suppress(ConnectorError):
            self._found[info.name] = await self._inner.get(info.name, length=info.size_bytes)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """As it was listed ahead, or is now."""
        if (infos := self._listed.pop(prefix, None)) is not None:
            for info in infos:
                yield info
            return
        async for info in self._inner.list(prefix):
            yield info

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """What was fetched ahead, or is stored now."""
        data = self._found.pop(name, None) if not offset else None
        if data is not None and len(data) == length:
            return data
        return await self._inner.get(name, offset=offset, length=length)

    async def stat(self, name: str) -> ObjectInfo:
        """As the storage does."""
        return await self._inner.stat(name)

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """As the storage does."""
        await self._inner.put(name, body, if_absent=if_absent)

    async def delete(self, name: str) -> None:
        """As the storage does."""
        await self._inner.delete(name)


def _few(infos: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    """The first of them, as many and as large as may be fetched ahead."""
    few, size_bytes = [], 0
    for info in infos[:_AT_ONCE]:
        size_bytes += info.size_bytes
        if size_bytes > _TOGETHER_BYTES:
            break
        few.append(info)
    return few
