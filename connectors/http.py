"""Objects of a repository that `coffret server` serves on another host: docs/server.md describes the protocol.

What this storage does best, and what it can't promise, the server says; so it is known from the first request on.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from coffret.connectors import httperrors
from coffret.connectors.base import NAME, ObjectInfo, checked_range, valid_name, valid_prefix
from coffret.connectors.errors import ConnectionLost, InvalidRange, TransientError
from coffret.connectors.httpbody import Body, Watch
from coffret.connectors.httpclient import STALL_S, Client, drop
from coffret.connectors.httpplace import parse_location
from coffret.connectors.httpwire import CREATE, MTIME_HEADER, OBJECTS
from coffret.connectors.pieces import PieceReader, range_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from aiohttp import ClientResponse

    from coffret.connectors.base import Buffer
    from coffret.connectors.httpclient import Info
    from coffret.connectors.httpplace import Place
    from coffret.connectors.limit import Pace

_PACED_READ_BYTES = 64 << 10
# No line of a listing is longer: a name has 803 characters at most.
_MAX_LINE_BYTES = 8192


def open_url(url: str, options: Mapping[str, str]) -> HTTPConnector:
    """The connector for a location as `httpplace` describes it.

    :raises InvalidLocation: if the form, or an option, is not known
    """
    return HTTPConnector(parse_location(url, options))


class HTTPConnector(PieceReader):
    """A repository behind a server."""

    def __init__(self, place: Place, *, stall_s: float = STALL_S) -> None:
        self.place = place
        self.location = place.location
        self._client = Client(place, self._learn, stall_s=stall_s)
        self._connections: int | None = None
        self._notes: tuple[str, ...] = ()

    @property
    def notes(self) -> Sequence[str]:
        return self._notes

    def set_connections(self, count: int) -> None:
        self._connections = count
        super().set_connections(count)

    def set_pace(self, pace: Pace) -> bool:
        self._client.pace = pace
        return True

    def set_insecure(self) -> None:
        self._client.insecure = True

    def _learn(self, info: Info) -> None:
        self.capabilities, self._notes = info.capabilities, info.notes
        if self._connections is not None:
            super().set_connections(self._connections)

    async def create(self) -> None:
        await self._client.ask("POST", CREATE, self.location, _nothing)

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        where, path = self._where(name)
        views = [memoryview(part).cast("B") for part in body if len(part)]
        headers = {"Content-Length": str(sum(map(len, views)))}
        if if_absent:
            headers["If-None-Match"] = "*"
        watch = Watch(self._client.stall_s)
        sent = Body(views, watch, self._client.pace, None)
        try:
            await self._client.ask("PUT", path, where, _nothing, body=sent, watch=watch, headers=headers)
        finally:
            sent.release()
            for view in views:
                view.release()  # whatever still refers to it: the buffer is its owner's

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        where = f"{self.location}/{valid_prefix(prefix)}"
        answer = await self._client.open(f"{OBJECTS}?prefix={prefix}", where)
        try:
            left = b""
            while piece := await self._client.piece(answer, where):
                *lines, left = (left + piece).split(b"\n")
                if len(left) > _MAX_LINE_BYTES:
                    break
                for line in lines:
                    info = self._listed(line, where)
                    if info is not None:
                        yield info
                    elif not await self._client.piece(answer, where):  # so that its connection can be used again
                        return
            raise ConnectionLost(f"{where}: the listing breaks off")
        finally:
            drop(answer)

    async def stat(self, name: str) -> ObjectInfo:
        where, path = self._where(name)

        async def read(answer: ClientResponse, _: Watch) -> ObjectInfo:
            try:
                return ObjectInfo(name, int(answer.headers["Content-Length"]), float(answer.headers[MTIME_HEADER]))
            except (KeyError, ValueError):
                raise TransientError(f"{where}: the answer does not say how large it is, and of when") from None

        return await self._client.ask("HEAD", path, where, read)

    async def delete(self, name: str) -> None:
        where, path = self._where(name)
        await self._client.ask("DELETE", path, where, _nothing)

    async def close(self) -> None:
        await self._client.close()

    def _where(self, name: str) -> tuple[str, str]:
        """What to call an object in messages, and its path at the server."""
        return f"{self.location}/{valid_name(name)}", f"{OBJECTS}/{name}"

    def _listed(self, line: bytes, where: str) -> ObjectInfo | None:
        """An object by its line of a listing; None for the line that ends it.

        :raises ConnectorError: if the line tells of an error, or is none
        """
        try:
            found: Any = json.loads(line)
            if isinstance(found, dict):
                if "error" in found:
                    raise httperrors.refused(where, 0, str(found["error"]), str(found["message"])[:1000], "")
                return None if found["end"] is True else ObjectInfo("", 0, 0.0)
            name, size_bytes, mtime_s = found
            if not NAME.fullmatch(name) or type(size_bytes) is not int:
                raise ValueError(name)
            return ObjectInfo(name, size_bytes, float(mtime_s))
        except (ValueError, TypeError, KeyError):
            raise TransientError(f"{where}: the listing holds a line that is none") from None

    async def _fetch(self, name: str, offset: int, length: int | None, write: Callable[[bytes], Any]) -> None:
        where, path = self._where(name)
        if offset < 0 or (length is not None and length < 0):
            raise InvalidRange(f"{where}: {length} bytes from {offset}")
        if length == 0:
            checked_range(name, (await self.stat(name)).size_bytes, offset, 0)
            return
        headers = {}
        if offset or length is not None:
            headers["Range"] = range_of(offset, length)
        pace = self._client.pace.download if self._client.pace and self._client.pace.download.limited else None

        async def read(answer: ClientResponse, watch: Watch) -> None:
            left = _checked_length(answer, where, bool(headers), length)
            while left:
                piece = await (answer.content.readany() if pace is None else answer.content.read(_PACED_READ_BYTES))
                if not piece or len(piece) > left:
                    raise ConnectionLost(f"{where}: {left} bytes are missing at its end")
                if pace is not None:
                    await watch.outside(pace.take(len(piece)))
                watch.moved()
                write(piece)
                left -= len(piece)

        try:
            await self._client.ask("GET", path, where, read, headers=headers)
        except InvalidRange:
            # An empty range at the end can't be written in a header.
            if checked_range(name, (await self.stat(name)).size_bytes, offset, length):
                raise


async def _nothing(answer: ClientResponse, _: Watch) -> None:
    """Read the answer of whom nothing more is wanted, so that its connection can be used again."""
    await answer.read()


def _checked_length(answer: ClientResponse, where: str, is_range: bool, length: int | None) -> int:
    """How many bytes the body has: as many as were asked for.

    :raises TransientError: if it has another number
    """
    try:
        found = int(answer.headers["Content-Length"])
    except (KeyError, ValueError):
        found = -1
    if found < 0 or (answer.status == 206) != is_range or (length is not None and found != length):
        raise TransientError(f"{where}: the server sends {found} bytes instead of {length} (HTTP {answer.status})")
    return found
