"""Back up: one attempt that ends in a snapshot."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

import msgspec
from anyio import get_cancelled_exc_class

from coffret import __version__
from coffret.connectors.base import Connector
from coffret.connectors.errors import ConnectorError
from coffret.engine import settings
from coffret.engine.attempt import Attempt
from coffret.engine.bridge import LoadBridge
from coffret.engine.catalog import Cutter
from coffret.engine.catalog_reader import ParentCursor
from coffret.engine.errors import ChunkMissing, CoffretError, Damaged, LeaseLost, reported
from coffret.engine.flow import together
from coffret.engine.index import IndexWriter
from coffret.engine.known import KnownChunks
from coffret.engine.ops.takeover import take_over
from coffret.engine.pipeline import Limits, Pipeline
from coffret.engine.progress import Progress
from coffret.engine.recheck import Recheck
from coffret.engine.records import ID_BYTES, Counts, SnapshotHeader, SourceFault
from coffret.engine.scan import Roots, Scanner, ScanOptions
from coffret.engine.snapshot import SHORT_ID_DIGITS, Snapshot, current_user
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from anyio.abc import TaskGroup

    from coffret.connectors.base import Buffer, Listings, ObjectInfo
    from coffret.engine.filters import Filters
    from coffret.engine.repository import Repository

# A revoked writer tries again as a new attempt this many times; each was without a refresh for half an hour.
_ATTEMPTS = 3
# So many faults are listed in the snapshot; all are counted and reported.
_MAX_FAULTS = 10_000


class BackupOptions(msgspec.Struct, frozen=True):
    """How to back up. `force`: read all files, whatever the parent says. `level`: zstd level, None for none.

    `tell_state`: list the snapshots once more in the end, for `BackupSummary.state`.
    """

    tags: Sequence[str] = ()
    host: str = ""
    force: bool = False
    filters: Filters | None = None
    one_file_system: bool = False
    ignore_inode: bool = False
    ignore_ctime: bool = False
    level: int | None = settings.COMPRESSION_LEVELS["default"]
    dry_run: bool = False
    tell_state: bool = False
    limits: Limits = msgspec.field(default_factory=Limits)


class BackupSummary(msgspec.Struct, frozen=True):
    """What a backup made: the snapshot, how many faults its source had; the repository's state, if asked for."""

    snapshot: Snapshot
    counts: Counts
    duration_ns: int
    state: str | None = None


class Faults:
    """Collects what could not be backed up; may be called in any thread."""

    def __init__(self, progress: Progress) -> None:
        self.kept: list[SourceFault] = []
        self.count = 0
        self._progress = progress

    def __call__(self, path: bytes, reason: str) -> None:
        self.count += 1
        if len(self.kept) < _MAX_FAULTS:
            self.kept.append(SourceFault(path, reason))
        self._progress.fault(path, reason)


async def backup(
    repository: Repository, source: Sequence[bytes] | StreamSource, options: BackupOptions, progress: Progress
) -> BackupSummary:
    """Make a snapshot of paths, or of a stream.

    :raises SourceError: if none of the paths exists
    :raises LeaseLost: if maintenance ended the attempt again and again
    """
    bad_packs: set[bytes] = set()
    for tries_left in reversed(range(_ATTEMPTS)):
        work = _Backup(repository, source, options, progress, frozenset(bad_packs))
        try:
            return await _try(work, options, progress)
        except Exception as error:
            cause = reported(error)
            if not tries_left or isinstance(source, StreamSource):  # a stream can't be read again
                raise
            if isinstance(cause, LeaseLost):
                if work.revoked >= _ATTEMPTS:
                    raise
                progress.note("not all that was stored is there any more: everything is read again")
            elif isinstance(cause, Damaged) and work.parent is not None:
                progress.note(f"the last snapshot can't be read, so all files are: {cause}")
                options = msgspec.structs.replace(options, force=True)
                if isinstance(cause, ChunkMissing):
                    bad_packs.update([cause.pack] if cause.pack else [])
                    with contextlib.suppress(CoffretError):  # the next run would only not be warned
                        await repository.mirror.doubt()
            else:
                raise
        _begin_anew(progress)
    raise AssertionError("the last try returns or raises")


def _begin_anew(progress: Progress) -> None:
    """What an attempt counted that comes to nothing is counted again by the next: counters and totals begin anew."""
    fresh = Progress()
    for name in Progress.__struct_fields__:
        default = getattr(fresh, name)
        if default == 0 or (default is None and name.endswith("_total")):
            setattr(progress, name, default)


