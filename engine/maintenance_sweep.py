"""Sweep and merge: replace index objects, commit, and only then delete."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from coffret.connectors.errors import NotFound
from coffret.engine import sealing
from coffret.engine.errors import ChunkMissing, CoffretError, reported
from coffret.engine.index import IndexWriter, open_index
from coffret.engine.keyring import read_keyring
from coffret.engine.known import KnownChunks
from coffret.engine.maintenance_copy import COPIES_AT_ONCE, Copier
from coffret.engine.maintenance_dead import make_way
from coffret.engine.maintenance_index import TableMerge
from coffret.engine.maintenance_marks import MAX_PACKS, put_done
from coffret.engine.maintenance_view import TRIES, Scene, others_at_work
from coffret.engine.mirror import attempt_of
from coffret.engine.objects import MAX_INDEX_BYTES, batches, read_listed
from coffret.engine.packfile import pack_name
from coffret.engine.records import End, encode

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from coffret.connectors.base import ObjectInfo
    from coffret.engine.attempt import Attempt
    from coffret.engine.maintenance_needs import Needs
    from coffret.engine.pipeline import Limits
    from coffret.engine.progress import Progress
    from coffret.engine.records import IndexObject
    from coffret.engine.repository import Repository

# Index objects below this size are merged when there are so many: one of 100,000 chunks has 3.6 MB.
_SMALL_BYTES, _MANY = 1 << 20, 16
_FETCHED, _DELETED = 8, 16


class _Replacing:
    """What sweep and merge share: they put index objects in the place of others."""

    def __init__(self, repository: Repository, attempt: Attempt, progress: Progress) -> None:
        self._repository, self._attempt, self._progress = repository, attempt, progress
        self._connector, self._sealer = repository.connector, repository.sealer
        self._scene = Scene(repository, attempt, progress)

    async def _writer(self) -> IndexWriter:
        """What puts the attempt's index objects; the first has copies of config and key slots, if they can be read."""
        slots: dict[str, bytes] = {}
        if self._repository.config.encrypted:
            try:
                slots = (await read_keyring(self._connector)).live
            except CoffretError as error:
                self._progress.note(f"the key slots are not copied into the index: {error}")
        self._attempt.unfinished = True
        return IndexWriter(
            self._connector,
            self._sealer,
            self._attempt.id,
            mirror=self._attempt.mirror,
            known=KnownChunks(self._attempt.mirror, marked=frozenset()),
            merging=True,
            config=self._repository.config_data,
            slots=slots,
        )

    async def _publish(
        self, writer: IndexWriter, replaced: Collection[str], *, without: Collection[bytes] = ()
    ) -> None:
        """Put what index objects say, but for some packs, and commit.

        :raises InTheWay: if one of them is gone: others have replaced it
        :raises LeaseLost: if this attempt was taken for dead
        """
        infos = {info.name: info for info in self._scene.index}
        if not infos.keys() >= set(replaced):
            raise others_at_work()
        merge = TableMerge(without)
        for batch in batches((infos[name] for name in sorted(replaced)), _FETCHED):
            found: list[IndexObject] = []
            gone: list[str] = []
            async with anyio.create_task_group() as group:
                for info in batch:
                    group.start_soon(self._fetch, info, found, gone)
            if gone:
                raise others_at_work()
            for index in found:
                for table in merge.add(index.packs):
                    await writer.add(table)
        for table in merge.rest():
            await writer.add(table)
        await writer.flush(last=True)
        await self._attempt.conclude()
        self._attempt.unfinished = False

    async def _fetch(self, info: ObjectInfo, found: list[IndexObject], gone: list[str]) -> None:
        try:
            data = await read_listed(self._connector, info, MAX_INDEX_BYTES)
            found.append(await to_thread.run_sync(open_index, self._sealer, info.name, data))
        except NotFound:
            gone.append(info.name)

    async def _delete(self, names: Iterable[str]) -> None:
        limiter = anyio.CapacityLimiter(_DELETED)

        async def delete(name: str) -> None:
            async with limiter:
                await self._connector.delete(name)

        waiting = sorted(names)
        for at in range(0, len(waiting), 1000):
            async with anyio.create_task_group() as group:
                for name in waiting[at : at + 1000]:
                    group.start_soon(delete, name)


