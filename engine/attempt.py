"""An attempt: one try of a writer, from its lease to its commit. See docs/format.md, "Many writers".

The order is the protocol: the lease is durable before anything is listed; then trash, index and snapshots are listed,
in that order; packs are durable before the index that names them, and the index before the commit.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import anyio
import msgspec

from coffret.connectors.errors import AlreadyExists, ConnectorError
from coffret.engine import sealing
from coffret.engine.errors import Damaged, LeaseLost
from coffret.engine.records import ATTEMPT_BYTES, ID_BYTES, UNDECODABLE, decode_index, decode_mark, encode
from coffret.engine.settings import LEASE_REFRESH_S
from coffret.engine.snapshot import load_commits, seal_snapshot, snapshot_name

if TYPE_CHECKING:
    from coffret.connectors.base import Connector
    from coffret.engine.mirror import Mirror
    from coffret.engine.records import IndexObject
    from coffret.engine.sealing import Sealer
    from coffret.engine.snapshot import Commits, Snapshot

_AT_ONCE = 8


class Lease(msgspec.Struct):
    """`leases/<attempt>`: who is at work; only its age, by the storage's clock, has a meaning."""

    host: str
    pid: int
    what: str
    time_ns: int


class Attempt:
    """One try. `begin` makes it known and learns the repository's state; `commit` ends it with a snapshot.

    After `begin`: `commits` as listed, `marked` the packs to be swept, `damaged` the index objects that can't be read
    (with the reason): what only they locate is absent.
    """

    def __init__(self, connector: Connector, sealer: Sealer, mirror: Mirror, *, what: str) -> None:
        self.id = os.urandom(ATTEMPT_BYTES)
        self._connector, self._sealer, self._mirror, self._what = connector, sealer, mirror, what
        self.marked: frozenset[bytes] = frozenset()
        self.damaged: list[tuple[str, str]] = []
        self._leased = False
        self.commits: Commits

    @property
    def _lease_name(self) -> str:
        return f"leases/{self.id.hex()}"

    async def begin(self, *, lease: bool = True) -> None:
        """Put the lease, then list trash, index and snapshots, and bring the mirror up to date.

        Without a lease nothing may be written.
        """
        if lease:
            self._leased = True
            await self._put_lease()
        self.marked = await open_marks(self._connector, self._sealer)
        names = [info.name async for info in self._connector.list("index/")]
        self.commits = await load_commits(self._connector, self._sealer)
        self.damaged = await update_mirror(
            self._connector, self._sealer, self._mirror, names, self.commits, own=self.id
        )

    async def keep(self) -> None:
        """Refresh the lease until cancelled; a failure to do so is no error, since the commit decides."""
        while True:
            await anyio.sleep(LEASE_REFRESH_S)
            try:
                await self._put_lease()
            except ConnectorError:
                continue

    async def commit(self, snapshot: Snapshot) -> None:
        """Put the snapshot: from now on it exists.

        :raises LeaseLost: if maintenance has ended this attempt
        """
        body = seal_snapshot(self._sealer, snapshot)
        name = snapshot_name(self.id)
        try:
            await self._connector.put(name, [body], if_absent=True)
        except AlreadyExists:
            # A put whose answer was lost is a success when the object is this one: each body holds a nonce.
            if await self._connector.get(name) != body:
                raise LeaseLost("another process ended this backup while it was at work") from None

    async def end(self) -> None:
        """Take the lease away; its attempt never commits from now on."""
        if not self._leased:
            return
        with anyio.CancelScope(shield=True):
            await self._connector.delete(self._lease_name)

    async def _put_lease(self) -> None:
        lease = Lease(socket.gethostname(), os.getpid(), self._what, time.time_ns())
        body = self._sealer.seal(sealing.LEASE, self._lease_name, self.id, encode(lease))
        await self._connector.put(self._lease_name, [body])


async def open_marks(connector: Connector, sealer: Sealer) -> frozenset[bytes]:
    """The packs named by marks that are not done.

    :raises Damaged: if a mark is
    """
    names = {info.name async for info in connector.list("trash/")}
    packs: set[bytes] = set()
    for name in names:
        if name.rpartition("/")[2].isdigit() and f"{name}-done" not in names:
            _, payload = sealer.open(sealing.MARK, name, await connector.get(name))
            try:
                ids = decode_mark(payload).packs
            except UNDECODABLE as error:
                raise Damaged(f"{name}: {error}") from None
            packs.update(ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES))
    return frozenset(packs)


async def update_mirror(
    connector: Connector, sealer: Sealer, mirror: Mirror, names: list[str], commits: Commits, *, own: bytes = b""
) -> list[tuple[str, str]]:
    """Make the mirror's content exactly that of the index objects listed, fetching those it lacks.

    `own` is the caller's attempt, whose index objects it may rely on. Returns (name, reason) of those that are damaged:
    they are left out, and looked at again next time.
    """
    damaged: list[tuple[str, str]] = []
    wanted = await mirror.reconcile(names, settled={*commits.committed, own.hex()}, revoked=commits.revoked)

    async def fetch(name: str, found: list[tuple[str, IndexObject]]) -> None:
        try:
            _, payload = sealer.open(sealing.INDEX, name, await connector.get(name))
            found.append((name, decode_index(payload)))
        except (Damaged, *UNDECODABLE) as error:
            damaged.append((name, f"{name}: {str(error).removeprefix(f'{name}: ')}"))

    if not wanted:
        await mirror.merge([])
    for at in range(0, len(wanted), _AT_ONCE):
        found: list[tuple[str, IndexObject]] = []
        async with anyio.create_task_group() as group:
            for name in wanted[at : at + _AT_ONCE]:
                group.start_soon(fetch, name, found)
        await mirror.merge(found)
    return sorted(damaged)
