"""A repository in memory that is backed up to and maintained, with a clock that stands still."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import ONE_WORKER
from tests.harness import Recorder
from tests.maintenance.oracle import Oracle
from tests.maintenance.scenery import PIECES, small_storage

from coffret.engine.errors import reported
from coffret.engine.ops.maintenance import MaintenanceOptions, MaintenanceSummary, maintain
from coffret.engine.ops.rm import remove
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.engine.errors import CoffretError
    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

NOW = MaintenanceOptions(grace_s=0)


class Scene:
    """A repository with snapshots of pieces, and a user of it, with a mirror that remembers."""

    def __init__(self, home: Path) -> None:
        self.home, self.storage, self.now_s = home, small_storage(), 1.8e9
        self.storage.memory.clock = lambda: self.now_s
        #: What the last maintenance told.
        self.recorder = Recorder()
        self.opened: Repository

    async def begin(self, *snapshots: slice) -> Scene:
        self.opened = await self.storage.open()
        for pieces in snapshots:
            await self.back_up(pieces)
        return self

    async def back_up(self, pieces: slice, more: bytes = b"") -> str:
        content = self.home / "content"
        content.write_bytes(b"".join(PIECES[pieces]) + more)
        return (await self.opened.backup(StreamSource(b"stream", f"cat {content}"), ONE_WORKER)).snapshot.id

    async def snapshots(self) -> list[Snapshot]:
        return (await self.opened.commits()).snapshots

    async def remove(self, *numbers: int) -> None:
        snapshots = await self.snapshots()
        await remove(self.opened, [snapshots[number] for number in numbers])

    async def maintain(self, options: MaintenanceOptions = NOW) -> MaintenanceSummary:
        self.recorder = Recorder()
        return await maintain(self.opened, options, self.recorder)

    async def refused(self, options: MaintenanceOptions = NOW) -> CoffretError:
        with pytest.raises(Exception) as raised:
            await self.maintain(options)
        known = reported(raised.value)
        assert known is not None, raised.value
        return known

    async def restored(self, snapshot: Snapshot) -> bytes | None:
        """The content of a snapshot; None if it does not restore."""
        target = self.home / f"restored{self.now_s}"
        self.now_s += 1
        summary = await (await self.storage.open()).restore(snapshot, bytes(target))
        return None if summary.errors else (target / "stream").read_bytes()

    def whole(self) -> None:
        oracle = Oracle(self.storage, self.opened.sealer)
        assert not oracle.violation()
        for snapshot in oracle.snapshots():
            oracle.content(snapshot)
