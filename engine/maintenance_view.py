"""What one attempt of maintenance sees of a repository: everything listed anew, all that snapshots need resolved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from coffret.connectors.errors import ConnectorError
from coffret.engine import sealing
from coffret.engine.errors import Damaged, InTheWay
from coffret.engine.maintenance_needs import Needs
from coffret.engine.maintenance_walk import Resolver, Unresolved
from coffret.engine.mirror_run import PACK
from coffret.engine.mirror_view import SURE
from coffret.engine.objects import list_objects
from coffret.engine.packfile import pack_name
from coffret.engine.packlist import PackList
from coffret.engine.records import ATTEMPT_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from coffret.connectors.base import ObjectInfo
    from coffret.engine.attempt import Attempt
    from coffret.engine.mirror_view import View
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository

# A listing during which other maintenance has ended may have missed what that moved: so often all is listed anew.
TRIES = 10
# What index objects say of a pack: nothing; something; something, and an attempt that put it or says so has not ended.
UNNAMED, NAMED, BUSY = range(3)


class Scene:
    """The repository as an attempt has listed it: `look` first. `packs`: the packs there are."""

    def __init__(self, repository: Repository, attempt: Attempt, progress: Progress) -> None:
        self._repository, self.attempt, self._progress = repository, attempt, progress
        self.packs = PackList()
        self.index: list[ObjectInfo] = []
        self._known: frozenset[str] = frozenset()
        self._owners: dict[bytes, str] = {}

    @property
    def view(self) -> View:
        """The index as it was listed."""
        return self.attempt.mirror.seen

    @property
    def ended(self) -> frozenset[str]:
        """The attempts that have ended, however."""
        return self.attempt.commits.committed | self.attempt.commits.revoked

    async def look(self) -> None:
        """List the names in snapshots/; then trash, index, snapshots and removals, as any attempt does; then packs.

        :raises Damaged: if what snapshots need, or where it lies, can't be told
        """
        connector = self._repository.connector
        for tries_left in reversed(range(TRIES)):
            listed = await list_objects(connector, "snapshots/")
            self._known = frozenset(info.name.partition("/")[2] for info in listed)
            await self.attempt.begin()
            bad = [*self.attempt.commits.damaged, *self.attempt.damaged]
            if not bad:
                break
            if tries_left and (not self.whole or await self.moved()):
                continue  # what was listed and is gone was replaced
            name, reason = bad[0]
            what = "index" if name.startswith("index/") else "snapshots --forget"
            raise Damaged(
                f"nothing can be removed while {name} can't be read: {reason.removeprefix(f'{name}: ')}",
                remedy=f"put it back if you have it elsewhere, or give it up by `coffret at REPO repair {what}`;"
                " `coffret at REPO check` tells what else is damaged",
            )
        self.index = await list_objects(connector, "index/")
        self.packs = await PackList.listed(connector)

    @property
    def whole(self) -> bool:
        """Whether nothing that deletes index objects has ended while the index was listed.

        An index object is deleted only after the attempt that replaced it has committed. If each attempt of maintenance
        known afterwards was known before, then what replaces an object deleted meanwhile was there from the start.
        """
        return self.attempt.commits.maintained <= self._known

    async def resolve(self, *, doomed: Collection[bytes] = ()) -> Needs | None:
        """Find all that the snapshots need; None if the listing was not whole: look again.

        :raises Unresolved: if something can't be found
        """
        needs = Needs(self.view, self.packs, doomed=doomed, bad=self.attempt.mirror.bad_packs)
        resolver = Resolver(needs, self._repository.fetcher(self.attempt.mirror), self._progress)
        commits = self.attempt.commits
        for snapshot in (*commits.snapshots, *commits.hidden):
            self._progress.subject = snapshot.short_id
            try:
                await resolver.snapshot(snapshot)
            except Unresolved:
                if snapshot.attempt.hex() not in self._known:
                    continue  # committed since; it knows of the mark, or is waited for
                if not self.whole or await self.moved():
                    return None
                raise
        return needs

    async def moved(self) -> bool:
        """Whether maintenance has ended since the listing: it may have deleted what was listed."""
        from coffret.engine.snapshot import load_commits

        commits = await load_commits(self._repository.connector, self._repository.sealer, self._repository.kept)
        return not commits.maintained <= self.attempt.commits.maintained or bool(
            commits.gone - self.attempt.commits.gone
        )

    async def naming(self, packs: Collection[bytes]) -> frozenset[str]:
        """The index objects that name one of some packs."""
        return await to_thread.run_sync(self._naming, packs)

    def _naming(self, packs: Collection[bytes]) -> frozenset[str]:
        view, owners = self.view, set()
        for run in view.runs:
            for number, span in enumerate(run.info.spans):
                if view.state(span) and any(pack in packs for pack, _, _ in PACK.iter_unpack(run.packs(number))):
                    owners.add(span.owner)
        return frozenset(name for name, (first, _) in view.objects.items() if first in owners)

    async def named(self) -> bytearray:
        """Of each pack, by its number: UNNAMED by any index object, NAMED, or BUSY."""
        return await to_thread.run_sync(self._named)

    def _named(self) -> bytearray:
        named = bytearray([UNNAMED]) * len(self.packs)
        for pack, state in self._mentions():
            if (number := self.packs.number(pack)) >= 0:
                named[number] = max(named[number], state)
        return named

    async def missing(self, most: int) -> list[bytes]:
        """Packs, up to so many, that index objects of attempts that have ended name, and that are not there.

        They are lost. Nobody has swept them since no mark was open: a sweep waits for this attempt.
        """
        return await to_thread.run_sync(self._missing, most)

    def _missing(self, most: int) -> list[bytes]:
        missing: dict[bytes, int] = {}
        for pack, state in self._mentions():
            if self.packs.number(pack) < 0 and (pack in missing or len(missing) < most):
                missing[pack] = max(missing.get(pack, UNNAMED), state)
        return [pack for pack, state in missing.items() if state == NAMED]

    def _mentions(self) -> Iterator[tuple[bytes, int]]:
        """Each pack that an index object names, NAMED or BUSY by that, as often as one does."""
        view, ended = self.view, {bytes.fromhex(attempt) for attempt in self.ended if len(attempt) == 32}
        for run in view.runs:
            for at, span in enumerate(run.info.spans):
                state = view.state(span)
                for pack, header, _ in PACK.iter_unpack(run.packs(at)) if state else ():
                    free = state == SURE and header[12 : 12 + ATTEMPT_BYTES] in ended
                    yield pack, NAMED if free else BUSY

    async def owners(self, named: bytearray) -> dict[int, str]:
        """The attempts that put the packs which no index object names, by number, as far as that can be told."""
        connector = self._repository.connector
        gets = anyio.CapacityLimiter(connector.capabilities.parallel_gets)

        async def look(pack: bytes) -> None:
            async with gets:
                try:
                    header = await connector.get(pack_name(pack), length=sealing.HEADER_BYTES)
                except ConnectorError:
                    return  # gone meanwhile, or cut short
            if sealing.kind_of(header) == sealing.PACK:
                self._owners[pack] = header[12 : 12 + ATTEMPT_BYTES].hex()

        unnamed = {self.packs[number][0]: number for number, state in enumerate(named) if state == UNNAMED}
        unknown = [pack for pack in unnamed if pack not in self._owners]
        for at in range(0, len(unknown), 1000):
            async with anyio.create_task_group() as group:
                for pack in unknown[at : at + 1000]:
                    group.start_soon(look, pack)
        return {number: self._owners[pack] for pack, number in unnamed.items() if pack in self._owners}


def others_at_work() -> InTheWay:
    """What to raise when each listing finds that other maintenance has moved things."""
    return InTheWay("another maintenance is at work, and moves what this one looks at")
