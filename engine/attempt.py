"""An attempt: one try of a writer, from its lease to its commit. See docs/format.md, "Many writers".

The order is the protocol: the lease is durable before anything is listed; then trash, index and snapshots are listed,
in that order; packs are durable before the index that names them, and the index before the commit.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread

from coffret.connectors.base import APPEND_ONLY
from coffret.connectors.errors import AlreadyExists, ConnectorError, NotFound
from coffret.engine import sealing
from coffret.engine.errors import Damaged, LeaseLost
from coffret.engine.index import open_index
from coffret.engine.maintenance_marks import read_mark
from coffret.engine.mirror import MirrorBusy
from coffret.engine.objects import (
    INDEX,
    MAX_INDEX_BYTES,
    REMOVED,
    SNAPSHOTS,
    TRASH,
    batches,
    list_objects,
    put_once,
    read_listed,
)
from coffret.engine.packlist import PackList
from coffret.engine.records import ATTEMPT_BYTES, End, encode
from coffret.engine.rights import need
from coffret.engine.settings import LEASE_REFRESH_S
from coffret.engine.snapshot import load_commits, seal_end, seal_snapshot, snapshot_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from anyio.abc import TaskGroup

    from coffret.connectors.base import Connector, ObjectInfo
    from coffret.engine.mirror import Mirror
    from coffret.engine.progress import Progress
    from coffret.engine.records import IndexObject
    from coffret.engine.sealing import Sealer
    from coffret.engine.snapshot import Commits, Opened, Snapshot
    from coffret.engine.storecache import StoreCache

_AT_ONCE = 8


class Lease(msgspec.Struct):
    """`leases/<attempt>`: who is at work; only its age, by the storage's clock, has a meaning."""

    host: str
    pid: int
    what: str
    time_ns: int


