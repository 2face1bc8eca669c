"""Maintenance: give back the space of what no snapshot needs any more, beside any number of writers, without locks.

The steps are those of docs/format.md, "Many writers", and of the model in `tests/model/maintenance.py`: a *mark* says
which packs will be swept; when the grace is over, and each attempt that was at work then has ended, a *sweep* copies
what is needed of them, replaces the index objects that name them, commits, and only then deletes. Each is an attempt of
its own, with a lease. Whatever is cut off is taken up by the next run: the mark is still open.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
import msgspec

from coffret.connectors.errors import NotFound
from coffret.engine import sealing
from coffret.engine.attempt import Attempt, Lease
from coffret.engine.creation import RACERS, put_race
from coffret.engine.errors import Damaged, UsageError
from coffret.engine.maintenance_choice import Choice
from coffret.engine.maintenance_dead import bury, make_way
from coffret.engine.maintenance_mark import choose_packs, clear_the_dead
from coffret.engine.maintenance_marks import list_marks, put_done, put_mark, read_mark, record_seen
from coffret.engine.maintenance_sweep import Merge, Sweep
from coffret.engine.maintenance_view import TRIES, Scene, others_at_work
from coffret.engine.objects import list_objects
from coffret.engine.pipeline import Limits
from coffret.engine.records import ATTEMPT_BYTES, encode
from coffret.engine.rights import need
from coffret.engine.snapshot import snapshot_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from coffret.connectors.base import ObjectInfo
    from coffret.engine.maintenance_marks import Marks
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository

__all__ = ["MaintenanceOptions", "MaintenanceSummary", "maintain"]

T = TypeVar("T")
GRACE_S = 24 * 3600.0
# A run with a grace of zero marks and sweeps until nothing is left to do: each round frees something.
_ROUNDS = 1000
# What a run that is cut off may take to say that what it put is void (s).
_LAST_S = 20


class MaintenanceOptions(msgspec.Struct, frozen=True):
    """How to maintain. `grace_s`: how long after a mark its packs are left alone, by the storage's clock: longer than
    any request can be late. `exclusive`: the user vouches that nobody else works on the repository now."""

    grace_s: float = GRACE_S
    exclusive: bool = False
    dry_run: bool = False
    limits: Limits = msgspec.field(default_factory=Limits)


class MaintenanceSummary(msgspec.Struct):
    """What was done. Of a dry run: what would be marked, or how many packs are marked already (`open_packs`).

    `missing_packs`: how many of those marked were not there any more: the index forgets them. `sweep_in_s`: how long
    until the open mark can be swept; None if there is none. `damaged_packs`: names of those that were swept, and of
    which something that snapshots need could not be read; it is kept as it is.
    """

    marked_packs: int = 0
    marked_bytes: int = 0
    to_copy_bytes: int = 0
    swept_packs: int = 0
    missing_packs: int = 0
    freed_bytes: int = 0
    stored_bytes: int = 0
    merged_objects: int = 0
    ended_attempts: int = 0
    open_packs: int = 0
    sweep_in_s: float | None = None
    damaged_packs: list[str] = msgspec.field(default_factory=list)

    @property
    def nothing(self) -> bool:
        """Whether nothing had to be done."""
        return self == MaintenanceSummary()


async def maintain(repository: Repository, options: MaintenanceOptions, progress: Progress) -> MaintenanceSummary:
    """Mark, sweep and merge, as far as that is possible now.

    :raises UsageError: if the storage can't keep two writers from taking one name, unless `exclusive`
    :raises InTheWay: if an attempt at work has to end first
    :raises LeaseLost: if another maintenance took this one for dead
    :raises Unresolved: if a snapshot can't be resolved; then nothing is deleted
    """
    if not options.dry_run:
        need(repository.connector, "maintenance")
    if not (options.exclusive or options.dry_run or await _excludes(repository)):
        raise UsageError(
            "this storage has no put-if-absent: maintenance could delete what a writer at work relies on",
            remedy="make sure that nobody else works on the repository, and say --exclusive",
        )
    work = _Maintenance(repository, options, progress)
    if options.dry_run:
        await work.look()
    else:
        try:
            await work.run()
        finally:
            repository.forget_commits()
    return work.summary


async def _excludes(repository: Repository) -> bool:
    """Whether the storage lets one of several racing puts win: it says so, and does."""
    if not repository.connector.capabilities.exclusive_puts:
        return False
    while True:
        attempt = os.urandom(ATTEMPT_BYTES)
        name = f"leases/{attempt.hex()}"
        payload = encode(Lease(socket.gethostname(), os.getpid(), "test of the storage", time.time_ns()))
        bodies = [repository.sealer.seal(sealing.LEASE, name, attempt, payload) for _ in range(RACERS)]
        if await put_race(repository.connector, name, bodies) == 1:
            return True
        # Another maintenance may have taken it for dead, and deleted it in between.
        if await _is_absent(repository, snapshot_name(attempt)):
            return False


async def _is_absent(repository: Repository, name: str) -> bool:
    try:
        await repository.connector.stat(name)
    except NotFound:
        return True
    return False


class _Maintenance:
    def __init__(self, repository: Repository, options: MaintenanceOptions, progress: Progress) -> None:
        self._repository, self._options, self._progress = repository, options, progress
        self._connector, self._sealer = repository.connector, repository.sealer
        self.summary = MaintenanceSummary()

    async def run(self) -> None:
        """Sweep what is marked, mark what is to be swept, until nothing is left to do now; then merge."""
        for _ in range(_ROUNDS):
            marks = await list_marks(self._connector)
            if marks.open:
                number, packs = await self._next(marks)
                if not await self._sweep(number, marks.open[number], packs):
                    if packs is None:  # until it is over nothing else can be looked at
                        return
                    break
            elif not await self._as_attempt(self._mark):
                break
        await self._as_attempt(self._merge)

    async def look(self) -> None:
        """What a run would mark, or has to wait for; nothing is written."""
        attempt = Attempt(self._connector, self._sealer, self._repository.mirror, what="maintenance")
        try:
            marks = await list_marks(self._connector)
            for info in marks.open.values():
                self.summary.open_packs += len(await read_mark(self._connector, self._sealer, info))
            if not marks.open:
                self._tell((await self._choose(attempt))[0])
        finally:
            await attempt.end()

    # One attempt ------------------------------------------------------------------------------------------------------

    async def _as_attempt(self, work: Callable[[Attempt], Awaitable[T]]) -> T:
        """Do something as an attempt: with a lease, refreshed meanwhile, that is gone at the end.

        What an attempt has put that comes to no end is void at once: it ends itself by a tombstone.
        """
        attempt = Attempt(
            self._connector, self._sealer, self._repository.mirror, what="maintenance", kept=self._repository.kept
        )
        async with attempt.at_work(self._progress):
            try:
                return await work(attempt)
            except BaseException:
                if attempt.unfinished:
                    with suppress(Exception), anyio.move_on_after(_LAST_S, shield=True):
                        await bury(self._connector, self._sealer, attempt.id.hex(), attempt.id)
                raise
        raise AssertionError("a task group does not swallow what it did not cancel")

    # Mark -------------------------------------------------------------------------------------------------------------

    async def _mark(self, attempt: Attempt) -> bool:
        """Put a mark, if there is something to be swept; return whether there is one now."""
        choice, top = await self._choose(attempt, await attempt.clock())
        if not choice.packs or top is None:
            return top is None
        if await put_mark(self._connector, self._sealer, attempt.id, top + 1, choice.packs):
            self._tell(choice)
        await attempt.conclude()
        return True

    def _tell(self, choice: Choice) -> None:
        self.summary.marked_packs += len(choice.packs)
        self.summary.marked_bytes += choice.size_bytes
        self.summary.to_copy_bytes += choice.live_bytes

    async def _choose(self, attempt: Attempt, now_s: float | None = None) -> tuple[Choice, int | None]:
        """What to sweep, and the highest number of a mark; None for that if a mark is open.

        Without a time nobody is taken for dead.
        """
        self._progress.phase = "looking"
        scene = Scene(self._repository, attempt, self._progress)
        for _ in range(TRIES):
            marks = await list_marks(self._connector)
            if marks.open:
                return Choice(), None
            await scene.look()
            if now_s is not None:
                ended = await clear_the_dead(self._repository, scene, now_s, self._options.grace_s)
                self.summary.ended_attempts += ended
                if ended:
                    continue
            # As if they were to be swept, to learn what is needed of them that lies nowhere else.
            if (needs := await scene.resolve(doomed=attempt.mirror.bad_packs)) is not None:
                return await choose_packs(self._repository, scene, needs), marks.top
        raise others_at_work()

    # Sweep ------------------------------------------------------------------------------------------------------------

    async def _next(self, marks: Marks) -> tuple[int, frozenset[bytes] | None]:
        """The mark to go on with, and what it names, None if that can't be read: such a one comes first.

        There is one, but where the end of another was lost.
        """
        named: dict[int, frozenset[bytes]] = {}
        for number, info in sorted(marks.open.items()):
            try:
                named[number] = await read_mark(self._connector, self._sealer, info)
            except Damaged:
                return number, None
        return min(named.items())

    async def _sweep(self, number: int, mark: ObjectInfo, packs: frozenset[bytes] | None) -> bool:
        """Sweep an open mark, which names these packs, if that is possible now; return whether it is over."""
        # Before the lease of this attempt: it is not one that the sweep has to wait for.
        seen = await record_seen(self._connector, self._sealer, bytes(16), mark)
        return await self._as_attempt(partial(self._sweep_as, number=number, packs=packs, seen=seen))

    async def _sweep_as(
        self, attempt: Attempt, *, number: int, packs: frozenset[bytes] | None, seen: frozenset[str]
    ) -> bool:
        now_s = await attempt.clock()
        self.summary.sweep_in_s = None
        ended = await self._wait_for(attempt, seen, now_s)
        marks = await list_marks(self._connector)
        if number not in marks.open or number not in marks.seen:
            return True
        if self._options.grace_s:
            begun_s = max(
                [
                    marks.open[number].mtime_s,
                    marks.seen[number].mtime_s,
                    *(ended[each] for each in seen if each in ended),
                ]
            )
            if (left_s := begun_s + self._options.grace_s - now_s) > 0:
                self.summary.sweep_in_s = left_s
                return False
        if packs is None:
            # Who knew what it names has ended, and what may have been late of theirs has arrived.
            self._progress.note(f"trash/{number} can't be read, and is ended: what it named is looked for anew")
            await put_done(self._connector, self._sealer, attempt.id, number)
            return True
        sweep = Sweep(self._repository, attempt, number, packs, self._options.limits, self._progress)
        await sweep.run()
        self.summary.swept_packs += sweep.deleted_packs
        self.summary.missing_packs += sweep.missing_packs
        self.summary.freed_bytes += sweep.deleted_bytes
        self.summary.stored_bytes += sweep.stored_bytes
        self.summary.ended_attempts += sweep.ended_attempts
        self.summary.damaged_packs += sweep.damaged_packs
        return True

    async def _wait_for(self, attempt: Attempt, seen: frozenset[str], now_s: float) -> dict[str, float]:
        """See that each attempt seen has ended, taking those for dead that are; when each has ended.

        :raises InTheWay: if one is at work
        """
        while True:
            listed = await list_objects(self._connector, "snapshots/")
            ended = {info.name.partition("/")[2]: info.mtime_s for info in listed}
            if not (waiting := seen - ended.keys()):
                return ended
            self.summary.ended_attempts += await make_way(self._connector, self._sealer, waiting, now_s, attempt.id)

    # Merge ------------------------------------------------------------------------------------------------------------

    async def _merge(self, attempt: Attempt) -> None:
        """Replace many small index objects by few, and delete those that are void."""
        merge = Merge(self._repository, attempt, self._progress)
        await merge.run()
        self.summary.merged_objects += merge.deleted_objects
