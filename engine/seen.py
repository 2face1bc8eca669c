"""Rollback: which snapshots this user has seen in a repository, so that it is noticed when a storage hides some.

A storage can't forge a snapshot, but it can withhold one, or go back to an older state as a whole. So those that were
there are remembered in the state folder, as pins are (`engine/state.py`), by location and repository, 32 bytes each.
One that is gone must have been removed by somebody with the keys: there is a record of it that opens, or a swept
snapshot's end.

The *state* of a repository is a hash of the ids of its snapshots, to be compared on another machine (`--expect-state`).
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.connectors.errors import NotFound
from coffret.engine import sealing, state
from coffret.engine.errors import Damaged, RepositoryChanged
from coffret.engine.objects import MAX_MARK_BYTES, MAX_SNAPSHOT_BYTES, list_objects, read_listed
from coffret.engine.snapshot import SHORT_ID_DIGITS, open_end, open_snapshot, removal_name, snapshot_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from coffret.connectors.base import Connector
    from coffret.engine.sealing import Sealer
    from coffret.engine.snapshot import Commits, Snapshot

_MAGIC = b"coffret snapshots seen 1\n"
_CHECKSUM_BYTES, _PAIR_BYTES, _HALF = 16, 32, 16
# What is larger is no file of ours: 8 million snapshots.
_MAX_BYTES = 256 << 20
# So many are named, of those that are gone.
_NAMED = 8
_CONTEXT = "coffret 2026 state of a repository"

# A snapshot's id, and the attempt that committed it.
Pair = tuple[bytes, bytes]


class Seen(msgspec.Struct):
    """Snapshots that were there when they were looked at last, and those of them that were removed since."""

    live: set[Pair] = msgspec.field(default_factory=set)
    removed: set[Pair] = msgspec.field(default_factory=set)


class Rollback(msgspec.Struct, frozen=True):
    """What a storage does not show any more. `gone`: ids of snapshots, `back`: of such that had been removed."""

    gone: tuple[str, ...] = ()
    back: tuple[str, ...] = ()

    def told(self, now: str) -> str:
        """What to say of it, or "". `now`: the state there is."""
        parts = []
        if self.gone:
            parts.append(f"snapshots are gone that nobody has removed: {_listed(self.gone)}")
        if self.back:
            parts.append(f"snapshots are back that were removed: {_listed(self.back)}")
        if not parts:
            return ""
        return (
            f"WARNING: {'; '.join(parts)}. The storage shows an older state, or hides something; if that is intended"
            f" (it was put back from a copy, say), accept it with --expect-state {now}"
        )


def state_of(snapshot_ids: Iterable[bytes], id_key: bytes) -> str:
    """The state of a repository with these snapshots: 32 digits. Who lacks the key can't tell what it stands for."""
    key = blake3(id_key, derive_key_context=_CONTEXT).digest()
    return blake3(b"".join(sorted(snapshot_ids)), key=key).hexdigest(length=16)


async def check_expected(connector: Connector, commits: Commits, id_key: bytes, expected: str) -> None:
    """See that the repository has the state expected, or has had it, and only gained snapshots since.

    :raises RepositoryChanged: if it has not, or that can't be told
    """
    ids = [snapshot.header.snapshot_id for snapshot in commits.snapshots]
    if state_of(ids, id_key) == expected:
        return
    # Any part of what is there will do as a proof; by the storage's clock, which need not be right, it is found.
    times = {info.name: info.mtime_s for info in await list_objects(connector, "snapshots/")}
    ordered = sorted(commits.snapshots, key=lambda each: times.get(snapshot_name(each.attempt), 0.0))
    if not await to_thread.run_sync(_is_grown, ordered, id_key, expected):
        raise RepositoryChanged(
            f"the repository does not have the state expected, {expected}, nor that and newer snapshots;"
            f" its state is {state_of(ids, id_key)}",
            remedy="if snapshots were removed since, or came at the same time, compare `coffret at REPO ls` by hand and"
            " expect the state it has; otherwise do not trust this storage",
        )


def _is_grown(ordered: Sequence[Snapshot], id_key: bytes, expected: str) -> bool:
    ids = [snapshot.header.snapshot_id for snapshot in ordered]
    return any(state_of(ids[:count], id_key) == expected for count in range(len(ids) - 1, -1, -1))