async def _try(work: _Backup, options: BackupOptions, progress: Progress) -> BackupSummary:
    async with work.attempt.at_work(progress, announced=not options.dry_run) as group:
        try:
            await work.attempt.begin(audit=options.force)
            work.tell()
            await work.watch()
            await work.run(group)
            summary = await work.commit()
        except BaseException:
            await work.salvage()
            raise
        if options.tell_state:
            try:
                state, _ = await together(work.state, work.attempt.end)
            except get_cancelled_exc_class():
                progress.note(f"snapshot {summary.snapshot.short_id} is made all the same")
                raise
            summary = msgspec.structs.replace(summary, state=state)
        return summary
    raise AssertionError("a task group does not swallow what it did not cancel")


class _Backup:
    """One attempt: `attempt.begin`, `run`, `commit`, in this order. `bad_packs`: found bad by an attempt before."""

    def __init__(
        self,
        repository: Repository,
        source: Sequence[bytes] | StreamSource,
        options: BackupOptions,
        progress: Progress,
        bad_packs: frozenset[bytes] = frozenset(),
    ) -> None:
        self._repository, self._source, self._options, self._progress = repository, source, options, progress
        self._begin_ns, self._clock_ns = time.time_ns(), time.perf_counter_ns()
        self._faults, self._counts = Faults(progress), Counts()
        self._snapshot_id = os.urandom(16)
        self._host = options.host or socket.gethostname()
        self.parent: Snapshot | None = None
        #: How many attempts that made one snapshot were ended by others.
        self.revoked = 0
        self._bad_packs = bad_packs
        self._known: KnownChunks
        self._index: IndexWriter | None = None
        progress.subject = self._snapshot_id.hex()[:SHORT_ID_DIGITS]
        if isinstance(source, StreamSource):
            self._roots = None
            self._paths = [b"/" + source.name]
        else:
            self._roots = Roots(source, self._faults)
            self._paths = self._roots.paths
        self.attempt = Attempt(
            repository.connector, repository.sealer, repository.mirror, what="backup", kept=repository.kept
        )

    def tell(self) -> None:
        """Tell what was found when the attempt began."""
        self.attempt.tell(self._progress)
        for name in self.attempt.commits.doubtful:
            self._progress.note(f"{name} can't be read, and may be the latest snapshot: it is not compared with")

    async def watch(self) -> None:
        """See whether snapshots are gone that were seen before. A backup goes on: what it makes is one more."""
        if warning := await self._repository.watch(self.attempt.commits):
            self._progress.note(warning)

    async def run(self, group: TaskGroup) -> None:
        """Store everything, and make the index durable: what is left is the commit. `group`: for its helpers."""
        repository, options = self._repository, self._options
        connector: Connector = Discarding(repository.connector) if options.dry_run else repository.connector
        mirror = self.attempt.mirror
        if not options.force:
            self.parent = find_parent(self.attempt.commits.snapshots, self._host, self._paths)
        self._bad_packs |= mirror.bad_packs
        self._known = known = KnownChunks(mirror, marked=self.attempt.marked | self._bad_packs)
        self._index = index = IndexWriter(
            connector,
            repository.sealer,
            self.attempt.id,
            mirror=None if options.dry_run else mirror,
            known=known,
        )
        group.start_soon(index.keep)
        self._pipeline = Pipeline(
            connector=connector,
            sealer=repository.sealer,
            secrets=repository.secrets,
            config=repository.config,
            attempt=self.attempt.id,
            known=known,
            index=index,
            level=options.level,
            limits=options.limits.suited(connector.capabilities),
            kept=None if options.dry_run else repository.kept,
            progress=self._progress,
            counts=self._counts,
            fault=self._faults,
        )
        self._progress.phase = "backup"
        if isinstance(self._source, StreamSource):
            await self._pipeline.run(self._source)
        else:
            await self._pipeline.run(self._scanner(self._pipeline))
        await index.flush(last=True)

    async def salvage(self) -> None:
        """The run ends early: index what is stored already."""
        if self._index is not None:
            await self._index.salvage()

    async def commit(self) -> BackupSummary:
        """Put the snapshot; as another attempt, if this one was ended by another process."""
        snapshot = Snapshot(self.attempt.id, self._header())
        if not self._options.dry_run:
            self._progress.phase = "commit"
            try:
                await self.attempt.commit(snapshot)
            except LeaseLost as lost:
                snapshot = await self._commit_anew(snapshot.header, lost)
            await self._repository.saw(snapshot)
            # All that it names was stored, located or looked up; without the note the next run looks it up again.
            with contextlib.suppress(CoffretError):
                await self.attempt.mirror.vouch(snapshot.header.catalog[:ID_BYTES])
        return BackupSummary(snapshot, self._counts, time.perf_counter_ns() - self._clock_ns)

    async def state(self) -> str | None:
        """The state of the repository after the commit: listed anew, others may have made snapshots meanwhile."""
        try:
            return self._repository.state_of((await self._repository.listed()).snapshots)
        except ConnectorError as error:  # the backup is done
            self._progress.note(f"the repository's state can't be told: {error}")
            return None

    async def _commit_anew(self, header: SnapshotHeader, lost: LeaseLost) -> Snapshot:
        """Commit what this attempt has stored as a new one, or, if that is revoked too, as a third.

        :raises LeaseLost: if it can't be, since something is not there any more, or time and again
        """
        for self.revoked in range(1, _ATTEMPTS):
            self._progress.note("another process ended this attempt; another one takes over what it has stored")
            try:
                snapshot = await take_over(
                    self._repository, self.attempt.mirror, self._bad_packs, header, self._progress
                )
            except Exception as error:
                if not isinstance(reported(error), LeaseLost):
                    raise
                continue
            if snapshot is None:
                raise lost
            return snapshot
        self.revoked = _ATTEMPTS
        raise lost

    def _scanner(self, pipeline: Pipeline) -> Scanner:
        repository, options = self._repository, self._options
        assert self._roots is not None
        return Scanner(
            self._roots,
            ScanOptions(
                filters=options.filters,
                skip=repository.own_places(self._roots.paths),
                skip_files=repository.own_files(),
                one_file_system=options.one_file_system,
                ignore_inode=options.ignore_inode,
                ignore_ctime=options.ignore_ctime,
                verbose=self._progress.on_item is not None,
            ),
            cutter=Cutter(repository.secrets.chunker_key),
            parent=self._cursor(),
            store=pipeline.meta.store,
            fault=self._faults,
        )

    def _cursor(self) -> ParentCursor | None:
        """The parent's catalog, for the scan's thread."""
        if self.parent is None:
            return None
        repository, header, mirror = self._repository, self.parent.header, self.attempt.mirror
        fetcher = repository.fetcher(mirror)
        self._pipeline.bridge = bridge = LoadBridge(fetcher.load)
        recheck = None
        doubts = self.attempt.marked or self._bad_packs or self.attempt.damaged
        if doubts or not mirror.is_sound(header.catalog[:ID_BYTES]):
            recheck = Recheck(bridge, self._known.absent)
        return ParentCursor(header.catalog, header.depth, bridge, recheck=recheck)

    def _header(self) -> SnapshotHeader:
        counts, progress = self._counts, self._progress
        counts.errors, counts.read_bytes = self._faults.count, progress.read_bytes
        counts.added_bytes, counts.stored_bytes = progress.added_bytes, progress.stored_bytes
        root, depth = self._pipeline.root
        return SnapshotHeader(
            snapshot_id=self._snapshot_id,
            time_ns=self._begin_ns,
            duration_ns=time.perf_counter_ns() - self._clock_ns,
            host=self._host,
            user=current_user(),
            roots=self._paths,
            catalog=root,
            depth=depth,
            counts=counts,
            tags=list(self._options.tags),
            faults=self._faults.kept,
            parent=self.parent.header.snapshot_id if self.parent else b"",
            program=f"coffret {__version__}",
        )


class Discarding(Connector):
    """The storage of a dry run: nothing is written."""

    def __init__(self, inner: Connector) -> None:
        self._inner = inner
        self.location, self.capabilities = inner.location, inner.capabilities

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """Write nothing."""

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """As the storage does."""
        return await self._inner.get(name, offset=offset, length=length)

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        """As the storage does."""
        return await self._inner.peek(name, limit_bytes)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """As the storage does."""
        return self._inner.list(prefix)

    async def list_turns(self, turns: Sequence[Sequence[str]]) -> Listings:
        """As the storage does."""
        return await self._inner.list_turns(turns)

    async def stat(self, name: str) -> ObjectInfo:
        """As the storage does."""
        return await self._inner.stat(name)

    async def delete(self, name: str) -> None:
        """Delete nothing."""


def find_parent(snapshots: Sequence[Snapshot], host: str, roots: Sequence[bytes]) -> Snapshot | None:
    """The latest snapshot of the same host and roots."""
    for snapshot in reversed(snapshots):
        if snapshot.header.host == host and snapshot.header.roots == list(roots):
            return snapshot
    return None