class Sweep(_Replacing):
    """The sweep of one mark. After `run`: what was deleted, and what was stored before."""

    def __init__(
        self,
        repository: Repository,
        attempt: Attempt,
        number: int,
        doomed: frozenset[bytes],
        limits: Limits,
        progress: Progress,
    ) -> None:
        super().__init__(repository, attempt, progress)
        self._number, self._doomed, self._limits = number, doomed, limits
        self.deleted_packs = self.deleted_bytes = self.stored_bytes = self.ended_attempts = self.missing_packs = 0
        self.damaged_packs: list[str] = []

    async def run(self) -> None:
        """List anew, copy, replace, commit, delete. Each attempt that the mark has seen has ended by now."""
        progress, scene, doomed = self._progress, self._scene, self._doomed
        progress.phase = "looking"
        found = await self._look(doomed)
        if found is None:
            return
        needs, naming = found
        there = [number for pack in doomed if (number := scene.packs.number(pack)) >= 0]
        if len(there) < len(doomed):
            self.missing_packs = len(doomed.intersection(await scene.missing(MAX_PACKS)))
        writer = await self._writer()
        before = progress.stored_bytes
        if any(needs.copies):
            await self._copy(needs, writer)
        self.stored_bytes = progress.stored_bytes - before
        progress.phase = "replacing"
        await self._publish(writer, naming, without=doomed)
        progress.phase = "deleting"
        await self._delete(naming)
        await self._delete(pack_name(scene.packs[number][0]) for number in there)
        self.deleted_packs, self.deleted_bytes = len(there), sum(scene.packs[number][1] for number in there)
        await put_done(self._connector, self._sealer, self._attempt.id, self._number)
        await self._put_swept()

    async def _look(self, doomed: frozenset[bytes]) -> tuple[Needs, frozenset[str]] | None:
        """What is needed, and the index objects that name what is marked; None if another sweep has been faster.

        :raises InTheWay: if an attempt that names what is marked has not ended
        """
        scene, attempt = self._scene, self._attempt
        for _ in range(TRIES):
            await scene.look()
            if not doomed <= attempt.marked:
                return None
            naming = await scene.naming(doomed)
            if unended := {attempt_of(name) for name in naming} - scene.ended:
                # A repair that had the repository for itself: it begins beside an open mark, and names what that does.
                now_s = await attempt.clock()
                self.ended_attempts += await make_way(self._connector, self._sealer, unended, now_s, attempt.id)
            elif (needs := await scene.resolve(doomed=doomed)) is not None:
                return needs, naming
        raise others_at_work()

    async def _copy(self, needs: Needs, writer: IndexWriter) -> None:
        """Copy what only doomed packs hold; what can't be read is kept as it is.

        :raises InTheWay: if one is gone, since another sweep of the mark has been faster
        """
        self._progress.phase = "copying"
        copier = Copier(
            self._repository,
            self._repository.fetcher(self._attempt.mirror, strict=True),
            attempt=self._attempt.id,
            index=writer,
            limits=self._limits,
            progress=self._progress,
        )
        try:
            await copier.run(needs.to_copy(COPIES_AT_ONCE))
        except ExceptionGroup as error:
            if isinstance(reported(error), ChunkMissing) and await self._scene.moved():
                raise others_at_work() from None
            raise
        self.damaged_packs = [pack_name(pack) for pack in copier.damaged.kept]
        # So that the next mark leaves them alone.
        await self._attempt.mirror.judge(frozenset(copier.damaged.kept.values()), frozenset())

    async def _put_swept(self) -> None:
        """Put small end markers where removed snapshots stand: their names stay taken."""
        for attempt in sorted(self._attempt.commits.gone):
            name = f"snapshots/{attempt}"
            body = self._sealer.seal(sealing.END, name, self._attempt.id, encode(End("swept", time.time_ns())))
            await self._connector.put(name, [body])


class Merge(_Replacing):
    """Merges index objects without a sweep: many small ones, but for those that name marked packs."""

    deleted_objects = 0

    async def run(self) -> None:
        """Put one in the place of many, commit, delete; and delete those of revoked attempts."""
        self._progress.phase = "merging"
        await self._scene.look()
        commits, marked = self._attempt.commits, self._attempt.marked
        spared = await self._scene.naming(marked) if marked else frozenset()
        # What was listed after the attempt's view of the index is not known to name nothing that is marked.
        known = self._attempt.mirror.objects
        ours = [info for info in self._scene.index if info.name not in spared]
        small = {
            info.name
            for info in ours
            if info.name in known and info.size_bytes < _SMALL_BYTES and attempt_of(info.name) in commits.committed
        }
        # Void ones may name what is marked.
        void = set() if marked else {info.name for info in ours if attempt_of(info.name) in commits.revoked}
        if len(small) < _MANY:
            small = set()
        else:
            await self._publish(await self._writer(), small)
        await self._delete(small | void)
        self.deleted_objects = len(small | void)
