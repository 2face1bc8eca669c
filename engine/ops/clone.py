"""Clone: make an exact copy of a repository in another storage, or bring one up to date, without any key.

Objects are copied as they are. At every moment the copy is no repository yet, since it has no config, or a whole one:
packs are copied before the index objects that name them, and those before the snapshots that need them, from a listing
of the original that was made in the opposite order. So an index object in the copy always finds its packs there.

Backups may go on in the original meanwhile. Maintenance may take objects away; what it puts in their place is listed
anew. When snapshots are copied no maintenance has committed since they were listed, so what they need is in the index
that was copied.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread

from coffret.connectors.errors import AlreadyExists, ConnectorError, NotFound, NotStorage
from coffret.engine import configuration, sealing, state
from coffret.engine.clone_conflicts import check_sizes, check_snapshots, kinds_of
from coffret.engine.clone_keys import check_removals, copy_keys
from coffret.engine.configuration import CONFIG_NAME
from coffret.engine.contents import list_contents, list_snapshots, open_marks
from coffret.engine.copier import Copier
from coffret.engine.creation import probe
from coffret.engine.errors import CoffretError, InTheWay, NoRepository, UsageError
from coffret.engine.objects import CLONE, put_once
from coffret.engine.opening import bare_storage, known_config
from coffret.engine.progress import Progress
from coffret.engine.repository import OpenOptions
from coffret.engine.rights import need
from coffret.engine.settings import LEASE_REFRESH_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coffret.connectors.base import Connector
    from coffret.engine.contents import Contents
    from coffret.engine.records import Config

# Each is begun because maintenance ended since the last: a repository that never comes to rest is not waited for.
_PASSES = 10
_ELSEWHERE = "choose a new or an empty place"
# A mark, who was seen after it, and its end.
_MARK_ENDS = ("", "seen", "done")


class CloneSummary(msgspec.Struct, frozen=True):
    """What a clone did: objects copied, and their bytes; `kept` were there already; `damaged` could not be copied."""

    config: Config
    objects: int
    size_bytes: int
    kept: int
    damaged: dict[str, str]


async def clone(
    url: str,
    target_url: str,
    *,
    options: OpenOptions | None = None,
    target_options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> CloneSummary:
    """Copy the repository at `url` to `target_url`, or what is missing there of it.

    :raises NoRepository: if there is no repository, or the target holds something else
    :raises UsageError: if the target is another repository, or was used by itself since it was copied
    :raises RepositoryChanged: if one of the two is not what was at its location before
    :raises Damaged: if the config, or all key slots of an encrypted repository, are damaged
    """
    options, progress = options or OpenOptions(), progress or Progress()
    target_options = target_options or OpenOptions(state_dir=options.state_dir)
    async with bare_storage(url, options) as source, bare_storage(target_url, target_options) as target:
        data = await known_config(source, url, options)
        _check_apart(source, target)
        work = _Clone(source, target, data, target_options, progress)
        try:
            await work.prepare(target_url, options.expect_id)
            await work.run()
            await work.finish(target_url)
        finally:
            work.copier.close()
        for note in target.notes:
            progress.note(note)
        return work.summary()


def _check_apart(source: Connector, target: Connector) -> None:
    """
    :raises UsageError: if the copy would lie in the repository itself
    """
    inside = any(there == here or here in there.parents for here in source.places for there in target.places)
    if inside or source.location == target.location:
        raise UsageError(f"{target.location} lies in the repository itself", remedy="choose another place")


class _Clone:
    def __init__(
        self, source: Connector, target: Connector, data: bytes, target_options: OpenOptions, progress: Progress
    ) -> None:
        self._source, self._target, self._data, self._progress = source, target, data, progress
        self._state_dir = target_options.state_dir
        self._config = configuration.parse_config(data)
        self.copier = Copier(source, target, self._config, progress)
        # Whether the target has the config, and so may have been used by itself; and which id is accepted there.
        self._exists = False
        self._expect_id: str | None = None
        self._listed: Contents | None = None
        self._kept = 0

    async def prepare(self, url: str, expect_id: str | None) -> None:
        """See what the target is, and make it ready; nothing is changed there if it is something else.

        :raises UsageError: if it is another repository
        :raises NoRepository: if it is no repository, and not the place for one
        """
        theirs: bytes | None = None
        try:
            theirs = await self._target.peek(CONFIG_NAME, configuration.MAX_CONFIG_BYTES + 1)
        except NotFound:
            pass
        except NotStorage as error:
            raise NoRepository(str(error), remedy=_ELSEWHERE) from None
        self._exists = theirs == self._data
        if theirs is not None and not self._exists:
            configuration.parse_config(theirs)
            raise _another(url)
        need(self._target, "a clone")
        # A new copy is accepted beside what was at its location before, as a new repository is.
        self._expect_id = expect_id if self._exists else self._config.repository_id
        await self._pin(pin=False)
        if not self._exists:
            await self._make_place(url)

    async def _make_place(self, url: str) -> None:
        refusal: NotStorage | None = None
        try:
            await self._target.create()
        except NotStorage as error:
            refusal = error
        self._listed = await list_contents(self._source)
        try:
            found = await list_contents(self._target)
        except ConnectorError as error:
            raise refusal or error from None
        # A clone that was interrupted has objects of this repository: no other has a name in common with it.
        if (refusal or len(found)) and found.missing_in(self._listed) == len(found):
            reason = str(refusal or f"{url} holds objects of another repository, without its config")
            raise NoRepository(reason, remedy=_ELSEWHERE)

    async def run(self) -> None:
        """Copy all but keys and config.

        :raises CoffretError: if the repository never comes to rest
        """
        self._progress.subject = self._config.repository_id[:8]
        async with self._at_work():
            await self._passes()

    @asynccontextmanager
    async def _at_work(self) -> AsyncIterator[None]:
        """Hold a lease in a copy that is one already: maintenance there waits for it, as for any writer's.

        Without keys it can't be sealed; that it is there is what counts.
        """
        if not self._exists:
            yield
            return
        name, failure = f"leases/{os.urandom(16).hex()}", None

        async def put() -> None:
            await self._target.put(name, [CLONE + os.urandom(16)])

        async def keep() -> None:
            while True:
                await anyio.sleep(LEASE_REFRESH_S)
                with suppress(ConnectorError):
                    await put()

        async with anyio.create_task_group() as group:
            try:
                await put()
                await self._check_other(name)
                group.start_soon(keep)
                yield
            except Exception as error:
                failure = error  # in no group
            finally:
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True), suppress(ConnectorError):
                    await self._target.delete(name)
        if failure is not None:
            raise failure

    async def _check_other(self, name: str) -> None:
        """See that what was just put in the target is not in the source: one place may have several locations.

        :raises UsageError: if it is
        """
        with suppress(NotFound):
            await self._source.stat(name)
            raise UsageError(
                f"{self._target.location} is the repository itself, by another location", remedy="choose another place"
            )

    async def _passes(self) -> None:
        for number in range(_PASSES):
            listed, self._listed = self._listed or await list_contents(self._source), None
            there = await list_contents(self._target)
            if own := {name for name in open_marks(there) if name not in listed.trash}:
                raise InTheWay(
                    f"maintenance is at work in {self._target.location}: {min(own)} says what it will take away",
                    remedy="do without maintenance in a copy; or let it end, and run the command again",
                )
            await check_snapshots(self._source, self._target, listed, there, same_size=self._exists)
            if number == 0:
                await self._begin(listed, there)
            if await self._pass(listed, there):
                return
            self._progress.note("maintenance took objects away meanwhile: what is there now is listed anew")
        raise CoffretError(
            f"{self._source.location} changes without end",
            remedy="run the command again when maintenance is over; what was copied is kept",
        )

    async def _begin(self, listed: Contents, there: Contents) -> None:
        """What is done once, when it is known what there is on both sides."""
        if self._exists and self._config.encrypted:
            await check_removals(self._source, self._target)
        self._kept = len(listed) - listed.missing_in(there)
        if own := there.missing_in(listed):
            self._progress.note(
                f"{self._target.location} has objects that the original has not, {own:,}: it was used by itself, or "
                "maintenance took them away from the original since; they are left as they are"
            )
        check_sizes(listed, there, self.copier)
        if listed.strange:
            self._progress.note(f"objects that belong to no repository are left out: {listed.strange:,}")

    async def _pass(self, listed: Contents, there: Contents) -> bool:
        """Copy what is missing of what is listed; False, before any snapshot is, if that has changed meanwhile."""
        index, removed, snapshots = (
            _missing(mine, theirs)
            for mine, theirs in (
                (listed.index, there.index),
                (listed.removed, there.removed),
                (listed.snapshots, there.snapshots),
            )
        )
        marks = _missing(listed.trash, there.trash)
        self._expect(listed, there, [*index, *removed, *snapshots, *marks])
        copy, progress = self.copier.copy, self._progress
        progress.phase = "packs"
        if not await copy(listed.packs.without(there.packs)):
            return False
        progress.phase = "index"
        kinds = await kinds_of(self._source, [name for name, _ in snapshots])
        # What makes index objects void comes before them: the packs that they name may be gone.
        if not await copy([job for job in snapshots if kinds[job[0]] == sealing.END]) or not await copy(index):
            return False
        if not await self._at_rest(listed):
            return False
        progress.phase = "snapshots"
        # What tells that a snapshot is removed comes before it, and the end of a mark after the mark.
        commits = [job for job in snapshots if kinds[job[0]] != sealing.END]
        ends = [[mark for mark in marks if _end_of_mark(mark) == end] for end in _MARK_ENDS]
        for objects in (removed, commits, *ends):
            if not await copy(objects):
                return False
        return True

    def _expect(self, listed: Contents, there: Contents, small: list[tuple[str, int]]) -> None:
        """Tell how much there is to do."""
        progress = self._progress
        progress.files_total, progress.size_total = progress.files + len(small), progress.size_bytes
        for _, size_bytes in small:
            progress.size_total += size_bytes
        for _, size_bytes in listed.packs.without(there.packs):
            progress.files_total += 1
            progress.size_total += size_bytes

    async def _at_rest(self, listed: Contents) -> bool:
        """Whether no maintenance has committed since snapshots were listed: it does so before it deletes anything."""
        names = (await list_snapshots(self._source)).keys() - listed.snapshots.keys()
        return all(kind == sealing.SNAPSHOT for kind in (await kinds_of(self._source, [*names])).values())

    async def finish(self, url: str) -> None:
        """Copy keys and, last of all, the config: with it the copy is a repository.

        :raises UsageError: if another repository was made there meanwhile
        :raises Damaged: if there is no key slot to copy
        """
        self._progress.phase = "keys"
        if self._config.encrypted:
            await copy_keys(self._source, self._target, self.copier, configuration.config_hash(self._data))
        if not self._exists:
            for note in await probe(self._target):
                self._progress.note(note)
            try:
                await put_once(self._target, CONFIG_NAME, self._data)
            except AlreadyExists:
                raise _another(url) from None
            self.copier.count(CONFIG_NAME, len(self._data))
        if note := await self._pin():
            self._progress.note(note)

    async def _pin(self, *, pin: bool = True) -> str:
        config = self._config
        return await to_thread.run_sync(
            partial(
                state.check,
                self._target.location,
                config.repository_id,
                config.encrypted,
                configuration.config_hash(self._data),
                self._expect_id,
                pin=pin,
                folder=self._state_dir,
            )
        )

    def summary(self) -> CloneSummary:
        """What was done."""
        copier = self.copier
        return CloneSummary(self._config, copier.copied, copier.size_bytes, self._kept, copier.damaged)


def _missing(mine: dict[str, int], theirs: dict[str, int]) -> list[tuple[str, int]]:
    return [(name, size_bytes) for name, size_bytes in mine.items() if name not in theirs]


def _end_of_mark(job: tuple[str, int]) -> str:
    return job[0].partition("-")[2]


def _another(url: str) -> UsageError:
    remedy = "copy snapshots to it with `coffret at REPO sync to PEER`, or choose another place"
    return UsageError(f"{url} is another repository", remedy=remedy)
