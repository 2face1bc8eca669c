"""Removals: the records that take snapshots from the list. What they alone need goes with maintenance, later."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from coffret.connectors.errors import AlreadyExists
from coffret.engine import sealing
from coffret.engine.errors import Damaged
from coffret.engine.objects import put_once
from coffret.engine.records import ATTEMPT_BYTES, UNDECODABLE, Removal, decode_removal, encode
from coffret.engine.snapshot import current_user, removal_name

if TYPE_CHECKING:
    from coffret.connectors.base import Connector
    from coffret.engine.sealing import Sealer


def seal_removal(sealer: Sealer, name: str, remover: bytes, removal: Removal) -> bytes:
    """The object of a removal. `remover`: an attempt that did nothing else, and has no lease."""
    return sealer.seal(sealing.REMOVED, name, remover, encode(removal))


def open_removal(sealer: Sealer, name: str, data: bytes) -> Removal:
    """A removal from its object. That it is there counts, whether it can be read or not.

    :raises Damaged: if it is not what was stored
    """
    _, payload = sealer.open(sealing.REMOVED, name, data)
    try:
        return decode_removal(payload)
    except UNDECODABLE as error:
        raise Damaged(f"{name}: {error}") from None


def removal_here() -> Removal:
    """The removal of a snapshot by this user, on this host, now."""
    return Removal(socket.gethostname(), current_user(), time.time_ns())


async def put_removal(
    connector: Connector, sealer: Sealer, snapshot_id: bytes, attempt: bytes, removal: Removal
) -> None:
    """Remove a snapshot that an attempt committed from the list; no error if someone else was first."""
    name = removal_name(snapshot_id, attempt)
    try:
        await put_once(connector, name, seal_removal(sealer, name, os.urandom(ATTEMPT_BYTES), removal))
    except AlreadyExists:
        return
