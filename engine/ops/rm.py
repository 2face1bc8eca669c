"""Remove snapshots from the list. The space they took comes back with maintenance."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from coffret.engine.errors import Damaged
from coffret.engine.objects import MAX_MARK_BYTES, list_objects, read_listed
from coffret.engine.records import ATTEMPT_BYTES
from coffret.engine.removal import open_removal, put_removal, removal_here, seal_removal
from coffret.engine.rights import need
from coffret.engine.snapshot import find_snapshot

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Commits, Snapshot


def resolve(commits: Commits, texts: Iterable[str]) -> tuple[list[Snapshot], list[str]]:
    """The snapshots meant by ids, unique prefixes of ids, and `latest`; and the ids of those that are removed already.

    A removal that was interrupted can so be repeated as it stands. Nothing is there twice.

    :raises NoSuchSnapshot: if one text means no snapshot, or several
    :raises Damaged: if `latest` may mean one that can't be read
    """
    found: dict[str, Snapshot] = {}
    gone: set[str] = set()
    for text in texts:
        before = [each for each in commits.removed if each.startswith(text.lower())]
        if len(before) == 1 and not any(snapshot.id.startswith(text.lower()) for snapshot in commits.snapshots):
            gone.add(before[0])
        else:
            snapshot = find_snapshot(commits, text)
            found[snapshot.id] = snapshot
    return [*found.values()], sorted(gone)


async def renew(repository: Repository, snapshot_ids: Collection[str]) -> int:
    """Put anew what can't be read of the records by which snapshots were removed; how many these were.

    A record counts, whether it can be read or not; but one that can't does not tell who put it there.
    """
    connector, sealer, renewed = repository.connector, repository.sealer, 0
    for snapshot_id in snapshot_ids:
        for info in await list_objects(connector, f"removed/{snapshot_id}-"):
            try:
                open_removal(sealer, info.name, await read_listed(connector, info, MAX_MARK_BYTES))
            except Damaged:
                need(connector, "removing snapshots")
                body = seal_removal(sealer, info.name, os.urandom(ATTEMPT_BYTES), removal_here())
                await connector.put(info.name, [body])
                renewed += 1
    return renewed


async def remove(repository: Repository, snapshots: Sequence[Snapshot]) -> None:
    """Remove snapshots, each with all objects that hold it: hosts that sync at the same time leave several.

    :raises ConnectorError: if the storage fails; those before are removed then
    """
    if snapshots:
        need(repository.connector, "removing snapshots")
    commits = await repository.commits()
    removal = removal_here()
    try:
        for snapshot in snapshots:
            attempts = commits.attempts.get(snapshot.header.snapshot_id, ())
            for attempt in attempts:
                await put_removal(
                    repository.connector, repository.sealer, snapshot.header.snapshot_id, attempt, removal
                )
            await repository.removed(snapshot, attempts)
    finally:
        repository.forget_commits()
