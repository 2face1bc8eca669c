"""What connectors share to which the bytes of an object come piece by piece."""

from __future__ import annotations

from abc import abstractmethod
from io import BytesIO
from typing import TYPE_CHECKING, Any

from coffret.connectors.base import Connector

if TYPE_CHECKING:
    from collections.abc import Callable


class PieceReader(Connector):
    """Reads by `_fetch`, which hands over each piece as it comes."""

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        data = BytesIO()  # whose `getvalue` is no copy
        await self._fetch(name, offset, length, data.write)
        return data.getvalue()

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        at = 0

        def write(piece: bytes) -> None:
            nonlocal at
            buffer[at : at + len(piece)] = piece
            at += len(piece)

        await self._fetch(name, offset, len(buffer), write)

    @abstractmethod
    async def _fetch(self, name: str, offset: int, length: int | None, write: Callable[[bytes], Any]) -> None:
        """Hand the bytes of a range to `write`, piece by piece: exactly those of it.

        :raises NotFound: if there is no such object
        :raises InvalidRange: if the range does not lie within the object
        """


def range_of(offset: int, length: int | None) -> str:
    """The value of a Range header (RFC 9110, 14.1.2) for `length` bytes, 1 or more, or for all, from `offset` on."""
    return f"bytes={offset}-{'' if length is None else offset + length - 1}"
