"""Objects in a dict of this process: the reference for the contract, for tests and for models of the protocol.

No method suspends, so a test that schedules tasks itself decides alone what happens between two storage calls.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from coffret.connectors.base import Connector, ObjectInfo, checked_range, valid_name, valid_prefix
from coffret.connectors.errors import AlreadyExists, InvalidLocation, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from coffret.connectors.base import Buffer

_shared: dict[str, MemoryConnector] = {}


def open_url(url: str, options: Mapping[str, str]) -> MemoryConnector:
    """The connector for `memory://name`, one for each name in the process.

    :raises InvalidLocation: if there are options or no name
    """
    name = url.partition("://")[2]
    if options or not name:
        raise InvalidLocation(f"{url}: a storage in memory has the form memory://name, and no options")
    return _shared.setdefault(name, MemoryConnector(name))


class MemoryConnector(Connector):
    """A storage that lives as long as the object does.

    `clock` gives the modification time of what is put, in seconds since 1970; it may be replaced at any time.
    """

    def __init__(self, name: str = "", *, clock: Callable[[], float] = time.time) -> None:
        self.location = f"memory://{name or secrets.token_hex(8)}"
        self.clock = clock
        self._objects: dict[str, tuple[bytes, float]] = {}

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        taken = valid_name(name) in self._objects
        if taken and if_absent:
            raise AlreadyExists(f"{name} exists already")
        self._objects[name] = (b"".join(body), self.clock())

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        data, _ = self._find(name)
        return data[offset : offset + checked_range(name, len(data), offset, length)]

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        data, _ = self._find(name)
        checked_range(name, len(data), offset, len(buffer))
        buffer[:] = memoryview(data)[offset : offset + len(buffer)]

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        valid_prefix(prefix)
        for name in [name for name in self._objects if name.startswith(prefix)]:
            if (found := self._objects.get(name)) is not None:
                yield ObjectInfo(name, len(found[0]), found[1])

    async def stat(self, name: str) -> ObjectInfo:
        data, mtime_s = self._find(name)
        return ObjectInfo(name, len(data), mtime_s)

    async def delete(self, name: str) -> None:
        self._objects.pop(valid_name(name), None)

    def _find(self, name: str) -> tuple[bytes, float]:
        try:
            return self._objects[valid_name(name)]
        except KeyError:
            raise NotFound(f"there is no {name}") from None
