"""A repository in memory, as several machines see it."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

from tests.fault_harness import NOTHING_SEEN, contents

from coffret.connectors.memory import MemoryConnector
from coffret.engine import configuration, keys, sealing
from coffret.engine.mirror import Mirror
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.pipeline import Limits
from coffret.engine.records import End, encode
from coffret.engine.repository import Repository

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.connectors.base import Connector


ONE_WORKER = BackupOptions(limits=Limits(workers=1))
mirrors: list[Mirror] = []


class Storage:
    """A repository in memory, as several machines see it: each opens it with a mirror of its own."""

    def __init__(self) -> None:
        self.secrets = keys.new_secrets(encrypted=True)
        self.config = configuration.new_config(self.secrets)
        self.memory = MemoryConnector()

    async def open(self, connector: Connector | None = None, folder: Path | None = None) -> Repository:
        mirror = await Mirror.open(folder, self.config.repository_id)
        mirrors.append(mirror)
        data = configuration.config_bytes(self.config)
        inner = connector or self.memory
        return Repository(inner, data, self.secrets, mirror, slot_id="", options=NOTHING_SEEN, notes=[], writing=True)

    async def names(self, prefix: str) -> list[str]:
        return [info.name async for info in self.memory.list(prefix)]

    async def revoke(self, attempt: str) -> None:
        opened = await self.open()
        name = f"snapshots/{attempt}"
        body = opened.sealer.seal(sealing.END, name, os.urandom(16), encode(End("revoked", time.time_ns())))
        await self.memory.put(name, [body], if_absent=True)


async def restores(storage: Storage, source: Path, opened: Repository | None = None) -> bool:
    """Whether the latest snapshot is the source."""
    opened = opened or await storage.open()
    target = source.parent / f"target{random.getrandbits(64)}"
    summary = await opened.restore(await opened.find_snapshot("latest"), bytes(target))
    return not summary.errors and contents(target) == contents(source)
