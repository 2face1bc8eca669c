"""Repositories in memory to be synced, each seen by one machine with a cache of its own; and what each holds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.fault_harness import contents

from coffret.connectors.memory import MemoryConnector
from coffret.engine import configuration, keys
from coffret.engine.mirror import Mirror
from coffret.engine.ops import rm
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.restore import RestoreOptions
from coffret.engine.ops.sync import SyncOptions, SyncSummary, lacking
from coffret.engine.pipeline import Limits
from coffret.engine.records import ChunkerConfig
from coffret.engine.repository import OpenOptions, Repository
from coffret.engine.sealing import Secrets
from coffret.engine.selection import Selection

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.connectors.base import Connector
    from coffret.engine.progress import Progress

ALL = Selection()
# So small that a file of some MiB has lists of lists; packs as small as a config allows.
SMALL = ChunkerConfig(min_bytes=512, avg_bytes=1024, max_bytes=4096)
mirrors: list[Mirror] = []


@dataclass(frozen=True)
class Side:
    """A repository in memory. `cache`: where the machine that opens it keeps what it knows; None for nowhere."""

    secrets: Secrets
    config_data: bytes
    memory: MemoryConnector
    cache: Path | None

    @staticmethod
    def made(
        cache: Path | None = None,
        *,
        encrypted: bool = True,
        like: Side | None = None,
        chunker: ChunkerConfig | None = None,
    ) -> Side:
        """A new repository; `like`: with the id and chunker keys of another."""
        secrets = keys.new_secrets(encrypted=encrypted)
        if like is not None:
            secrets = Secrets(secrets.data_key, like.secrets.id_key, like.secrets.chunker_key)
        config = configuration.new_config(secrets, chunker=chunker, pack_bytes=2 << 20 if chunker else 16 << 20)
        return Side(secrets, configuration.config_bytes(config), MemoryConnector(), cache)

    async def open(self, connector: Connector | None = None) -> Repository:
        """The repository, as a machine sees it that may have seen it before."""
        config = configuration.parse_config(self.config_data)
        folder = None if self.cache is None else self.cache / config.repository_id
        mirror = await Mirror.open(folder, config.repository_id)
        mirrors.append(mirror)
        return Repository(
            connector or self.memory,
            self.config_data,
            self.secrets,
            mirror,
            slot_id="",
            options=OpenOptions(),
            notes=[],
            cache_folder=folder,
            writing=True,
        )

    async def backup(self, source: Path, *, force: bool = False) -> str:
        """Back up a directory; return the snapshot's id."""
        options = BackupOptions(limits=Limits(workers=1), force=force)
        summary = await (await self.open()).backup([bytes(source)], options)
        return summary.snapshot.id

    async def ids(self) -> set[str]:
        """The snapshots it lists."""
        return {snapshot.id for snapshot in (await (await self.open()).listed()).snapshots}

    async def names(self, prefix: str) -> list[str]:
        return [info.name async for info in self.memory.list(prefix)]


async def sync(
    source: Repository, target: Repository, selection: Selection = ALL, progress: Progress | None = None
) -> SyncSummary:
    """What `coffret sync` does in one direction."""
    lack = lacking(await source.listed(), await target.listed(), selection)
    return await target.sync(source, lack.snapshots, SyncOptions(back=lack.back, shared=lack.shared), progress)


async def is_whole(side: Side) -> bool:
    """Whether all of a repository is as it should be, for a machine that knows nothing of it."""
    opened = await Side(side.secrets, side.config_data, side.memory, None).open()
    return (await opened.check(options=CheckOptions(workers=1))).clean


async def restores(side: Side, snapshot: str, expected: Path, folder: Path) -> bool:
    """Whether a snapshot is what a directory holds."""
    opened = await Side(side.secrets, side.config_data, side.memory, None).open()
    target = folder / f"restored{random.getrandbits(64)}"
    options = RestoreOptions(workers=1)
    summary = await opened.restore(await opened.find_snapshot(snapshot), bytes(target), options=options)
    return not summary.errors and contents(target) == contents(expected)


async def remove(side: Side, snapshot: str) -> None:
    """Take a snapshot off the list, as `coffret rm` does."""
    opened = await side.open()
    await rm.remove(opened, [await opened.find_snapshot(snapshot)])
