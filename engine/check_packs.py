"""Verify index objects and packs: each pack once, against its own block table, and every index object against that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from coffret.connectors.errors import ConnectorError, NotFound
from coffret.engine.check_damage import WHOLE
from coffret.engine.errors import Damaged
from coffret.engine.fetch import unreadable
from coffret.engine.footers import read_footer
from coffret.engine.index import open_index
from coffret.engine.mirror import attempt_of
from coffret.engine.objects import MAX_INDEX_BYTES, list_objects, read_listed
from coffret.engine.openpool import OpenPool
from coffret.engine.openworker import TABLE, compare_tables
from coffret.engine.packfile import pack_name
from coffret.engine.settings import CHECK_SLABS, OPEN_WORKERS
from coffret.engine.snapshot import load_commits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coffret.connectors.base import ObjectInfo
    from coffret.engine.check_damage import Damage
    from coffret.engine.check_subset import Subset
    from coffret.engine.mirror import Mirror
    from coffret.engine.progress import Progress
    from coffret.engine.records import IndexObject, PackTable
    from coffret.engine.repository import Repository


class PackCheck:
    """Verifies index objects, read anew, and the packs they name. `fast`: of packs only that they are there.

    `subset`: of which packs more than that, None for all. `workers`: how many processes, None for the number that was
    measured best. `gets`: limits what is read at a time.
    """

    def __init__(
        self,
        repository: Repository,
        damage: Damage,
        progress: Progress,
        *,
        fast: bool,
        subset: Subset | None,
        workers: int | None,
        gets: anyio.CapacityLimiter,
    ) -> None:
        self._repository, self._damage, self._progress = repository, damage, progress
        self._connector, self._sealer = repository.connector, repository.sealer
        self._fast, self._subset, self._workers = fast, subset, workers or OPEN_WORKERS
        # The packs that are read, if not all are.
        self._chosen: frozenset[str] | None = None
        self._gets = gets
        #: Packs that were looked at, and those there are, by name, with their sizes.
        self.seen: set[bytes] = set()
        self.found: dict[str, int] = {}
        #: Packs that were read, every byte of them, and are as they were stored.
        self.whole: frozenset[bytes] = frozenset()
        # Packs that are not there, though an index object named them.
        self._missing: set[bytes] = set()

    async def run(self, wanted: frozenset[bytes] | None) -> None:
        """Verify all index objects, and all packs they name, or those wanted that were not seen yet."""
        self._progress.phase = "packs"
        self.found = {info.name: info.size_bytes async for info in self._connector.list("packs/")}
        if self._fast:
            await self._tables(None, None, wanted)
            await self._judge_missing()
            return
        names = None if wanted is None else {pack_name(pack) for pack in wanted - self.seen}
        sizes = {name: size for name, size in self.found.items() if names is None or name in names}
        if self._subset is not None:
            self._chosen = self._subset.choose(sizes)
            sizes = {name: sizes[name] for name in self._chosen}
        self._progress.size_total = (self._progress.size_total or 0) + sum(sizes.values())
        pool = OpenPool(
            self._repository.secrets,
            self._repository.id_bytes,
            workers=self._workers,
            slabs=CHECK_SLABS,
            slab_bytes=self._repository.config.pack_bytes,
        )
        async with pool, anyio.create_task_group() as group:
            await self._tables(pool, group, wanted)
        await self._judge_missing()
        read = {pack for pack in self.seen if self._chosen is None or pack_name(pack) in self._chosen}
        self.whole |= read - self._damage.packs - self._missing

    async def view(self) -> Mirror:
        """The mirror as far as index objects that can be relied on now say the same: it may remember more."""
        mirror = self._repository.mirror
        if not self._damage.index:
            return mirror
        view = mirror.view()
        good = [name for name in mirror.objects if name not in self._damage.index]
        missing = await view.reconcile(good, settled={attempt_of(name) for name in good})
        await view.merge([(name, index) for name in missing if (index := await self._index(name)) is not None])
        return view

    def unnamed(self) -> tuple[int, int]:
        """How many packs no index object names, and their bytes."""
        named = {pack_name(pack) for pack in self.seen}
        sizes = [size_bytes for name, size_bytes in self.found.items() if name not in named]
        return len(sizes), sum(sizes)

    async def _tables(
        self, pool: OpenPool | None, group: anyio.abc.TaskGroup | None, wanted: frozenset[bytes] | None
    ) -> None:
        """Go through what the index says of packs."""
        revoked = (await self._repository.commits()).revoked
        earlier = frozenset(self.seen)
        async for name, table in self._named(revoked):
            if table.pack in earlier or (wanted is not None and table.pack not in wanted):
                continue
            first = table.pack not in self.seen
            self.seen.add(table.pack)
            await self._table(pool, group, name, table, first)
        self._damage.summary.packs = len(self.found) if self._fast and wanted is None else len(self.seen)

    async def _named(self, revoked: frozenset[str]) -> AsyncIterator[tuple[str, PackTable]]:
        """The tables of the index objects that count: what an attempt that was taken for dead had put is void."""
        for info in await list_objects(self._connector, "index/"):
            if attempt_of(info.name) not in revoked and info.name not in self._damage.index:
                index = await self._index(info.name, info)
                for table in index.packs if index is not None else ():
                    yield info.name, table

    async def _judge_missing(self) -> None:
        """Report packs that are missing. Those that nothing names any more, by a new listing, were swept meanwhile.

        Maintenance deletes index objects before the packs they name; those of the dead it may leave, but void.
        """
        if left := self._missing - self._damage.packs:
            revoked = (await load_commits(self._connector, self._sealer)).revoked
            for pack in left & {table.pack async for _, table in self._named(revoked)}:
                self._damage.pack(pack, [(WHOLE, "is missing")])

    async def _index(self, name: str, info: ObjectInfo | None = None) -> IndexObject | None:
        try:
            data = await read_listed(self._connector, info or await self._connector.stat(name), MAX_INDEX_BYTES)
            return await to_thread.run_sync(open_index, self._sealer, name, data)
        except NotFound:
            return None  # merged by maintenance meanwhile
        except Damaged as error:
            self._damage.index_object(name, str(error))
        except ConnectorError as error:
            self._damage.index_object(name, unreadable(name, error).removeprefix(f"{name} "))
        return None

    async def _table(
        self, pool: OpenPool | None, group: anyio.abc.TaskGroup | None, index: str, table: PackTable, first: bool
    ) -> None:
        name = pack_name(table.pack)
        size_bytes = self.found.get(name)
        if size_bytes is None and first:
            size_bytes = await self._since(name)
        if size_bytes is None:
            self._missing.add(table.pack)
        elif pool is None or group is None or (self._chosen is not None and name not in self._chosen):
            if size_bytes != table.size_bytes and first:
                self._damage.pack(table.pack, [(WHOLE, f"has {size_bytes} bytes instead of {table.size_bytes}")])
            elif table.pack not in self._damage.packs:
                self._said(index, table, size_bytes, [])
        elif not first:
            await self._compare(index, table, size_bytes)
        elif size_bytes > pool.slab_bytes:
            self._damage.pack(table.pack, [(WHOLE, f"has {size_bytes} bytes, more than any pack")])
        else:
            slab = await pool.acquire()
            group.start_soon(self._pack, pool, slab, index, table, size_bytes)

    async def _since(self, name: str) -> int | None:
        """The size of a pack that was not listed: it may have been put since."""
        try:
            self.found[name] = (await self._connector.stat(name)).size_bytes
        except ConnectorError:
            return None
        return self.found[name]

    async def _pack(self, pool: OpenPool, slab: int, index: str, table: PackTable, size_bytes: int) -> None:
        """Fetch a pack into a slab and have a worker verify it."""
        name = pack_name(table.pack)
        try:
            async with self._gets:
                await self._connector.get_into(name, 0, pool.view(slab)[:size_bytes])
        except ConnectorError as error:
            pool.release(slab)
            if isinstance(error, NotFound):
                self._missing.add(table.pack)
            else:
                self._damage.pack(table.pack, [(WHOLE, unreadable(name, error))])
            return
        self._progress.size_bytes += size_bytes
        self._damage.summary.packs_read += 1
        self._damage.summary.size_bytes += size_bytes
        done = anyio.Event()

        def verified(faults: list[tuple[int, str]]) -> None:
            self._damage.pack(table.pack, [(offset, reason) for offset, reason, *_ in faults if offset != TABLE])
            if not any(offset == WHOLE for offset, *_ in faults):
                said = [reason for offset, reason, *_ in faults if offset == TABLE]
                self._said(index, table, size_bytes, said)
            done.set()

        rows = [(b.offset, b.stored_bytes, b.raw_bytes, b.codec, b.refs) for b in table.blocks]
        pool.submit("pack", size_bytes, table.header, rows, slab=slab, done=verified)
        await done.wait()

    def _said(self, index: str, table: PackTable, size_bytes: int, said: list[str]) -> None:
        """Report an index object that says of a pack what is not so."""
        if size_bytes != table.size_bytes:
            said = [*said, f"has {table.size_bytes} bytes, and it has {size_bytes}"]
        if said:
            self._damage.index_object(index, f"says that {pack_name(table.pack)} {said[0]}")

    async def _compare(self, index: str, table: PackTable, size_bytes: int) -> None:
        """Compare what another index object says of a pack that was seen already with the pack's own block table."""
        name = pack_name(table.pack)
        try:
            header, blocks = await read_footer(self._connector, self._sealer, name, size_bytes)
        except Damaged:
            return  # reported when the pack was read
        rows = [(b.offset, b.stored_bytes, b.raw_bytes, b.codec, b.refs) for b in table.blocks]
        self._said(index, table, size_bytes, [r for _, r in compare_tables(header, blocks, table.header, rows)])
