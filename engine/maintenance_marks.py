"""Marks: which packs will be swept, which attempts were at work when that was said, and when it is over.

`trash/<n>` names packs, `trash/<n>-seen` attempts, `trash/<n>-done` ends it. One mark is open at a time, since each of
these is put if absent, under the next number, by who found no mark open. See docs/format.md, "Many writers".
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import msgspec
from blake3 import blake3

from coffret.connectors.errors import AlreadyExists
from coffret.engine import sealing
from coffret.engine.errors import Damaged
from coffret.engine.objects import MAX_MARK_BYTES, batches, list_leases, list_objects, put_once, read_listed
from coffret.engine.records import (
    ATTEMPT_BYTES,
    ID_BYTES,
    UNDECODABLE,
    Done,
    Mark,
    Seen,
    decode_mark,
    decode_seen,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coffret.connectors.base import Connector, ObjectInfo
    from coffret.engine.sealing import Sealer

#: Packs of one mark: it has to fit into an object of its kind, and ids do not compress.
MAX_PACKS = (MAX_MARK_BYTES - 4096) // ID_BYTES
_NAME = re.compile(r"trash/(\d{1,15})(-seen|-done)?")
_ATTEMPT = re.compile(r"[0-9a-f]{32}")
_READ_AT_ONCE = 16


class Marks(msgspec.Struct):
    """What lies in trash/: the highest number; of the marks that are open their objects, and what was seen of them."""

    top: int = 0
    open: dict[int, ObjectInfo] = msgspec.field(default_factory=dict)
    seen: dict[int, ObjectInfo] = msgspec.field(default_factory=dict)


async def list_marks(connector: Connector) -> Marks:
    """List trash/."""
    found: dict[str, dict[int, ObjectInfo]] = {"": {}, "-seen": {}, "-done": {}}
    for info in await list_objects(connector, "trash/"):
        if match := _NAME.fullmatch(info.name):
            found[match[2] or ""][int(match[1])] = info
    # By marks alone: a listing is no moment. Who finds what was seen of a mark, and not the mark, must not
    # put the next one.
    return Marks(
        max(found[""], default=0),
        {number: info for number, info in found[""].items() if number not in found["-done"]},
        found["-seen"],
    )


async def read_mark(connector: Connector, sealer: Sealer, info: ObjectInfo) -> frozenset[bytes]:
    """The packs that a mark names.

    :raises Damaged: if it is not what was stored
    """
    try:
        _, payload = sealer.open(sealing.MARK, info.name, await read_listed(connector, info, MAX_MARK_BYTES))
        return frozenset(_split(decode_mark(payload).packs, ID_BYTES))
    except (Damaged, *UNDECODABLE) as error:
        raise Damaged(
            f"{info.name}, which names packs to be swept, can't be read: {str(error).removeprefix(f'{info.name}: ')}",
            remedy="run `coffret at REPO maintenance` (with --grace 0 if nobody else is at work on it): that ends it",
        ) from None


async def put_mark(connector: Connector, sealer: Sealer, attempt: bytes, number: int, packs: Iterable[bytes]) -> bool:
    """Put a mark, if its number is not taken; whether it was put."""
    return await _put(connector, sealer, attempt, f"trash/{number}", Mark(b"".join(sorted(packs))))


async def record_seen(connector: Connector, sealer: Sealer, attempt: bytes, mark: ObjectInfo) -> frozenset[str]:
    """The attempts (hexadecimal) that held a lease after a mark was put: listed now, unless they were before.

    What was recorded before and can't be read, or is of another mark, is replaced: any listing will do that follows
    the mark, since who held a lease and has ended since is known by its end.
    """
    name = f"{mark.name}-seen"
    digest = blake3(await read_listed(connector, mark, MAX_MARK_BYTES)).digest()
    at_work = [bytes.fromhex(lease) for lease in sorted(await list_leases(connector)) if _ATTEMPT.fullmatch(lease)]
    seen = Seen(b"".join(at_work), digest)
    if not await _put(connector, sealer, attempt, name, seen):
        with suppress(Damaged, *UNDECODABLE):
            data = await read_listed(connector, await connector.stat(name), MAX_MARK_BYTES)
            before = decode_seen(sealer.open(sealing.MARK, name, data)[1])
            if before.mark in (digest, b""):  # there are older ones that do not say
                return frozenset(each.hex() for each in _split(before.attempts, ATTEMPT_BYTES))
        await _put_over(connector, sealer, attempt, name, seen)
    return frozenset(each.hex() for each in at_work)


async def put_done(connector: Connector, sealer: Sealer, attempt: bytes, number: int) -> None:
    """End a mark; no error if someone else was first."""
    await _put(connector, sealer, attempt, f"trash/{number}-done", Done(time.time_ns()))


async def renew_ended(connector: Connector, sealer: Sealer, attempt: bytes, *, dry_run: bool = False) -> list[str]:
    """Put empty records over those of marks that are over and can't be read: of these the names alone count.

    Returns the names.
    """
    listed = {info.name: info for info in await list_objects(connector, "trash/")}
    bad: list[str] = []

    async def look(info: ObjectInfo) -> None:
        try:
            sealer.open(sealing.MARK, info.name, await read_listed(connector, info, MAX_MARK_BYTES))
        except Damaged:
            bad.append(info.name)

    over = [
        info for name, info in listed.items() if _NAME.fullmatch(name) and f"{name.partition('-')[0]}-done" in listed
    ]
    for batch in batches(over, _READ_AT_ONCE):
        async with anyio.create_task_group() as group:
            for info in batch:
                group.start_soon(look, info)
    empty: dict[str, Mark | Seen | Done] = {"": Mark(b""), "seen": Seen(b""), "done": Done(time.time_ns())}
    for name in [] if dry_run else bad:
        await _put_over(connector, sealer, attempt, name, empty[name.partition("-")[2]])
    return sorted(bad)


async def _put_over(
    connector: Connector, sealer: Sealer, attempt: bytes, name: str, record: Mark | Seen | Done
) -> None:
    await connector.put(name, [sealer.seal(sealing.MARK, name, attempt, encode(record))])


async def _put(connector: Connector, sealer: Sealer, attempt: bytes, name: str, record: Mark | Seen | Done) -> bool:
    try:
        await put_once(connector, name, sealer.seal(sealing.MARK, name, attempt, encode(record)))
    except AlreadyExists:
        return False
    return True


def _split(joined: bytes, length: int) -> Sequence[bytes]:
    if len(joined) % length:
        raise ValueError("names a part of an id")
    return [joined[at : at + length] for at in range(0, len(joined), length)]
