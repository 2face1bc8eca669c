"""The dead: attempts that are not heard of any more, and what becomes of them.

A tombstone ends an attempt: put if absent where its commit would stand, so exactly one of its owner and whoever takes
it for dead wins. An attempt that was only asleep finds it when it commits, and begins anew: what is decided here can
cost time, and lose nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from coffret.connectors.errors import AlreadyExists, ConnectorError
from coffret.engine import sealing
from coffret.engine.attempt import Lease
from coffret.engine.errors import Damaged, InTheWay
from coffret.engine.objects import MAX_MARK_BYTES, list_leases, put_once, read_listed
from coffret.engine.records import End, encode
from coffret.engine.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from coffret.connectors.base import Connector, ObjectInfo
    from coffret.engine.sealing import Sealer

#: A lease is refreshed every 5 minutes; one that was not for so long is that of a dead attempt (s).
DEAD_AFTER_S = 1800.0
_decode_lease = msgspec.msgpack.Decoder(Lease).decode


class Dead(msgspec.Struct, frozen=True):
    """`bury`: attempts to be ended. `drop`: attempts that have ended, and left their lease."""

    bury: frozenset[str] = frozenset()
    drop: frozenset[str] = frozenset()


def find_dead(
    leases: Mapping[str, ObjectInfo],
    ended: Collection[str],
    left: Mapping[str, float],
    *,
    now_s: float,
    grace_s: float,
    own: str,
) -> Dead:
    """Attempts that are dead for longer than the grace, so that what they stored could have been taken up; pure.

    `left`: attempts that left packs or index objects, with the time of the latest; `own` is the caller's attempt.
    Whoever has no lease any more commits no more.
    """
    bury = {
        attempt
        for attempt, info in leases.items()
        if attempt not in ended and now_s - info.mtime_s > max(DEAD_AFTER_S, grace_s)
    }
    bury |= {
        attempt
        for attempt, latest_s in left.items()
        if attempt not in ended and attempt not in leases and now_s - latest_s >= grace_s
    }
    return Dead(frozenset(bury - {own}), frozenset(attempt for attempt in leases if attempt in ended) - {own})


async def bury(connector: Connector, sealer: Sealer, attempt: str, by: bytes) -> bool:
    """End an attempt by a tombstone, unless it has ended; take its lease away. Whether the tombstone was put."""
    name = f"snapshots/{attempt}"
    try:
        await put_once(connector, name, sealer.seal(sealing.END, name, by, encode(End("revoked", time.time_ns()))))
        put = True
    except AlreadyExists:
        put = False
    await connector.delete(f"leases/{attempt}")
    return put


async def make_way(connector: Connector, sealer: Sealer, attempts: Iterable[str], now_s: float, by: bytes) -> int:
    """End attempts that a sweep has to wait for, as far as they are dead; how many were ended.

    :raises InTheWay: if one is at work
    """
    leases = await list_leases(connector)
    ended = 0
    for each in sorted(attempts):
        lease = leases.get(each)
        if lease is not None and now_s - lease.mtime_s <= DEAD_AFTER_S:
            who = await describe(connector, sealer, lease, now_s)
            raise InTheWay(f"packs are marked, and can't be swept while {who}, is at work")
        ended += await bury(connector, sealer, each, by)
    return ended


async def describe(connector: Connector, sealer: Sealer, info: ObjectInfo, now_s: float) -> str:
    """Who holds a lease, for people: `a backup on host (process 12) that was heard of 40s ago`."""
    heard = f"heard of {format_duration(max(0, int(now_s - info.mtime_s)))} ago"
    try:
        data = await read_listed(connector, info, MAX_MARK_BYTES)
        lease = _decode_lease(sealer.open(sealing.LEASE, info.name, data)[1])
    except (ConnectorError, Damaged, msgspec.MsgspecError, ValueError):
        return f"{info.name}, {heard}"
    return f"a {lease.what} on {lease.host} (process {lease.pid}), {heard}"
