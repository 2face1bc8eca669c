"""An open repository: what can be done with one. `engine.opening` opens it."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import msgspec
from anyio import to_thread

from coffret.connectors.registry import Transfers
from coffret.engine import configuration, state
from coffret.engine.errors import Damaged, UsageError
from coffret.engine.sealing import Sealer
from coffret.engine.seen import Rollback, Watch, seen_path, state_of
from coffret.engine.seen import check_expected as check_expected_state
from coffret.engine.settings import FAR_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from coffret.connectors.base import Connector
    from coffret.connectors.trace import Calls
    from coffret.engine.derivation import Derivation
    from coffret.engine.fetch import Fetcher
    from coffret.engine.mirror import Mirror
    from coffret.engine.ops.backup import BackupOptions, BackupSummary
    from coffret.engine.ops.check import CheckOptions, CheckSummary
    from coffret.engine.ops.restore import RestoreOptions, RestoreSummary
    from coffret.engine.ops.sync import SyncOptions, SyncSummary
    from coffret.engine.progress import Progress
    from coffret.engine.readahead import ReadAhead
    from coffret.engine.records import Entry, SourceFault
    from coffret.engine.sealing import Secrets
    from coffret.engine.snapshot import Commits, Snapshot
    from coffret.engine.storecache import StoreCache
    from coffret.engine.stream import StreamSource


class OpenOptions(msgspec.Struct, frozen=True):
    """How to reach a repository, and where this machine keeps what it knows of it.

    `connector`: options of the storage; `transfers`: how it is used. `cache_dir` and `state_dir` default to the user's
    folders. `expect_id`: accept this repository, and no other; `expect_state`: and only if it has these snapshots (see
    `seen.check_expected`), whatever else was seen. `encrypted_only`: refuse one without encryption, since a
    passphrase was given. `passphrase_at_hand`: nobody is asked for it, so it may be used before the storage answers.
    `derivation`: of the repository's keys, begun already.
    """

    connector: Mapping[str, str] = msgspec.field(default_factory=dict)
    transfers: Transfers = msgspec.field(default_factory=Transfers)
    cache_dir: Path | None = None
    state_dir: Path | None = None
    use_cache: bool = True
    expect_id: str | None = None
    expect_state: str | None = None
    encrypted_only: bool = False
    passphrase_at_hand: bool = False
    derivation: Derivation | None = None
    #: What was asked of each storage that was opened with these options, by location and method.
    calls: dict[str, Mapping[str, Calls]] = msgspec.field(default_factory=dict)


class Repository:
    """An open repository. Made by `open_repository`; its methods may run concurrently."""

    def __init__(
        self,
        connector: Connector,
        config_data: bytes,
        secrets: Secrets,
        mirror: Mirror,
        *,
        slot_id: str,
        options: OpenOptions,
        notes: list[str],
        kept: StoreCache | None = None,
        cache_folder: Path | None = None,
        writing: bool = False,
        ahead: ReadAhead | None = None,
    ) -> None:
        self.connector, self.secrets, self.mirror = connector, secrets, mirror
        #: The config, as stored and as read; and the key slot that opened it, "" without encryption.
        self.config_data, self.config, self.slot_id = config_data, configuration.parse_config(config_data), slot_id
        self.options, self._writing = options, writing
        #: The readers' view of the index; each attempt has one of its own.
        self.mirror.relist = self._relist
        #: Remarks for the user that came up while opening.
        self.notes = notes
        self.id_bytes = bytes.fromhex(self.config.repository_id)
        self.sealer = Sealer(secrets, self.id_bytes)
        #: What is kept locally of a storage elsewhere, if anything is.
        self.kept = kept
        #: The folder of what this machine caches of the repository; None if it keeps no cache.
        self.cache_folder = cache_folder
        self._commits: Commits | None = None
        self._ahead = ahead
        path = seen_path(connector.location, self.config.repository_id, options.state_dir)
        self._watch, self._expected_state = Watch(connector, self.sealer, path), options.expect_state
        #: Snapshots that were seen at this location and are not shown any more; of the last listing.
        self.rollback = Rollback()

    @property
    def is_far(self) -> bool:
        """Whether each answer of the storage took FAR_S or longer so far: then more is to be asked for at a time."""
        calls = self.options.calls.get(self.connector.location, {})
        return bool(calls) and min(each.fastest_s for each in calls.values()) >= FAR_S

    async def commits(self) -> Commits:
        """The snapshots there are, listed once, and anew after a backup; the mirror is in step with the index then."""
        if self._commits is None:
            from coffret.engine.snapshot import load_commits

            # What was read ahead goes for the first time alone.
            storage, self._ahead = self._ahead or self.connector, None
            # Before the index: of a snapshot that is listed all index objects are there.
            commits = await load_commits(storage, self.sealer, self.kept)
            damaged = await self._follow(commits, storage)
            self.notes += [f"no local cache is used: {self.mirror.left}"] if self.mirror.left else []
            self.notes += [f"left out, since it is damaged: {reason}" for _, reason in commits.damaged + damaged]
            await self._warn(commits)
            self._commits = commits
        return self._commits

    async def _warn(self, commits: Commits) -> None:
        """`watch`, for who only lists."""
        warning = await self.watch(commits)
        if warning and warning not in self.notes:
            self.notes.append(warning)

    async def watch(self, commits: Commits) -> str:
        """Compare a listing with what was seen before at this location, and remember it; return a warning, or "".

        :raises RepositoryChanged: if another state is expected
        """
        expected = self._expected_state
        if expected is not None:
            await check_expected_state(self.connector, commits, self.secrets.id_key, expected.strip().lower())
        self.rollback = await self._watch.look(commits, accept=expected is not None)
        return self.rollback.told(self.state_of(commits.snapshots))

    async def saw(self, snapshot: Snapshot) -> None:
        """Remember a snapshot that was just made here; what was expected was there before it."""
        self._expected_state = None
        await self._watch.add(snapshot)

    async def removed(self, snapshot: Snapshot, attempts: Sequence[bytes]) -> None:
        """Remember that a snapshot was just removed, as these attempts committed it."""
        await self._watch.drop({(snapshot.header.snapshot_id, attempt) for attempt in attempts})

    async def seen_as(self, name: str) -> list[tuple[bytes, bytes]]:
        """(id, attempt) of the snapshot that this user saw in an object of snapshots/, if any."""
        return await self._watch.seen_as(name)

    def state_of(self, snapshots: Sequence[Snapshot]) -> str:
        """The state of the repository with these snapshots, as `--expect-state` takes it."""
        return state_of((snapshot.header.snapshot_id for snapshot in snapshots), self.secrets.id_key)

    def forget_commits(self) -> None:
        """Snapshots came or went: list them anew when they are asked for."""
        self._commits = None

    async def _relist(self) -> None:
        await self._follow(await self.commits(), self.connector)

    async def _follow(self, commits: Commits, storage: Connector) -> list[tuple[str, str]]:
        """Bring the readers' view up to date; return what is damaged.

        Whether all packs are there is not asked: what is sought in one that is not is sought in another then.
        """
        from coffret.engine.attempt import list_index, update_mirror

        listed = await list_index(storage)
        return await update_mirror(storage, self.sealer, self.mirror, listed, commits, audit=False)

    async def find_snapshot(self, text: str) -> Snapshot:
        """The snapshot meant by an id, a unique prefix of one, or `latest`.

        :raises NoSuchSnapshot: if none is meant, or several are
        :raises Damaged: if `latest` may mean one that can't be read
        """
        from coffret.engine.snapshot import find_snapshot

        return find_snapshot(await self.commits(), text)

    async def faults(self, snapshot: Snapshot) -> list[SourceFault]:
        """What could not be backed up as it should when a snapshot was made: listed headers are without it.

        :raises Damaged: if the snapshot's object is not what was stored
        """
        from coffret.engine.snapshot import load_whole

        return (await load_whole(self.connector, self.sealer, snapshot)).header.faults

    async def backup(
        self,
        source: Sequence[bytes] | StreamSource,
        options: BackupOptions | None = None,
        progress: Progress | None = None,
    ) -> BackupSummary:
        """Back up paths, or a stream, as one snapshot; see `ops.backup.backup`.

        :raises RepositoryChanged: if data might be written in clear to a repository put in the place of another
        """
        from coffret.engine.ops import backup
        from coffret.engine.progress import Progress

        options = options or backup.BackupOptions()
        if not options.dry_run:
            await self._about_to_write()
        summary = await backup.backup(self, source, options, progress or Progress())
        self.forget_commits()
        return summary

    async def sync(
        self,
        source: Repository,
        snapshots: Sequence[Snapshot],
        options: SyncOptions | None = None,
        progress: Progress | None = None,
    ) -> SyncSummary:
        """Copy snapshots of another repository into this one; see `ops.sync.sync`.

        :raises RepositoryChanged: if data might be written in clear to a repository put in the place of another
        """
        from coffret.engine.ops import sync
        from coffret.engine.progress import Progress

        await self._about_to_write()
        summary = await sync.sync(source, self, snapshots, options or sync.SyncOptions(), progress or Progress())
        self.forget_commits()
        return summary

    async def _about_to_write(self) -> None:
        if not self._writing:
            await to_thread.run_sync(partial(check_pins, self.connector, self.config_data, self.options, writing=True))
            self._writing = True

    async def listed(self) -> Commits:
        """The snapshots there are now, and nothing of the index: for comparing repositories."""
        from coffret.engine.snapshot import load_commits

        commits = await load_commits(self.connector, self.sealer, self.kept)
        await self._warn(commits)
        return commits

    async def restore(
        self,
        snapshot: Snapshot,
        target: bytes,
        *,
        path: bytes | None = None,
        options: RestoreOptions | None = None,
        progress: Progress | None = None,
    ) -> RestoreSummary:
        """Restore a snapshot, or what lies at `path` in it, into a directory; see `ops.restore.restore`."""
        from coffret.engine.ops import restore
        from coffret.engine.progress import Progress

        return await restore.restore(
            self, snapshot, path, target, options or restore.RestoreOptions(), progress or Progress()
        )

    async def check(
        self,
        targets: Sequence[tuple[Snapshot, bytes | None]] | None = None,
        options: CheckOptions | None = None,
        progress: Progress | None = None,
    ) -> CheckSummary:
        """Verify snapshots, or everything; see `ops.check.check`."""
        from coffret.engine.ops import check
        from coffret.engine.progress import Progress

        return await check.check(self, targets, options or check.CheckOptions(), progress or Progress())

    def fetcher(self, mirror: Mirror | None = None, *, strict: bool = False) -> Fetcher:
        """What reads chunks back, by the readers' view of the index or another; with what is kept locally.

        `strict`: see `Fetcher`.
        """
        from coffret.engine.fetch import Fetcher

        view = self.mirror if mirror is None else mirror
        return Fetcher(self.connector, self.sealer, view, id_key=self.secrets.id_key, kept=self.kept, strict=strict)

    async def entries(
        self, snapshot: Snapshot, path: bytes, *, recursive: bool, lost: Callable[[bytes, str], None] | None = None
    ) -> AsyncIterator[tuple[bytes, list[Entry]]]:
        """(directory, entries) of what lies at `path` (no leading slash): a file itself, a directory's content.

        `lost` is told where a part of the listing is damaged, and why; without it that is an error.

        :raises Damaged: if the listing is damaged, and nobody is told
        :raises UsageError: if there is no such path
        """
        import stat

        from coffret.engine.catalog_reader import Catalog

        await self.commits()
        fetcher = self.fetcher()
        catalog = Catalog(snapshot.header.catalog, snapshot.header.depth, fetcher.load, lost=lost)
        try:
            entry = await catalog.find(path)
        except Damaged:
            if lost is None or not catalog.survives:
                raise
            # What it is can't be told; what lies below it may be whole.
            async for directory, entries in catalog.walk(path):
                yield directory, entries
            return
        if entry is None:
            raise UsageError(
                f"no /{os.fsdecode(path)} in snapshot {snapshot.short_id}",
                remedy=f"see `coffret at REPO ls {snapshot.short_id}` for what is there",
            )
        if recursive or not stat.S_ISDIR(entry.mode):
            async for directory, entries in catalog.walk(path):
                yield directory, entries
        else:
            async for entries in catalog.listing(path):
                yield path, entries

    def own_places(self, roots: Sequence[bytes]) -> frozenset[tuple[int, int]]:
        """(device, inode) of the directories that a backup of `roots` leaves out: the repository, and Coffret's own.

        A folder for cache or state that the user chose may hold other things, as may one that a root lies in: there
        only what Coffret keeps of repositories is left out.
        """
        asked_for = [os.path.realpath(os.fsdecode(root)) for root in roots]
        cache = cache_folder(self.options), self.options.cache_dir, ("[0-9a-f]" * 64 + "-*",)
        kept = self.options.state_dir or state.state_folder(), self.options.state_dir, state.KINDS
        places: list[Path] = []
        for folder, chosen, patterns in (cache, kept):
            real = os.path.realpath(folder)
            if chosen or any(os.path.commonpath((real, path)) == real for path in asked_for):
                places += [place for pattern in patterns for place in folder.glob(pattern)]
            else:
                places.append(folder)
        return frozenset(_identities([*places, *self.connector.places]))

    def own_files(self) -> frozenset[tuple[int, int]]:
        """(device, inode) of the files that a backup leaves out, since the repository consists of them."""
        return frozenset(_identities([place for place in self.connector.places if place.is_file()]))


def _identities(places: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """(device, inode) of those that are there."""
    for place in places:
        try:
            status = os.stat(place)
        except OSError:
            continue
        yield status.st_dev, status.st_ino


def check_pins(
    connector: Connector, data: bytes, options: OpenOptions, *, pin: bool = True, writing: bool = False
) -> str:
    """Whether the repository with this config is the one that was here before; see `state.check`."""
    config = configuration.parse_config(data)
    return state.check(
        connector.location,
        config.repository_id,
        config.encrypted,
        configuration.config_hash(data),
        options.expect_id,
        pin=pin,
        writing=writing,
        folder=options.state_dir,
    )


def cache_folder(options: OpenOptions) -> Path:
    """Where this machine caches what it knows of repositories."""
    if options.cache_dir is not None:
        return options.cache_dir
    from platformdirs import user_cache_path

    return user_cache_path("coffret", appauthor=False)