class Attempt:
    """One try, made within `at_work`: `begin` learns the repository's state, `commit` ends it with a snapshot.

    `conclude` ends one that made none: it put index objects only.

    `opened`: what attempts before this one have opened of the repository's snapshots.

    After `begin`: `commits` as listed, `marked` the packs to be swept, `damaged` the index objects that can't be read
    (with the reason): what only they locate is absent. `mirror` is the attempt's own view.
    """

    def __init__(
        self,
        connector: Connector,
        sealer: Sealer,
        mirror: Mirror,
        *,
        what: str,
        kept: StoreCache | None = None,
        opened: Opened | None = None,
    ) -> None:
        self.id = os.urandom(ATTEMPT_BYTES)
        self._connector, self._sealer, self._what, self._kept = connector, sealer, what, kept
        self._opened = opened
        self.mirror = mirror.view()
        self.mirror.relist = self._relist
        self.marked: frozenset[bytes] = frozenset()
        self.damaged: list[tuple[str, str]] = []
        #: Whether something was put that counts only once the attempt has ended well.
        self.unfinished = False
        self._leased, self._refreshing = False, anyio.CancelScope()
        #: Why the lease is still there after the end, "" if it is not.
        self.left = ""
        self.commits: Commits

    @property
    def _lease_name(self) -> str:
        return f"leases/{self.id.hex()}"

    async def announce(self) -> None:
        """Put the lease.

        :raises StorageError: if the storage lets this client add nothing
        """
        need(self._connector, self._what, APPEND_ONLY)
        self._leased = True
        await self._put_lease()

    @asynccontextmanager
    async def at_work(self, progress: Progress, *, announced: bool = True) -> AsyncIterator[TaskGroup]:
        """Do the body's work as this attempt: announced, unless nothing is put, its lease refreshed, ended in any case.

        The body is given a group for its helpers, which are cancelled when it ends.
        """
        async with anyio.create_task_group() as group:
            try:
                if announced:
                    await self.announce()
                    group.start_soon(self._keep)
                yield group
            finally:
                group.cancel_scope.cancel()
                await self.end()
                if self.left:
                    progress.note(self.left)

    async def begin(self, *, audit: bool = False) -> None:
        """List trash, index and snapshots, and bring the mirror up to date; `audit`: list packs in any case.

        What is not announced may write nothing.
        """
        listed = await self._connector.list_turns([(TRASH,), (INDEX,), (SNAPSHOTS, REMOVED)])
        self.marked = await open_marks(self._connector, self._sealer, listed[TRASH])
        self.commits = await load_commits(
            self._connector,
            self._sealer,
            self._kept,
            listed=(listed[SNAPSHOTS], listed[REMOVED]),
            opened=self._opened,
        )
        await self._follow(listed[INDEX], audit=audit)

    async def _relist(self) -> None:
        """A snapshot may have been committed, and listed, after its index objects were."""
        await self._follow(await list_index(self._connector))

    async def _follow(self, listed: list[ObjectInfo], *, audit: bool = False) -> None:
        self.damaged = await update_mirror(
            self._connector, self._sealer, self.mirror, listed, self.commits, own=self.id, audit=audit or None
        )

    def tell(self, progress: Progress) -> None:
        """Tell what was found to be wrong with the repository when the attempt began."""
        for _, reason in self.damaged:
            progress.note(f"left out, since it is damaged; what only it locates is stored again: {reason}")
        if bad := len(self.mirror.bad_packs):
            packs, held = ("1 pack is", "it held") if bad == 1 else (f"{bad} packs are", "they held")
            progress.note(f"{packs} missing or damaged; what {held} is stored again where the source still has it")
        if self.mirror.left:
            progress.note(f"no local cache is used: {self.mirror.left}")

    async def _keep(self) -> None:
        """Refresh the lease until cancelled; a failure to do so is no error, since the commit decides."""
        with self._refreshing:
            while True:
                await anyio.sleep(LEASE_REFRESH_S)
                with suppress(ConnectorError):
                    await self._put_lease()

    async def commit(self, snapshot: Snapshot) -> None:
        """Put the snapshot: from now on it exists.

        :raises LeaseLost: if maintenance has ended this attempt
        """
        await self._commit(seal_snapshot(self._sealer, snapshot))

    async def conclude(self) -> None:
        """End well without a snapshot: from now on what the attempt's index objects say counts.

        :raises LeaseLost: if another process has ended this attempt
        """
        await self._commit(seal_end(self._sealer, self.id, End("maintained", time.time_ns())))

    async def _commit(self, body: bytes) -> None:
        name = snapshot_name(self.id)
        try:
            await put_once(self._connector, name, body)
        except AlreadyExists:
            raise LeaseLost(f"another process ended this {self._what} while it was at work") from None
        if self._kept is not None:  # the next run begins with reading it
            await self._kept.keep({name: body})

    async def clock(self) -> float:
        """The storage's time now (s since 1970), as far as the lease was put or refreshed just now.

        :raises LeaseLost: if another process has taken it away, and so ended this attempt
        """
        try:
            return (await self._connector.stat(self._lease_name)).mtime_s
        except NotFound:
            raise LeaseLost(f"another process ended this {self._what} while it was at work") from None

    async def end(self) -> None:
        """Take the lease away, if it is not yet: the attempt never commits from now on.

        One that stays (then `left` says why) is in nobody's way for longer than half an hour; how the attempt ended is
        what counts.
        """
        self._refreshing.cancel()
        with anyio.CancelScope(shield=True):
            leased, self._leased = self._leased, False
            if leased:
                try:
                    await self._connector.delete(self._lease_name)
                except ConnectorError as error:
                    self.left = f"the lease could not be taken away: {error}"
            await self.mirror.close()

    async def _put_lease(self) -> None:
        lease = Lease(socket.gethostname(), os.getpid(), self._what, time.time_ns())
        body = self._sealer.seal(sealing.LEASE, self._lease_name, self.id, encode(lease))
        await self._connector.put(self._lease_name, [body])