class Watch:
    """Compares what a repository shows with what was seen of it. `path` is None where nothing can be remembered."""

    def __init__(self, connector: Connector, sealer: Sealer, path: Path | None) -> None:
        self._connector, self._sealer, self._path = connector, sealer, path

    async def look(self, commits: Commits, *, accept: bool = False) -> Rollback:
        """Compare a listing with what was seen, and remember it. `accept`: what is gone is not missed any more."""
        if self._path is None:
            return Rollback()
        seen = await to_thread.run_sync(read_seen, self._path)
        shown = {(each.header.snapshot_id, each.attempt) for each in commits.snapshots}
        ids = {snapshot_id for snapshot_id, _ in shown}
        unreadable = {name for name, _ in commits.damaged}  # told by itself
        absent = {pair for pair in seen.live if pair[0] not in ids and snapshot_name(pair[1]) not in unreadable}
        removed, back = absent, set[Pair]()
        if not accept:
            removed = {pair for pair in absent if await self._is_removed(pair)}
            # Another process may have seen what is newer than this listing.
            absent = {pair for pair in absent - removed if not await self._is_there(pair)}
            back = {pair for pair in shown & seen.removed if not await self._is_removed(pair)}
        await to_thread.run_sync(change_seen, self._path, shown, removed, accept)
        return Rollback(_ids(absent - removed), _ids(back))

    async def seen_as(self, name: str) -> list[Pair]:
        """What an object of snapshots/ was when it could be read: one snapshot, or nothing."""
        seen = await to_thread.run_sync(read_seen, self._path) if self._path is not None else Seen()
        return [pair for pair in seen.live if snapshot_name(pair[1]) == name]

    async def add(self, snapshot: Snapshot) -> None:
        """Remember a snapshot that was just made."""
        if self._path is not None:
            made = {(snapshot.header.snapshot_id, snapshot.attempt)}
            await to_thread.run_sync(change_seen, self._path, made, set(), False)

    async def drop(self, pairs: set[Pair]) -> None:
        """Remember that snapshots were just removed."""
        if self._path is not None:
            await to_thread.run_sync(change_seen, self._path, set(), pairs, False)

    async def _is_removed(self, pair: Pair) -> bool:
        """Whether somebody with the keys has removed a snapshot."""
        record, end = removal_name(*pair), snapshot_name(pair[1])
        if (data := await self._read(record, MAX_MARK_BYTES)) is not None:
            with suppress(Damaged):
                self._sealer.open(sealing.REMOVED, record, data)
                return True
        if (data := await self._read(end, MAX_SNAPSHOT_BYTES)) is not None:
            with suppress(Damaged):
                return open_end(self._sealer, end, data).outcome == "swept"
        return False

    async def _is_there(self, pair: Pair) -> bool:
        """Whether a snapshot is listed now, and nothing that was planted hides it."""
        name = snapshot_name(pair[1])
        listed = {info.name for info in await list_objects(self._connector, "snapshots/")}
        if name not in listed or (data := await self._read(name, MAX_SNAPSHOT_BYTES)) is None:
            return False
        try:
            found = open_snapshot(self._sealer, name, data).header.snapshot_id
        except Damaged:
            return False
        return found == pair[0] and await self._read(removal_name(*pair), MAX_MARK_BYTES) is None

    async def _read(self, name: str, limit_bytes: int) -> bytes | None:
        """An object; None if there is none, b"" if it can't be had."""
        try:
            return await read_listed(self._connector, await self._connector.stat(name), limit_bytes)
        except NotFound:
            return None
        except Damaged:
            return b""


def _ids(pairs: Iterable[Pair]) -> tuple[str, ...]:
    return tuple(sorted({snapshot_id.hex() for snapshot_id, _ in pairs}))


def seen_path(location: str, repository_id: str, folder: Path | None) -> Path | None:
    """Where the snapshots seen of a repository at a location are remembered; None if this user has no state folder."""
    try:
        return state.file_of(f"{location}\0{repository_id}", "seen", folder)
    except OSError:
        return None


def read_seen(path: Path) -> Seen:
    """What was seen; nothing if there is no file, or it is not whole: then it is begun anew."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError:
        return Seen()
    body = data[len(_MAGIC) + _CHECKSUM_BYTES :]
    if (
        data[: len(_MAGIC) + _CHECKSUM_BYTES] != _MAGIC + _checksum(body)
        or len(body) < 4
        or (len(body) - 4) % _PAIR_BYTES
    ):
        return Seen()
    pairs = [(body[at : at + _HALF], body[at + _HALF : at + _PAIR_BYTES]) for at in range(4, len(body), _PAIR_BYTES)]
    live = int.from_bytes(body[:4], "little")
    return Seen(set(pairs[:live]), set(pairs[live:]))


def change_seen(path: Path, live: set[Pair], removed: set[Pair], accept: bool) -> None:
    """Remember that these snapshots are there, and these were removed; `accept` that some of the former had been.

    Where that can't be written nothing is remembered: the pins say so when a repository is opened.
    """
    try:
        with state.locked(path.parent):
            seen = read_seen(path)
            gone = (seen.removed | removed) - (live if accept else set())
            fresh = Seen((seen.live | live) - gone, gone)
            if fresh != seen:
                state.replace_durably(path, _encoded(fresh))
    except OSError:
        return


def _encoded(seen: Seen) -> bytes:
    pairs = [b"".join(pair) for part in (seen.live, seen.removed) for pair in sorted(part)]
    body = len(seen.live).to_bytes(4, "little") + b"".join(pairs)
    return _MAGIC + _checksum(body) + body


def _checksum(body: bytes) -> bytes:
    return blake3(body).digest(length=_CHECKSUM_BYTES)


def _listed(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(each[:SHORT_ID_DIGITS] for each in ids[:_NAMED]) + more
