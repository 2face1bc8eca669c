"""The real backup, removal, maintenance and reader, in random interleavings of their storage calls.

COFFRET_TEST_ROUNDS=50 runs fifty times as many, COFFRET_TEST_SEED moves them.
"""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.attempts.storage import ONE_WORKER, mirrors
from tests.fault_harness import ROUNDS, SEED
from tests.maintenance.oracle import Oracle
from tests.maintenance.scenery import small_storage
from tests.maintenance.stage import Stage

from coffret.engine.catalog_reader import Catalog
from coffret.engine.errors import CoffretError
from coffret.engine.ops.maintenance import MaintenanceOptions, maintain
from coffret.engine.ops.rm import remove
from coffret.engine.progress import Progress
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.maintenance.stage import Party

    from coffret.engine.repository import Repository

RUNS = 40 * ROUNDS
NOW = MaintenanceOptions(grace_s=0)
SPAN = 400


class Scenery:
    """A repository of small chunks and packs, contents to be backed up, and the parties that can be cast."""

    def __init__(self, home: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.home, self.storage = home, small_storage()
        self.pieces = [self.random.randbytes(2000) for _ in range(6)]
        self.serial = 0
        self.stage: Stage
        self.expected: dict[str, dict[bytes, bytes]] = {}
        self.tree = home / f"tree{seed}"
        self.tree.mkdir()
        for number, piece in enumerate(self.pieces[:3]):
            (self.tree / str(number)).write_bytes(piece)

    @asynccontextmanager
    async def opened(self, party: Party) -> AsyncIterator[Repository]:
        """The repository as a party's own machine sees it."""
        repository = await self.storage.open(self.stage.gate(party))
        mirrors.remove(repository.mirror)
        try:
            yield repository
        finally:
            with anyio.CancelScope(shield=True):
                await repository.mirror.close()

    async def back_up(self, party: Party) -> None:
        """A stream of some of the pieces."""
        content = b"".join(self.random.sample(self.pieces, self.random.randint(1, 4)))
        self.serial += 1
        path = self.home / f"content{self.serial}"
        path.write_bytes(content)
        async with self.opened(party) as repository:
            source = StreamSource(b"stream", f"cat {path}")
            made = (await repository.backup(source, ONE_WORKER)).snapshot
            self.stage.oracle.made.add(made.attempt.hex())
            self.expected[made.attempt.hex()] = {b"stream": content}

    async def back_up_tree(self, party: Party) -> None:
        """A tree that never changes: where there is a parent nothing is read."""
        async with self.opened(party) as repository:
            made = (await repository.backup([bytes(self.tree)], ONE_WORKER)).snapshot
            self.stage.oracle.made.add(made.attempt.hex())
            folder = bytes(self.tree).lstrip(b"/")
            self.expected[made.attempt.hex()] = {
                folder + b"/%d" % number: piece for number, piece in enumerate(self.pieces[:3])
            }

    async def remove(self, party: Party) -> None:
        """Remove some snapshots."""
        async with self.opened(party) as repository:
            snapshots = (await repository.commits()).snapshots
            await remove(repository, self.random.sample(snapshots, self.random.randint(0, len(snapshots))))

    async def maintain(self, party: Party) -> None:
        """Maintain, with no grace at all."""
        async with self.opened(party) as repository:
            await maintain(repository, NOW, Progress())

    async def read(self, party: Party) -> None:
        """Read every chunk of a snapshot; only if it was removed meanwhile may one be missing."""
        async with self.opened(party) as repository:
            snapshots = (await repository.commits()).snapshots
            if not snapshots:
                return
            snapshot = self.random.choice(snapshots)
            try:
                fetcher = repository.fetcher()
                catalog = Catalog(snapshot.header.catalog, snapshot.header.depth, fetcher.load)
                async for _, entries in catalog.walk():
                    for entry in entries:
                        async for refs in catalog.file_refs(entry):
                            await fetcher.load([refs])
            except CoffretError:
                if any(each.attempt == snapshot.attempt for each in self.stage.oracle.snapshots()):
                    raise


CAST = {"backup": 3, "tree": 1, "remove": 2, "maintain": 4, "read": 1}


async def run(home: Path, seed: int) -> Stage:
    """One random run."""
    scenery = Scenery(home, seed)
    sealer = (await scenery.storage.open()).sealer
    stage = scenery.stage = Stage(scenery.storage, Oracle(scenery.storage, sealer), seed)
    works: dict[str, Callable[[Party], Awaitable[None]]] = {
        "backup": scenery.back_up,
        "tree": scenery.back_up_tree,
        "remove": scenery.remove,
        "maintain": scenery.maintain,
        "read": scenery.read,
    }
    # First something to work on, one after the other.
    for name in ("tree", "backup", "backup", "remove"):
        await stage.play([(name, works[name])], 1 << 30)
    names = scenery.random.choices([*CAST], [*CAST.values()], k=scenery.random.randint(3, 6))
    await stage.play([(f"{name}{n}", works[name]) for n, name in enumerate(names)], SPAN)
    if stage.violation:
        return stage
    # What was in the way is dead by now. All that is marked can be swept, and all is still there.
    stage.now_s += 7200
    for _ in range(2):
        await stage.play([("last", scenery.maintain)], 1 << 30)
    stage.violation = stage.violation or stage.oracle.violation()
    for snapshot in stage.oracle.snapshots() if not stage.violation else ():
        found = stage.oracle.content(snapshot)
        expected = scenery.expected.get(snapshot.attempt.hex())  # None if its writer died after the commit
        if expected is not None and found != expected:
            stage.violation = f"snapshot {snapshot.short_id} has other content"
    open_marks = {name for name in await scenery.storage.names("trash/") if name.partition("-")[2] == ""}
    for name in open_marks:
        if f"{name}-done" not in await scenery.storage.names("trash/"):
            stage.violation = stage.violation or f"{name} is never swept"
    return stage


@pytest.mark.anyio
@pytest.mark.usefixtures("closed_mirrors")
@pytest.mark.parametrize("batch", range(4))
async def test_nothing_is_lost(tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coffret.engine.settings.RACY_NS", 0)  # what was made just now counts as unchanged
    for number in range(RUNS // 4):
        seed = SEED * 100_000 + number * 4 + batch
        stage = await run(tmp_path, seed)
        assert not stage.violation, f"seed {seed}: {stage.violation}\n" + "\n".join(stage.story[-120:])
