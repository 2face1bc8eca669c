"""Sync: copy snapshots from one repository into another, whatever their keys; each is an attempt of its own there."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from coffret.connectors.base import FULL
from coffret.connectors.errors import NotFound
from coffret.engine import settings
from coffret.engine.attempt import Attempt
from coffret.engine.errors import CoffretError, Damaged, LeaseLost, UsageError, reported
from coffret.engine.index import IndexWriter
from coffret.engine.known import KnownChunks
from coffret.engine.opening import check_two
from coffret.engine.pipeline import Limits
from coffret.engine.records import ID_BYTES
from coffret.engine.snapshot import Snapshot, load_whole
from coffret.engine.sync_catalog import CatalogCopy
from coffret.engine.sync_ids import SyncIds
from coffret.engine.sync_move import Mover

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.abc import TaskGroup

    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository
    from coffret.engine.selection import Selection
    from coffret.engine.snapshot import Commits, Opened

# An attempt that was ended by another process is made anew this many times; see `ops.backup`.
_ATTEMPTS = 3
# What an attempt has counted that comes to nothing is counted again by the next.
_COUNTERS = ("files", "size_bytes", "read_bytes", "added_bytes", "stored_bytes")


class SyncOptions(msgspec.Struct, frozen=True):
    """How to copy. `level`: zstd level for what has to be compressed, None for none; `repack`: compress all anew.

    `on_copied` is called for each snapshot that was copied. `back`: ids of snapshots that were removed from the target,
    and are to be there again. `shared`: snapshots that both have: what packs held that are known to be damaged in the
    target is copied anew.
    """

    level: int | None = settings.COMPRESSION_LEVELS["default"]
    repack: bool = False
    limits: Limits = msgspec.field(default_factory=Limits)
    on_copied: Callable[[Snapshot], None] | None = None
    back: frozenset[str] = frozenset()
    shared: Sequence[Snapshot] = ()


class SyncSummary(msgspec.Struct):
    """What a sync did: the snapshots that the target has now, and those that are damaged in the source."""

    copied: list[Snapshot] = msgspec.field(default_factory=list)
    damaged: list[Snapshot] = msgspec.field(default_factory=list)
    duration_ns: int = 0


class Lacking(msgspec.Struct, frozen=True):
    """Snapshots that a target lacks, by time; and those that were removed there, and are not to come back unasked.

    `back`: ids of those that were removed and are to come back. `shared`: what was asked for and is there.
    """

    snapshots: list[Snapshot]
    removed: list[Snapshot]
    back: frozenset[str] = frozenset()
    shared: Sequence[Snapshot] = ()


def lacking(source: Commits, target: Commits, selection: Selection, *, both_ways: bool = False) -> Lacking:
    """What a sync is to copy. What was removed from the target comes back only when it is named.

    `both_ways`: a snapshot that is named need only be in one of the two.

    :raises NoSuchSnapshot: if one that is named is none of the source's, or several
    """
    there = {snapshot.id for snapshot in target.snapshots}
    asked = selection.of(source, target if both_ways else None)
    missing = [snapshot for snapshot in asked if snapshot.id not in there]
    removed = [each for each in missing if each.id in target.removed and not selection.names(each)]
    snapshots = [each for each in missing if each not in removed]
    shared = [snapshot for snapshot in asked if snapshot.id in there]
    return Lacking(snapshots, removed, frozenset(each.id for each in snapshots) & target.removed, shared)


def check_pair(source: Repository, target: Repository) -> None:
    """See that one can be copied into the other.

    :raises UsageError: if they are one and the same, or cut so differently that blocks of one do not fit the other
    """
    check_two(source.connector, target.connector)
    if source.config.chunker.max_bytes > target.config.chunker.max_bytes:
        raise UsageError(
            f"files in {source.connector.location} are cut into larger chunks than {target.connector.location} takes",
            remedy="make the other one with `create --like` the first",
        )


async def sync(
    source: Repository, target: Repository, snapshots: Sequence[Snapshot], options: SyncOptions, progress: Progress
) -> SyncSummary:
    """Copy snapshots, as the source lists them: same ids, times and metadata, sealed with the target's keys.

    A snapshot that is damaged in the source is reported as a fault and left out; the rest goes on.

    :raises UsageError: if the two can't be synced
    :raises LeaseLost: if another process ended the attempt again and again
    :raises CoffretError, ConnectorError: if a storage can't be used, possibly in an ExceptionGroup
    """
    check_pair(source, target)
    summary, clock_ns = SyncSummary(), time.perf_counter_ns()
    # Without a snapshot an attempt ends by what takes a full token.
    heals = options.shared and target.connector.capabilities.right == FULL and await target.mirror.known_bad()
    shared = options.shared if heals else ()
    if works := [*((snapshot, _Copy) for snapshot in snapshots), *((snapshot, _Healing) for snapshot in shared)]:
        await source.commits()  # and with that, where chunks lie
        progress.phase = "sync"
        # What was counted by now is of the other direction.
        progress.files_total = progress.files + sum(snapshot.header.counts.files for snapshot, _ in works)
        progress.size_total = progress.size_bytes + sum(snapshot.header.counts.size_bytes for snapshot, _ in works)
        opened: Opened = {}
        async with SyncIds(source, target) as ids:
            for snapshot, kind in works:
                progress.subject = snapshot.short_id
                begin = partial(kind, source, target, snapshot, ids, opened, options, progress)
                await _sync_one(begin, source, snapshot, options, progress, summary)
    summary.duration_ns = time.perf_counter_ns() - clock_ns
    return summary


async def _sync_one(
    begin: Callable[[], _Copy],
    source: Repository,
    snapshot: Snapshot,
    options: SyncOptions,
    progress: Progress,
    summary: SyncSummary,
) -> None:
    before = {name: getattr(progress, name) for name in _COUNTERS}
    for tries_left in reversed(range(_ATTEMPTS)):
        copy = begin()
        try:
            copied = await _try(copy, progress)
        except Exception as error:
            cause = reported(error)
            if isinstance(cause, LeaseLost) and tries_left:
                progress.note("another process ended this attempt; trying again")
                for name, value in before.items():
                    setattr(progress, name, value)
                continue
            if not isinstance(cause, Damaged) or not copy.reading:
                raise
            if snapshot.id not in {each.id for each in (await source.listed()).snapshots}:
                progress.note(f"{snapshot.short_id} was removed from {source.connector.location} meanwhile")
                return
            summary.damaged.append(snapshot)
            progress.fault(snapshot.short_id.encode(), f"damaged in {source.connector.location}: {cause}")
            return
        if copied is not None:
            summary.copied.append(copied)
            if options.on_copied is not None:
                options.on_copied(copied)
        return


async def _try(copy: _Copy, progress: Progress) -> Snapshot | None:
    async with copy.attempt.at_work(progress) as group:
        try:
            await copy.attempt.begin()
            if copy.settled():
                return None
            copy.attempt.tell(progress)
            await copy.run(group)
            return await copy.commit()
        except BaseException:
            await copy.salvage()
            raise
    raise AssertionError("a task group does not swallow what it did not cancel")


class _Copy:
    """One attempt to copy one snapshot: `attempt.begin`, `run`, `commit`, in this order."""

    def __init__(
        self,
        source: Repository,
        target: Repository,
        snapshot: Snapshot,
        ids: SyncIds,
        opened: Opened,
        options: SyncOptions,
        progress: Progress,
    ) -> None:
        self._source, self._target, self._snapshot = source, target, snapshot
        self._ids, self._options, self._progress = ids, options, progress
        self.attempt = Attempt(
            target.connector, target.sealer, target.mirror, what="sync", kept=target.kept, opened=opened
        )
        self._index: IndexWriter | None = None
        #: Whether what is damaged now is the source, as far as that can be told.
        self.reading = False

    def settled(self) -> bool:
        """Whether the target, as it was listed now, has the snapshot already, or has had it removed meanwhile."""
        snapshot_id = self._snapshot.id
        if self._listed:
            return True
        if removed := snapshot_id in self.attempt.commits.removed and snapshot_id not in self._options.back:
            self._progress.note(f"{self._snapshot.short_id} was removed from the target meanwhile: it is not copied")
        return removed

    @property
    def _listed(self) -> bool:
        """Whether the target has the snapshot."""
        return any(snapshot.id == self._snapshot.id for snapshot in self.attempt.commits.snapshots)

    async def run(self, group: TaskGroup) -> None:
        """Store all that the target lacks, and make the index durable. `group`: for its helpers."""
        target, attempt, mirror = self._target, self.attempt, self.attempt.mirror
        known = KnownChunks(mirror, marked=attempt.marked | mirror.bad_packs)
        self._index = IndexWriter(target.connector, target.sealer, attempt.id, mirror=mirror, known=known)
        group.start_soon(self._index.keep)
        mover = Mover(
            self._source,
            target,
            attempt=attempt.id,
            known=known,
            index=self._index,
            level=self._options.level,
            repack=self._options.repack,
            limits=self._options.limits,
            progress=self._progress,
        )
        self.reading = True
        try:
            whole = await load_whole(self._source.connector, self._source.sealer, self._snapshot)
        except NotFound as error:
            raise Damaged(f"it is gone: {error}") from None
        catalog = CatalogCopy(
            self._source.fetcher(strict=True).load,
            ids=self._ids,
            id_key=target.secrets.id_key,
            attempt=attempt.id,
            sound=self._sound(),
            known=known,
            mover=mover,
            progress=self._progress,
        )
        async with mover.at_work():
            root = await catalog.run(whole.header.catalog, whole.header.depth)
        self.reading = False
        copied = msgspec.structs.replace(whole.header, catalog=root)
        self._copy = Snapshot(self.attempt.id, copied, whole.unknown)
        await self._index.flush(last=True)

    def _sound(self) -> frozenset[bytes]:
        """Attempts whose snapshots are listed in the target, and known to have all their chunks there."""
        attempt, mirror = self.attempt, self.attempt.mirror
        if attempt.marked or attempt.damaged or mirror.bad_packs:
            return frozenset()
        return frozenset(
            snapshot.attempt
            for snapshot in attempt.commits.snapshots
            if mirror.is_sound(snapshot.header.catalog[:ID_BYTES])
        )

    async def salvage(self) -> None:
        """The run ends early: index what is stored already."""
        if self._index is not None:
            await self._index.salvage()

    async def commit(self) -> Snapshot | None:
        """Put the snapshot, and return it, if one is made."""
        await self.attempt.commit(self._copy)
        await self._target.saw(self._copy)
        with contextlib.suppress(CoffretError):  # without the note the next run looks it up again
            await self.attempt.mirror.vouch(self._copy.header.catalog[:ID_BYTES])
        return self._copy


class _Healing(_Copy):
    """One attempt to copy what the target has lost of a snapshot that it has; no other one is made for it."""

    def settled(self) -> bool:
        return not self._listed or not self.attempt.mirror.bad_packs

    async def commit(self) -> Snapshot | None:
        if self._index is not None and self._index.count:
            await self.attempt.conclude()
            self._progress.note(f"{self._snapshot.short_id}: what damaged packs held was copied anew")
        return None
