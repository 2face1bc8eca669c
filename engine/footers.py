"""Read what packs say of themselves: their headers and block tables, and nothing of their blocks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from anyio import to_thread

from coffret.connectors.errors import ConnectorError
from coffret.engine.errors import Damaged
from coffret.engine.fetch import unreadable
from coffret.engine.packfile import TRAILER, PackReader, footer_length
from coffret.engine.sealing import HEADER_BYTES

if TYPE_CHECKING:
    from coffret.connectors.base import Connector
    from coffret.engine.records import Block
    from coffret.engine.sealing import Sealer

# The end of a pack that is fetched at first: the table of a pack of large files is shorter, and costs no third request.
_TAIL_BYTES = 4 << 10


async def read_footer(connector: Connector, sealer: Sealer, name: str, size_bytes: int) -> tuple[bytes, list[Block]]:
    """(header, block table) of a pack of this size, by two or three requests.

    :raises Damaged: if they can't be had, or are not what was written
    """
    try:
        return await _read(connector, sealer, name, size_bytes)
    except Damaged as error:
        raise Damaged(f"{name}: {error}") from None
    except ConnectorError as error:
        raise Damaged(f"{name}: {unreadable(name, error).removeprefix(f'{name} ')}") from error


async def _read(connector: Connector, sealer: Sealer, name: str, size_bytes: int) -> tuple[bytes, list[Block]]:
    if size_bytes < HEADER_BYTES + TRAILER.size:
        raise Damaged("a pack is cut short")
    header = await connector.get(name, length=HEADER_BYTES)
    length = min(_TAIL_BYTES, size_bytes - HEADER_BYTES)
    tail = await connector.get(name, offset=size_bytes - length, length=length)
    wanted = footer_length(tail) + TRAILER.size
    if wanted > size_bytes - HEADER_BYTES:
        raise Damaged("a pack is cut short, or claims a longer block table than it has")
    if wanted > length:
        rest = await connector.get(name, offset=size_bytes - wanted, length=wanted - length)
        tail = rest + tail
    return header, await to_thread.run_sync(partial(PackReader(header, sealer).open_footer, tail, size_bytes))
