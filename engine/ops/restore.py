"""Restore: catalog pages → wanted chunks by pack → ranges fetched → opened and written by workers → metadata."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread

from coffret.engine.catalog_reader import Catalog, clean_path, no_such_path
from coffret.engine.errors import CoffretError, Damaged, TargetError
from coffret.engine.openpool import OpenPool
from coffret.engine.places import Places
from coffret.engine.restore_report import Report
from coffret.engine.restore_target import open_target
from coffret.engine.restore_tree import Scope, TreeRestore, join
from coffret.engine.settings import FAR_SLABS, OPEN_SLABS, OPEN_WORKERS, RESTORE_SLAB_BYTES

if TYPE_CHECKING:
    from coffret.engine.fetch import Fetcher
    from coffret.engine.filters import PathPatterns
    from coffret.engine.progress import Progress
    from coffret.engine.records import Entry
    from coffret.engine.repository import Repository
    from coffret.engine.restore_target import Target
    from coffret.engine.snapshot import Snapshot


class RestoreOptions(msgspec.Struct, frozen=True):
    """How to restore. `overwrite` is one of `settings.OVERWRITE`.

    `owner` None: set owners if root, else skip them with a note.
    `workers`: how many processes open and write; None for the number that was measured best.
    """

    overwrite: str = "refuse"
    patterns: PathPatterns | None = None
    owner: bool | None = None
    sparse: bool = False
    workers: int | None = None


class RestoreSummary(msgspec.Struct, frozen=True):
    """What a restore wrote: files, bytes and faults; `kept`: entries that were there and were left as they are."""

    snapshot_id: str
    path: bytes
    target: bytes
    files: int
    size_bytes: int
    errors: int
    duration_s: float
    kept: int = 0


async def restore(
    repository: Repository,
    snapshot: Snapshot,
    path: bytes | None,
    target: bytes,
    options: RestoreOptions,
    progress: Progress,
) -> RestoreSummary:
    """Restore a snapshot, or what lies at `path` in it (absolute), into the directory `target`.

    :raises UsageError: if there is no such path
    :raises TargetError: if the target can't be used, or something would be overwritten
    :raises CoffretError: if the patterns match nothing
    """
    begin = time.perf_counter()
    await repository.commits()
    fetcher = repository.fetcher()
    catalog = Catalog(snapshot.header.catalog, snapshot.header.depth, fetcher.load, lost=progress.fault)
    scope = await _scope(catalog, snapshot, path)
    owner = os.geteuid() == 0 if options.owner is None else options.owner
    if options.patterns is not None:
        _note_idle(options.patterns, scope.start, progress)
    replace = options.overwrite != "refuse"
    opened = await to_thread.run_sync(lambda: open_target(target, replace=replace))
    unused = True
    try:
        if opened.occupied and not replace:
            await _refuse_taken(catalog, scope, opened, options.patterns)
            scope = scope._replace(named=False)
        if not owner and options.owner is None:
            progress.note("owners are not restored, since this is not root")
        progress.phase = "restore"
        if path is None and options.patterns is None:
            progress.files_total, progress.size_total = snapshot.header.counts.files, snapshot.header.counts.size_bytes
        report = Report(progress, scope.base)
        pool = OpenPool(
            repository.secrets,
            repository.id_bytes,
            workers=options.workers or OPEN_WORKERS,
            slabs=FAR_SLABS if repository.is_far else OPEN_SLABS,
            slab_bytes=max(RESTORE_SLAB_BYTES, 2 * repository.config.chunker.max_bytes),
            target=opened.fd,
            owner=owner,
            sparse=options.sparse,
            wary=opened.wary,
            unlock=options.overwrite in ("always", "if-changed"),
        )
        unused = await _run(fetcher, catalog, pool, opened, scope, options, report)
    finally:
        await to_thread.run_sync(lambda: opened.close(unused=unused))
    if report.kept:
        progress.note(f"entries kept as they are, since they were there already: {report.kept}")
    if options.patterns is not None and unused and not progress.errors:
        raise CoffretError(
            f"nothing in snapshot {snapshot.short_id} matches the patterns",
            remedy="patterns with a slash begin at the snapshot's root, as in /home/*/notes; others match any name",
        )
    return RestoreSummary(
        snapshot.id,
        path or b"/",
        target,
        progress.files,
        progress.size_bytes,
        progress.errors,
        time.perf_counter() - begin,
        report.kept,
    )


async def _run(
    fetcher: Fetcher,
    catalog: Catalog,
    pool: OpenPool,
    target: Target,
    scope: Scope,
    options: RestoreOptions,
    report: Report,
) -> bool:
    """Restore into an open target; return whether there was nothing to be restored."""
    places = Places(target.fd, wary=target.wary, unlock=options.overwrite in ("always", "if-changed"))
    work = None
    try:
        async with pool, anyio.create_task_group() as group:
            work = TreeRestore(
                fetcher,
                catalog,
                pool,
                group,
                places,
                scope,
                report,
                patterns=options.patterns,
                overwrite=options.overwrite,
                sparse=options.sparse,
            )
            await work.run(target)
    except BaseException:
        if work is not None:
            work.clear()
        raise
    finally:
        if work is not None:
            work.close()
        places.close()
    assert work is not None
    return work.matched == 0


async def _scope(catalog: Catalog, snapshot: Snapshot, path: bytes | None) -> Scope:
    """A common ancestor of several roots is no more than a place: the target stays as it is."""
    roots = [clean_path(root) for root in snapshot.header.roots]
    start = clean_path(path) if path is not None else (roots[0] if len(roots) == 1 else os.path.commonpath(roots))
    try:
        entry = await catalog.find(start)
    except Damaged:
        if not catalog.survives:
            raise
        return Scope(start, start, named=False)
    if entry is None:
        raise no_such_path(snapshot.short_id, start)
    base = start if stat.S_ISDIR(entry.mode) else start.rpartition(b"/")[0]
    return Scope(start, base, named=path is not None or len(roots) == 1)


async def _refuse_taken(catalog: Catalog, scope: Scope, target: Target, patterns: PathPatterns | None) -> None:
    """See that none of the names that will be restored to the target itself is there.

    :raises TargetError: if one is
    """
    if scope.start != scope.base:
        names = [scope.start.rpartition(b"/")[2]]
    else:
        names = []
        async for entries in catalog.listing(scope.start):
            names += [e.name for e in entries if e.name in target.occupied and _concerned(patterns, scope.start, e)]
            if names:
                break
    for name in names:
        if name in target.occupied:
            raise TargetError(
                f"{os.fsdecode(os.path.join(target.path, name))} is there already",
                remedy="restore into another directory, or say --overwrite always, if-changed or never",
            )


def _concerned(patterns: PathPatterns | None, directory: bytes, entry: Entry) -> bool:
    """Whether an entry will be restored, or something in it may be."""
    if patterns is None:
        return True
    path, is_dir = join(directory, entry.name), stat.S_ISDIR(entry.mode)
    return patterns.wanted(path, is_dir) or (is_dir and patterns.may_contain(path))


def _note_idle(patterns: PathPatterns, start: bytes, progress: Progress) -> None:
    from coffret.engine.filters import MATCHES_NOTHING

    for pattern in patterns.idle(start):
        progress.note(f"{pattern!r} {MATCHES_NOTHING}")
