"""Repair: have the index say again where everything lies; make of damaged snapshots others, of what is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coffret.engine.errors import Damaged, LeaseLost, reported
from coffret.engine.ops.check import Checking, CheckOptions
from coffret.engine.ops.rm import remove
from coffret.engine.progress import Progress
from coffret.engine.removal import put_removal, removal_here
from coffret.engine.repair_index import IndexRepair, IndexRepairOptions, IndexRepairSummary
from coffret.engine.repair_snapshot import Repaired, SnapshotRepair
from coffret.engine.rights import need
from coffret.engine.snapshot import give_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

__all__ = [
    "IndexRepairOptions",
    "IndexRepairSummary",
    "Repaired",
    "SnapshotRepairOptions",
    "SnapshotRepairSummary",
    "repair_index",
    "repair_snapshots",
]

# As a backup that is taken for dead, a repair tries again.
_ATTEMPTS = 3


async def repair_index(repository: Repository, options: IndexRepairOptions, progress: Progress) -> IndexRepairSummary:
    """Name every pack that no index object names, going by what the packs say.

    :raises LeaseLost: if maintenance ended the attempt again and again
    :raises Damaged: if an open mark can't be read: then it is not known which packs are to be left alone
    """
    if not options.dry_run:
        need(repository.connector, "repair of the index")
    for tries_left in reversed(range(_ATTEMPTS)):
        work = IndexRepair(repository, options, progress)
        try:
            await _try_index(work, options, progress)
        except Exception as error:
            _go_on(error, tries_left, progress)
            progress.files = progress.errors = 0
        else:
            return work.summary
        finally:
            repository.forget_commits()
    raise AssertionError("the last try returns or raises")


async def _try_index(work: IndexRepair, options: IndexRepairOptions, progress: Progress) -> None:
    async with work.attempt.at_work(progress, announced=not options.dry_run) as group:
        await work.run(group)
        await work.renew()
        if not options.dry_run:
            await work.commit()
        await work.drop()


def _go_on(error: Exception, tries_left: int, progress: Progress) -> None:
    """Raise an error that is to end the repair; of one that another attempt may not meet only tell."""
    if not tries_left or not isinstance(reported(error), LeaseLost):
        raise error
    progress.note("another process ended this attempt; trying again")


class SnapshotRepairOptions(msgspec.Struct, frozen=True):
    """How deep to look. `fast`: go by the index, and by existence and size of packs, and read none.

    `forget`: remove the damaged ones, once what is whole in them is in others, and give up what stands in snapshots/
    and can't be read. `dry_run`: only tell what is lost. `workers`: how many processes verify packs; None for what was
    measured best.
    """

    fast: bool = False
    forget: bool = False
    dry_run: bool = False
    workers: int | None = None


class SnapshotRepairSummary(msgspec.Struct):
    """What was found and done. `hopeless`: damaged snapshots of which nothing can be read; `removed`: those that were.

    Both by id. `unreadable`: names of objects in snapshots/ that can't be read; `given_up`: those that were.
    """

    snapshots: int = 0
    damaged: list[Snapshot] = msgspec.field(default_factory=list)
    repaired: list[Repaired] = msgspec.field(default_factory=list)
    hopeless: list[str] = msgspec.field(default_factory=list)
    removed: list[str] = msgspec.field(default_factory=list)
    unreadable: list[str] = msgspec.field(default_factory=list)
    given_up: list[str] = msgspec.field(default_factory=list)


async def repair_snapshots(
    repository: Repository, snapshots: Sequence[Snapshot] | None, options: SnapshotRepairOptions, progress: Progress
) -> SnapshotRepairSummary:
    """Make of each damaged one of these snapshots, or of all, another of what is whole in it.

    :raises LeaseLost: if maintenance ended an attempt again and again
    """
    if options.forget and not options.dry_run:
        need(repository.connector, "removing snapshots")
    whole = await _index_first(repository, options, progress)
    commits = await repository.commits()
    targets = [(snapshot, None) for snapshot in (commits.snapshots if snapshots is None else snapshots)]
    check = Checking(repository, CheckOptions(fast=options.fast, workers=options.workers), progress)
    if snapshots is None:
        await check.packs.run(None)
    else:
        await check.needed_packs(targets)
    await check.snapshots(targets)
    bad = set(check.damage.summary.damaged_snapshots)
    summary = SnapshotRepairSummary(len(targets), [snapshot for snapshot, _ in targets if snapshot.id in bad])
    for snapshot in [] if options.dry_run else summary.damaged:
        if (before := _repaired_before(snapshot, commits.snapshots)) is not None and before.id not in bad:
            progress.note(f"{snapshot.short_id} was repaired before: what is whole in it is in {before.short_id}")
            await _forget(repository, snapshot, options, summary, whole=whole)
            continue
        try:
            repaired = await _repair(repository, snapshot, check, progress)
        except Damaged as error:
            progress.note(f"{snapshot.short_id} can't be repaired, nothing of it can be read: {error}")
            summary.hopeless.append(snapshot.id)
            await _forget(repository, snapshot, options, summary, whole=whole)
            continue
        if repaired is not None:
            summary.repaired.append(repaired)
            await _forget(repository, snapshot, options, summary, whole=whole)
    if snapshots is None and commits.damaged:
        await _give_up(repository, [name for name, _ in commits.damaged], options, progress, summary, whole=whole)
    return summary


async def _give_up(
    repository: Repository,
    names: Sequence[str],
    options: SnapshotRepairOptions,
    progress: Progress,
    summary: SnapshotRepairSummary,
    *,
    whole: bool,
) -> None:
    """Give up what can't be read, if so asked: as long as it stands there, nothing can be removed.

    It may be a snapshot, or the tombstone of an attempt that must not be believed. So all packs that it may have named
    are named by others, as far as they are there, or the index is not `whole`.
    """
    if not options.forget or options.dry_run:
        for name in names:
            progress.note(f"{name} can't be read, and nothing can be removed while it is there; --forget gives it up")
        summary.unreadable += names
        return
    if not whole:
        progress.note("what can't be read is not given up while packs are marked for removal: run `repair index` first")
        summary.unreadable += names
        return
    for name in names:
        if await give_up(repository.connector, repository.sealer, name):
            summary.given_up.append(name)
            for snapshot_id, attempt in await repository.seen_as(name):  # so that nobody misses it
                await put_removal(repository.connector, repository.sealer, snapshot_id, attempt, removal_here())
    repository.forget_commits()


async def _index_first(repository: Repository, options: SnapshotRepairOptions, progress: Progress) -> bool:
    """Have the index name all packs, so that nothing is taken for lost that is only not found; whether it does now."""
    found = await repair_index(repository, IndexRepairOptions(dry_run=True), Progress())
    if found.indexed or found.dropped:
        if options.dry_run:
            progress.note(f"{found.indexed} packs are not in the index: `repair index` first, and less may be lost")
        else:
            progress.note(f"{found.indexed} packs that were not in the index are put there first")
            found = await repair_index(repository, IndexRepairOptions(), progress)
            progress.files = progress.errors = 0
    if found.left and options.forget:
        progress.note(
            "nothing is forgotten while packs are marked for removal that the index lost: `repair index` tells"
        )
    return not found.left


async def _forget(
    repository: Repository,
    snapshot: Snapshot,
    options: SnapshotRepairOptions,
    summary: SnapshotRepairSummary,
    *,
    whole: bool,
) -> None:
    """Remove a damaged snapshot, if so asked, now that what is whole in it is in another. `whole`: the index is."""
    if options.forget and whole:
        await remove(repository, [snapshot])
        summary.removed.append(snapshot.id)


def _repaired_before(damaged: Snapshot, snapshots: Sequence[Snapshot]) -> Snapshot | None:
    """The snapshot that was made of this one."""
    for other in snapshots:
        header = other.header
        if header.parent == damaged.header.snapshot_id and header.time_ns == damaged.header.time_ns + 1:
            return other
    return None


async def _repair(repository: Repository, snapshot: Snapshot, check: Checking, progress: Progress) -> Repaired | None:
    for tries_left in reversed(range(_ATTEMPTS)):
        work = SnapshotRepair(repository, snapshot, check.damage, progress)
        try:
            return await _try_snapshot(work, check, progress)
        except Exception as error:
            if isinstance(cause := reported(error), Damaged):
                raise cause from None
            _go_on(error, tries_left, progress)
        finally:
            repository.forget_commits()
    raise AssertionError("the last try returns or raises")


async def _try_snapshot(work: SnapshotRepair, check: Checking, progress: Progress) -> Repaired | None:
    async with work.attempt.at_work(progress) as group:
        if not await work.begin(group):
            progress.note(f"{work.damaged.short_id} was removed meanwhile")
            return None
        check.look(work.attempt.mirror)
        work.reasons = check.reasons
        return await work.commit(await work.run())
    raise AssertionError("a task group does not swallow what it did not cancel")
