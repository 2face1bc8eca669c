"""Snapshots: the objects that commit an attempt, and how users name them."""

from __future__ import annotations

import os
import pwd
import re
import time
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec

from coffret.connectors.errors import NotFound
from coffret.engine import sealing
from coffret.engine.errors import CoffretError, Damaged
from coffret.engine.flow import together
from coffret.engine.objects import MAX_SNAPSHOT_BYTES, REMOVED, SNAPSHOTS, batches, list_objects, read_listed
from coffret.engine.records import (
    ATTEMPT_BYTES,
    UNDECODABLE,
    End,
    SnapshotHeader,
    decode_end,
    decode_fields,
    decode_header,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coffret.connectors.base import Connector, ObjectInfo
    from coffret.engine.sealing import Sealer
    from coffret.engine.storecache import StoreCache

SHORT_ID_DIGITS = 8
_REMOVAL = re.compile("removed/([0-9a-f]{32})-[0-9a-f]{32}")
# Headers are fetched this many at a time.
_AT_ONCE = 16


class NoSuchSnapshot(CoffretError):
    """No snapshot, or more than one, is meant."""

    remedy = "see `coffret at REPO ls` for the snapshots there are"


class Snapshot(msgspec.Struct, frozen=True):
    """A committed snapshot: its header and the attempt that committed it.

    In a listing the header is without its faults, which may be many: `load_whole` has them. So it has `unknown`, the
    fields of the header that a later version of this program has added, for those who copy it.
    """

    attempt: bytes
    header: SnapshotHeader
    unknown: dict[str, object] = msgspec.field(default_factory=dict)

    @property
    def id(self) -> str:
        """The snapshot's id in hexadecimal."""
        return self.header.snapshot_id.hex()

    @property
    def short_id(self) -> str:
        """The first eight digits of the id."""
        return self.id[:SHORT_ID_DIGITS]


class Commits(msgspec.Struct, frozen=True):
    """What stands in snapshots/: snapshots by time, the names of attempts that ended, and objects that are damaged.

    An attempt whose end is damaged counts as one that has not ended: what its index objects say can be read, and a
    writer that relies on it says it anew. `doubtful`: the names of damaged objects that may be a later snapshot than
    all others. `attempts`: all that committed a snapshot, by its id, without those that were removed: several hosts can
    have copied one; `hidden`: those that are not shown. `removed`: ids (hexadecimal) of snapshots that were removed and
    are not there; `gone`: the attempts whose snapshots were removed, as far as these stand in snapshots/ still.
    `maintained`: attempts of maintenance.
    """

    snapshots: list[Snapshot]
    committed: frozenset[str]
    revoked: frozenset[str]
    damaged: list[tuple[str, str]]
    doubtful: tuple[str, ...] = ()
    attempts: Mapping[bytes, tuple[bytes, ...]] = msgspec.field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    hidden: tuple[Snapshot, ...] = ()
    maintained: frozenset[str] = frozenset()


#: What stands in snapshots/, opened before: by name, with its size in bytes.
Opened = dict[str, tuple[int, "Snapshot | End"]]


def snapshot_name(attempt: bytes) -> str:
    """The object name of an attempt's commit."""
    return f"snapshots/{attempt.hex()}"


def removal_name(snapshot_id: bytes, attempt: bytes) -> str:
    """The object name of the removal of a snapshot that an attempt committed."""
    return f"removed/{snapshot_id.hex()}-{attempt.hex()}"


def seal_snapshot(sealer: Sealer, snapshot: Snapshot) -> bytes:
    """The commit object of a snapshot's attempt."""
    name = snapshot_name(snapshot.attempt)
    header = msgspec.structs.asdict(snapshot.header) | snapshot.unknown if snapshot.unknown else snapshot.header
    return sealer.seal(sealing.SNAPSHOT, name, snapshot.attempt, encode(header))


def seal_end(sealer: Sealer, attempt: bytes, end: End) -> bytes:
    """The object of an attempt that has put its own end, which is no snapshot."""
    return sealer.seal(sealing.END, snapshot_name(attempt), attempt, encode(end))


def open_snapshot(sealer: Sealer, name: str, data: bytes, *, whole: bool = False) -> Snapshot:
    """A snapshot from its object; `whole`: with what this version does not know of it.

    :raises Damaged: if it is not what was stored
    """
    attempt, payload = sealer.open(sealing.SNAPSHOT, name, data)
    try:
        header = decode_header(payload)
        fields = decode_fields(payload) if whole else {}
    except UNDECODABLE as error:
        raise Damaged(f"{name}: {error}") from None
    if name != snapshot_name(attempt) or len(header.snapshot_id) != 16:
        raise Damaged(f"{name}: does not belong to its name")
    known = header.__struct_fields__
    return Snapshot(attempt, header, {key: value for key, value in fields.items() if key not in known})


def open_end(sealer: Sealer, name: str, data: bytes) -> End:
    """How an attempt ended without a snapshot, from its object.

    :raises Damaged: if it is not what was stored
    """
    _, payload = sealer.open(sealing.END, name, data)
    try:
        return decode_end(payload)
    except UNDECODABLE as error:
        raise Damaged(f"{name}: {error}") from None


async def load_commits(
    connector: Connector,
    sealer: Sealer,
    kept: StoreCache | None = None,
    *,
    listed: tuple[list[ObjectInfo], list[ObjectInfo]] | None = None,
    opened: Opened | None = None,
) -> Commits:
    """List snapshots/ and read what is there. Removed snapshots are left out; of those with one id one is shown.

    What is `kept` locally is not read again: an object's name never gets another content, but for the end marker of
    another size. `listed`: what lies in snapshots/ and removed/, if that is known already. `opened`: what the caller's
    other attempts have opened, and this one adds to.
    """
    infos, removals = listed or await together(
        partial(list_objects, connector, SNAPSHOTS), partial(list_objects, connector, REMOVED)
    )
    removed = {info.name for info in removals}
    found: dict[bytes, Snapshot] = {}
    attempts: dict[bytes, tuple[bytes, ...]] = {}
    revoked: set[str] = set()
    maintained: set[str] = set()
    gone: set[str] = set()
    hidden: list[Snapshot] = []
    damaged: list[tuple[str, str]] = []
    known: dict[str, bytes] = {}
    opened = {} if opened is None else opened

    async def load(info: ObjectInfo, fetched: dict[str, bytes]) -> None:
        name = info.name
        try:
            size_bytes, snapshot = opened.get(name, (0, None))
            if size_bytes != info.size_bytes:
                snapshot = _open_kept(sealer, name, known.get(name), info.size_bytes)
            if snapshot is None:
                data = fetched[name] = await _read_end(connector, info)
                snapshot = _open(sealer, name, data)
            if isinstance(snapshot, Snapshot):
                snapshot = msgspec.structs.replace(snapshot, header=msgspec.structs.replace(snapshot.header, faults=[]))
            opened[name] = info.size_bytes, snapshot
            if isinstance(snapshot, End):
                if snapshot.outcome != "swept":
                    (revoked if snapshot.outcome == "revoked" else maintained).add(name.partition("/")[2])
                return
        except NotFound:
            return
        except Damaged as error:
            damaged.append((name, str(error)))
            return
        if removal_name(snapshot.header.snapshot_id, snapshot.attempt) in removed:
            gone.add(snapshot.attempt.hex())
        else:
            attempts[snapshot.header.snapshot_id] = (*attempts.get(snapshot.header.snapshot_id, ()), snapshot.attempt)
            other = found.get(snapshot.header.snapshot_id, snapshot)
            found[snapshot.header.snapshot_id] = min(snapshot, other, key=lambda each: each.attempt)
            hidden.extend([max(snapshot, other, key=lambda each: each.attempt)] if other is not snapshot else [])

    for batch in batches(infos, _AT_ONCE):
        known = await kept.get([info.name for info in batch if info.name not in opened]) if kept is not None else {}
        fetched: dict[str, bytes] = {}
        async with anyio.create_task_group() as group:
            for info in batch:
                group.start_soon(load, info, fetched)
        if kept is not None:
            await kept.keep(fetched)
    snapshots = sorted(found.values(), key=lambda snapshot: (snapshot.header.time_ns, snapshot.id))
    bad = {name for name, _ in damaged}
    committed = frozenset(info.name.partition("/")[2] for info in infos if info.name not in bad)
    doubtful = _not_older(infos, snapshots, bad)
    left = {match[1] for match in map(_REMOVAL.fullmatch, removed) if match} - {snapshot.id for snapshot in snapshots}
    return Commits(
        snapshots,
        committed - revoked,
        frozenset(revoked),
        sorted(damaged),
        doubtful,
        attempts,
        removed=frozenset(left),
        gone=frozenset(gone),
        hidden=tuple(hidden),
        maintained=frozenset(maintained),
    )


async def give_up(connector: Connector, sealer: Sealer, name: str) -> bool:
    """Put a tombstone over an object of snapshots/ that can't be read; False if it can be, or is gone.

    Whatever it was: index objects of its attempt are void from now on, so others must name what they name.
    """
    try:
        info = await connector.stat(name)
        _open(sealer, name, await _read_end(connector, info))
    except NotFound:
        return False
    except Damaged:
        tombstone = encode(End("revoked", time.time_ns()))
        await connector.put(name, [sealer.seal(sealing.END, name, os.urandom(ATTEMPT_BYTES), tombstone)])
        return True
    return False


async def _read_end(connector: Connector, info: ObjectInfo) -> bytes:
    """What stands there: maintenance puts a small end marker over a snapshot that was removed, at any time.

    :raises Damaged: if it is not as large as it is listed
    """
    try:
        return await read_listed(connector, info, MAX_SNAPSHOT_BYTES)
    except Damaged:
        now = info if info.size_bytes > MAX_SNAPSHOT_BYTES else await connector.stat(info.name)
        if now.size_bytes == info.size_bytes:
            raise
        return await read_listed(connector, now, MAX_SNAPSHOT_BYTES)


def _open(sealer: Sealer, name: str, data: bytes) -> Snapshot | End:
    return open_end(sealer, name, data) if sealing.kind_of(data) == sealing.END else open_snapshot(sealer, name, data)


def _open_kept(sealer: Sealer, name: str, data: bytes | None, size_bytes: int) -> Snapshot | End | None:
    """What is kept locally, if it is what the repository has: damage to it is no damage to that."""
    if data is None or len(data) != size_bytes:
        return None
    try:
        return _open(sealer, name, data)
    except Damaged:
        return None


def _not_older(listed: list[ObjectInfo], snapshots: list[Snapshot], bad: set[str]) -> tuple[str, ...]:
    """Those of the damaged objects that, by the storage's clock, were not put before the latest snapshot."""
    times = {info.name: info.mtime_s for info in listed}
    latest_s = times[snapshot_name(snapshots[-1].attempt)] if snapshots else 0.0
    return tuple(sorted(name for name in bad if times[name] >= latest_s))


async def load_whole(connector: Connector, sealer: Sealer, snapshot: Snapshot) -> Snapshot:
    """A listed snapshot with all that its object says: its faults, and what this version does not know.

    :raises Damaged: if the snapshot's object is not what was stored
    :raises NotFound: if it is gone
    """
    info = await connector.stat(snapshot_name(snapshot.attempt))
    return open_snapshot(sealer, info.name, await read_listed(connector, info, MAX_SNAPSHOT_BYTES), whole=True)


def current_user() -> str:
    """The name of the user who runs this, or the number if there is no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def find_snapshot(commits: Commits, text: str) -> Snapshot:
    """The snapshot that is meant by an id, a unique prefix of one, or `latest`.

    :raises NoSuchSnapshot: if none is, or several are
    :raises Damaged: if `latest` may mean one that can't be read
    """
    snapshots = commits.snapshots
    if text == "latest":
        if commits.doubtful:
            raise Damaged(
                f"{', '.join(commits.doubtful)} can't be read, and may be the latest snapshot",
                remedy="name a snapshot by its id; `coffret at REPO ls` shows those that can be read",
            )
        if not snapshots:
            raise NoSuchSnapshot("the repository has no snapshot", remedy="make one with `coffret at REPO backup PATH`")
        return snapshots[-1]
    found = [snapshot for snapshot in snapshots if text and snapshot.id.startswith(text.lower())]
    if not found:
        gone = [snapshot_id for snapshot_id in commits.removed if text and snapshot_id.startswith(text.lower())]
        raise NoSuchSnapshot(f"no snapshot {text!r}" + (": it was removed" if len(gone) == 1 else ""))
    if len(found) > 1:
        raise NoSuchSnapshot(
            f"{text!r} means {len(found)} snapshots: {', '.join(snapshot.short_id for snapshot in found[:8])}",
            remedy="give more digits of the id",
        )
    return found[0]
