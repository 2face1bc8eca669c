"""Rebuild the index: have every pack named that no index object names, by what the packs say of themselves.

Of packs only the header and the block table are read. What that needs of memory depends on the number of packs, not of
chunks. Which packs are left alone, and why, is told in docs/format.md, "Repair".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread

from coffret.connectors.errors import NotFound
from coffret.engine.attempt import Attempt, list_index
from coffret.engine.errors import Damaged
from coffret.engine.footers import read_footer
from coffret.engine.index import IndexWriter, covered, open_index
from coffret.engine.known import KnownChunks
from coffret.engine.maintenance_marks import renew_ended
from coffret.engine.mirror import attempt_of
from coffret.engine.objects import MAX_INDEX_BYTES, list_objects, read_listed
from coffret.engine.records import ATTEMPT_BYTES, REF_BYTES, PackTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.abc import TaskGroup

    from coffret.connectors.base import ObjectInfo
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository

_PACK = re.compile("packs/([0-9a-f]{2})/(?P<id>\\1[0-9a-f]{62})")
# Where the attempt stands in a pack's header.
_ATTEMPT = slice(12, 12 + ATTEMPT_BYTES)


class IndexRepairOptions(msgspec.Struct, frozen=True):
    """What to do. `all`: name the packs that are named, too. `dry_run`: only tell.

    `exclusive`: nobody else is at work, so that packs which an open mark names can be named, too.
    """

    all: bool = False
    exclusive: bool = False
    dry_run: bool = False


class IndexRepairSummary(msgspec.Struct):
    """What was found and done. `left`: packs that an open mark names; `dropped`: index objects that can't be read.

    `renewed`: records of maintenance that is over, which could not be read.
    """

    packs: int = 0
    indexed: int = 0
    chunks: int = 0
    left: int = 0
    damaged_packs: list[str] = msgspec.field(default_factory=list)
    dropped: list[str] = msgspec.field(default_factory=list)
    renewed: list[str] = msgspec.field(default_factory=list)


class IndexRepair:
    """One attempt at it: `run`, then `commit`."""

    def __init__(self, repository: Repository, options: IndexRepairOptions, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._connector, self._sealer = repository.connector, repository.sealer
        self._pack_bytes = repository.config.pack_bytes
        self.attempt = Attempt(
            repository.connector, repository.sealer, repository.mirror, what="repair", kept=repository.kept
        )
        self.summary = IndexRepairSummary()
        # Packs with all their blocks named; of others up to which offset an index object names all that they hold.
        self._named: set[bytes] = set()
        self._covered: dict[bytes, int] = {}
        # Index objects, of whatever attempts: one of an attempt that did not end keeps maintenance from work, too.
        self._unreadable: list[str] = []
        self._index: IndexWriter

    async def run(self, group: TaskGroup) -> None:
        """Name what is to be named. `group`: for helpers."""
        await self.attempt.begin(audit=True)
        # Who sweeps need not wait for this attempt, and would not see an index object that it puts meanwhile: it would
        # name packs that are gone, for writers to rely on.
        swept = frozenset() if self._options.exclusive else self.attempt.marked
        known = KnownChunks(self.attempt.mirror, marked=frozenset())
        self._index = IndexWriter(
            self._connector, self._sealer, self.attempt.id, mirror=self.attempt.mirror, known=known
        )
        if not self._options.dry_run:
            group.start_soon(self._index.keep)
        await self._read_index()
        if self._options.all:
            self._named.clear()
            self._covered.clear()
        await self._packs(swept)

    async def commit(self) -> None:
        """Make what was named count, and take away the index objects in whose place it stands."""
        if not self.summary.indexed:
            return
        await self._index.flush(last=True)
        await self.attempt.conclude()

    async def renew(self) -> None:
        """Put anew the records of maintenance that is over, where they can't be read."""
        self.summary.renewed = await renew_ended(
            self._connector, self._sealer, self.attempt.id, dry_run=self._options.dry_run
        )

    async def drop(self) -> None:
        """Delete the index objects that can't be read, if all that they could have named is named now."""
        if self.summary.damaged_packs or self.summary.left:
            return  # one that is put back from a copy would be of use
        for name in self._unreadable:
            self.summary.dropped.append(name)
            if not self._options.dry_run:
                await self._connector.delete(name)

    async def _read_index(self) -> None:
        """See which packs are named by index objects that stay: those of attempts that have ended well.

        They are read anew: the mirror remembers what is damaged now.
        """
        for info in await list_index(self._connector):
            try:
                data = await read_listed(self._connector, info, MAX_INDEX_BYTES)
                index = await to_thread.run_sync(open_index, self._sealer, info.name, data)
            except NotFound:
                continue  # merged by maintenance meanwhile
            except Damaged as error:
                self._unreadable.append(info.name)
                self._progress.note(f"can't be read, so what it named is named again: {error}")
                continue
            attempt = attempt_of(info.name)
            if attempt not in self.attempt.commits.committed:
                continue
            for table in index.packs:
                if table.header[_ATTEMPT].hex() == attempt:
                    self._named.add(table.pack)  # a writer names all of its own packs
                else:
                    self._covered[table.pack] = max(covered(table), self._covered.get(table.pack, 0))

    async def _packs(self, swept: frozenset[bytes]) -> None:
        self._progress.phase = "packs"
        listed = await list_objects(self._connector, "packs/")
        self.summary.packs = self._progress.files_total = len(listed)
        waiting = self._wanted(listed, swept)

        async def work() -> None:
            for info, pack in waiting:
                await self._pack(info, pack)
                self._progress.files += 1

        async with anyio.create_task_group() as group:
            for _ in range(self._connector.capabilities.parallel_gets):
                group.start_soon(work)
        self._progress.files = len(listed)

    def _wanted(self, listed: list[ObjectInfo], swept: frozenset[bytes]) -> Iterator[tuple[ObjectInfo, bytes]]:
        for info in listed:
            found = _PACK.fullmatch(info.name)
            if found is None:
                self._damaged(info.name, "is not the name of a pack")
                continue
            pack = bytes.fromhex(found["id"])
            if pack in self._named:
                continue
            if pack in swept:
                self.summary.left += 1
            elif info.size_bytes > self._pack_bytes:
                self._damaged(info.name, f"has {info.size_bytes} bytes, more than any pack")
            else:
                yield info, pack

    async def _pack(self, info: ObjectInfo, pack: bytes) -> None:
        try:
            header, blocks = await read_footer(self._connector, self._sealer, info.name, info.size_bytes)
        except Damaged as error:
            self._damaged(info.name, str(error).removeprefix(f"{info.name}: "))
            return
        if blocks and self._covered.get(pack) == blocks[-1].offset + blocks[-1].stored_bytes:
            return
        table = PackTable(pack, header, info.size_bytes, blocks)
        self.summary.indexed += 1
        self.summary.chunks += sum(len(block.refs) for block in blocks) // REF_BYTES
        if not self._options.dry_run:
            await self._index.add(table)

    def _damaged(self, name: str, reason: str) -> None:
        self.summary.damaged_packs.append(name)
        self._progress.fault(name.encode(), reason)