async def open_marks(connector: Connector, sealer: Sealer, infos: Iterable[ObjectInfo]) -> frozenset[bytes]:
    """The packs named by marks that are not done, of what is listed in trash/.

    :raises Damaged: if a mark is
    """
    listed = {info.name: info for info in infos}
    packs: set[bytes] = set()
    for name, info in listed.items():
        if name.rpartition("/")[2].isdigit() and f"{name}-done" not in listed:
            packs |= await read_mark(connector, sealer, info)
    return frozenset(packs)


async def list_index(connector: Connector) -> list[ObjectInfo]:
    """The index objects there are."""
    return await list_objects(connector, INDEX)


async def update_mirror(
    connector: Connector,
    sealer: Sealer,
    mirror: Mirror,
    listed: list[ObjectInfo],
    commits: Commits,
    *,
    own: bytes = b"",
    audit: bool | None = None,
) -> list[tuple[str, str]]:
    """Make the mirror's content exactly that of the index objects listed, fetching those it lacks.

    `own` is the caller's attempt, whose index objects it may rely on. Returns (name, reason) of those that are damaged:
    they are left out, and looked at again next time. To `audit`, or, if that is None, where it is not known that all
    packs are there, they are listed, and `mirror.bad_packs` are those that are not.
    """
    settled = {*commits.committed, own.hex()}
    updating = _Updating(connector, sealer, mirror, settled, commits.revoked)
    try:
        damaged = await updating.follow(listed)
    except MirrorBusy as busy:
        await mirror.leave(str(busy))
        damaged = await updating.follow(listed)
    if audit if audit is not None else not mirror.audited:
        await find_bad_packs(connector, mirror)
    return damaged


class _Updating:
    """One update of a mirror: what goes for all of its steps."""

    def __init__(
        self, connector: Connector, sealer: Sealer, mirror: Mirror, settled: set[str], revoked: frozenset[str]
    ) -> None:
        self._connector, self._sealer, self._mirror = connector, sealer, mirror
        self._settled, self._revoked = settled, revoked
        self._damaged: list[tuple[str, str]] = []
        self._vanished: list[str] = []

    async def follow(self, listed: list[ObjectInfo]) -> list[tuple[str, str]]:
        """Go by what is listed. What vanishes meanwhile is left out, if it still does after listing anew."""
        await self._merge_all(listed)
        if self._vanished:
            await self._merge_all(await list_index(self._connector))
        return sorted(self._damaged + [(name, f"{name}: is listed, but not there") for name in self._vanished])

    async def _merge_all(self, listed: list[ObjectInfo]) -> None:
        self._damaged, self._vanished = [], []
        infos = {info.name: info for info in listed}
        wanted = await self._mirror.reconcile(list(infos), settled=self._settled, revoked=self._revoked)
        await self._mirror.merge([])
        for batch in batches((infos[name] for name in wanted), _AT_ONCE):
            found: list[tuple[str, IndexObject]] = []
            async with anyio.create_task_group() as group:
                for info in batch:
                    group.start_soon(self._fetch, info, found)
            await self._mirror.merge(found)

    async def _fetch(self, info: ObjectInfo, found: list[tuple[str, IndexObject]]) -> None:
        try:
            data = await read_listed(self._connector, info, MAX_INDEX_BYTES)
            found.append((info.name, await to_thread.run_sync(open_index, self._sealer, info.name, data)))
        except NotFound:
            self._vanished.append(info.name)
        except Damaged as error:
            self._damaged.append((info.name, str(error)))


async def find_bad_packs(connector: Connector, mirror: Mirror) -> None:
    """List packs/, a request for each 1,000, and compare with what the index says: `mirror.bad_packs` gets the missing.

    Packs of index objects that were listed before are there, or never will be again. Where the index names none, none
    is listed: a first backup does not wait for that.
    """
    listed: PackList | None = None
    bad: set[bytes] = set()
    async for batch in mirror.packs():
        if listed is None:
            listed = await PackList.listed(connector)
        for pack, size_bytes in batch:
            number = listed.number(pack)
            if number < 0 or listed[number][1] != size_bytes:
                bad.add(pack)
    if bad and mirror.audited:
        await mirror.doubt()
    elif not bad:
        await mirror.vouch(audited=True)
    mirror.bad_packs |= bad
