"""Snapshots: the objects that commit an attempt, and how users name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from coffret.connectors.errors import NotFound
from coffret.engine import sealing
from coffret.engine.errors import CoffretError, Damaged
from coffret.engine.records import UNDECODABLE, End, SnapshotHeader, decode_end, decode_header, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.connectors.base import Connector
    from coffret.engine.sealing import Sealer

SHORT_ID_DIGITS = 8
# Headers are fetched this many at a time.
_AT_ONCE = 16


class NoSuchSnapshot(CoffretError):
    """No snapshot, or more than one, is meant."""

    remedy = "see `coffret at REPO ls` for the snapshots there are"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A committed snapshot: its header and the attempt that committed it."""

    attempt: bytes
    header: SnapshotHeader

    @property
    def id(self) -> str:
        """The snapshot's id in hexadecimal."""
        return self.header.snapshot_id.hex()

    @property
    def short_id(self) -> str:
        """The first eight digits of the id."""
        return self.id[:SHORT_ID_DIGITS]


@dataclass(frozen=True, slots=True)
class Commits:
    """What stands in snapshots/: snapshots by time, the names of attempts that ended, and objects that are damaged.

    An attempt whose end is damaged counts as one that has not ended: what its index objects say can be read, and a
    writer that relies on it says it anew.
    """

    snapshots: list[Snapshot]
    committed: frozenset[str]
    revoked: frozenset[str]
    damaged: list[tuple[str, str]]


def snapshot_name(attempt: bytes) -> str:
    """The object name of an attempt's commit."""
    return f"snapshots/{attempt.hex()}"


def seal_snapshot(sealer: Sealer, snapshot: Snapshot) -> bytes:
    """The commit object of a snapshot's attempt."""
    name = snapshot_name(snapshot.attempt)
    return sealer.seal(sealing.SNAPSHOT, name, snapshot.attempt, encode(snapshot.header))


def open_snapshot(sealer: Sealer, name: str, data: bytes) -> Snapshot:
    """A snapshot from its object.

    :raises Damaged: if it is not what was stored
    """
    attempt, payload = sealer.open(sealing.SNAPSHOT, name, data)
    try:
        header = decode_header(payload)
    except UNDECODABLE as error:
        raise Damaged(f"{name}: {error}") from None
    if name != snapshot_name(attempt) or len(header.snapshot_id) != 16:
        raise Damaged(f"{name}: does not belong to its name")
    return Snapshot(attempt, header)


def open_end(sealer: Sealer, name: str, data: bytes) -> End:
    """How an attempt ended without a snapshot, from its object.

    :raises Damaged: if it is not what was stored
    """
    _, payload = sealer.open(sealing.END, name, data)
    try:
        return decode_end(payload)
    except UNDECODABLE as error:
        raise Damaged(f"{name}: {error}") from None


async def load_commits(connector: Connector, sealer: Sealer) -> Commits:
    """List snapshots/ and read what is there. Removed snapshots are left out; of those with one id one is shown."""
    names = [info.name async for info in connector.list("snapshots/")]
    removed = {info.name[len("removed/") :] async for info in connector.list("removed/")}
    found: dict[bytes, Snapshot] = {}
    revoked: set[str] = set()
    damaged: list[tuple[str, str]] = []

    async def load(name: str) -> None:
        try:
            data = await connector.get(name)
            if sealing.kind_of(data) == sealing.END:
                if open_end(sealer, name, data).outcome == "revoked":
                    revoked.add(name.partition("/")[2])
                return
            snapshot = open_snapshot(sealer, name, data)
        except NotFound:
            return
        except Damaged as error:
            damaged.append((name, str(error)))
            return
        if f"{snapshot.id}-{snapshot.attempt.hex()}" not in removed:
            other = found.get(snapshot.header.snapshot_id)
            if other is None or snapshot.attempt < other.attempt:
                found[snapshot.header.snapshot_id] = snapshot

    for at in range(0, len(names), _AT_ONCE):
        async with anyio.create_task_group() as group:
            for name in names[at : at + _AT_ONCE]:
                group.start_soon(load, name)
    snapshots = sorted(found.values(), key=lambda snapshot: (snapshot.header.time_ns, snapshot.id))
    committed = frozenset(name.partition("/")[2] for name in {*names}.difference(name for name, _ in damaged))
    return Commits(snapshots, committed - revoked, frozenset(revoked), sorted(damaged))


def find_snapshot(snapshots: Sequence[Snapshot], text: str) -> Snapshot:
    """The snapshot that is meant by an id, a unique prefix of one, or `latest`.

    :raises NoSuchSnapshot: if none is, or several are
    """
    if text == "latest":
        if not snapshots:
            raise NoSuchSnapshot("the repository has no snapshot", remedy="make one with `coffret at REPO backup PATH`")
        return snapshots[-1]
    found = [snapshot for snapshot in snapshots if text and snapshot.id.startswith(text.lower())]
    if not found:
        raise NoSuchSnapshot(f"no snapshot {text!r}")
    if len(found) > 1:
        raise NoSuchSnapshot(
            f"{text!r} means {len(found)} snapshots: {', '.join(snapshot.short_id for snapshot in found[:8])}",
            remedy="give more digits of the id",
        )
    return found[0]
