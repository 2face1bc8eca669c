"""The real backup, removal, sync, maintenance, reader and check, in random interleavings of their storage calls.

COFFRET_TEST_ROUNDS=50 runs fifty times as many, COFFRET_TEST_SEED moves them.
"""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.attempts.storage import ONE_WORKER, mirrors
from tests.fault_harness import ROUNDS, SEED
from tests.maintenance.oracle import Oracle
from tests.maintenance.scenery import small_storage
from tests.maintenance.stage import Stage, set_clocks

from coffret.engine.catalog_reader import Catalog
from coffret.engine.errors import CoffretError
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.maintenance import MaintenanceOptions, maintain
from coffret.engine.ops.prune import PruneOptions, plan, prune
from coffret.engine.ops.rm import remove
from coffret.engine.ops.sync import SyncOptions, lacking
from coffret.engine.progress import Progress
from coffret.engine.retention import Policy
from coffret.engine.selection import Selection
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.attempts.storage import Storage
    from tests.maintenance.stage import Party

    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

    Work = Callable[[Party], Awaitable[None]]

RUNS = 40 * ROUNDS
NO_GRACE_S, GRACE_S = 0.0, 600.0
SPAN = 400


class Side:
    """A repository, and what it must hold."""

    def __init__(self, storage: Storage, oracle: Oracle) -> None:
        self.storage, self.oracle = storage, oracle

    @classmethod
    async def made(cls, like: Storage | None = None) -> Side:
        """A new one."""
        storage = small_storage(like)
        return cls(storage, Oracle(storage, (await storage.open()).sealer))


class Scenery:
    """Two repositories of small chunks and packs, contents to be backed up, and the parties that can be cast."""

    def __init__(self, home: Path, seed: int, stage: Stage, main: Side, peer: Side, grace_s: float) -> None:
        self.random = random.Random(seed)
        self.home, self.stage, self.main, self.peer, self.grace_s = home, stage, main, peer, grace_s
        self.pieces = [self.random.randbytes(2000) for _ in range(6)]
        self.serial = 0
        # Of each snapshot, by id, if its writer lived to tell it.
        self.expected: dict[str, dict[bytes, bytes]] = {}
        self.tree = home / f"tree{seed}"
        self.tree.mkdir()
        for number, piece in enumerate(self.pieces[:3]):
            (self.tree / str(number)).write_bytes(piece)

    @asynccontextmanager
    async def opened(self, party: Party, side: Side) -> AsyncIterator[Repository]:
        """A repository as a party's own machine sees it."""
        repository = await side.storage.open(self.stage.gate(party, side.storage, side.oracle))
        mirrors.remove(repository.mirror)
        try:
            yield repository
        finally:
            with anyio.CancelScope(shield=True):
                await repository.mirror.close()

    async def back_up(self, side: Side, party: Party) -> None:
        """A stream of some of the pieces."""
        content = b"".join(self.random.sample(self.pieces, self.random.randint(1, 4)))
        self.serial += 1
        path = self.home / f"content{self.serial}"
        path.write_bytes(content)
        async with self.opened(party, side) as repository:
            source = StreamSource(b"stream", f"cat {path}")
            made = (await repository.backup(source, ONE_WORKER)).snapshot
            self.note(side, made, {b"stream": content})

    async def back_up_tree(self, side: Side, party: Party) -> None:
        """A tree that never changes: where there is a parent nothing is read."""
        async with self.opened(party, side) as repository:
            made = (await repository.backup([bytes(self.tree)], ONE_WORKER)).snapshot
            folder = bytes(self.tree).lstrip(b"/")
            self.note(side, made, {folder + b"/%d" % number: piece for number, piece in enumerate(self.pieces[:3])})

    def note(self, side: Side, made: Snapshot, content: dict[bytes, bytes]) -> None:
        """A snapshot was reported as made."""
        side.oracle.made.add(made.attempt.hex())
        self.expected[made.id] = content

    async def remove(self, side: Side, party: Party) -> None:
        """Remove some snapshots."""
        async with self.opened(party, side) as repository:
            snapshots = (await repository.commits()).snapshots
            await remove(repository, self.random.sample(snapshots, self.random.randint(0, len(snapshots))))

    async def prune(self, side: Side, party: Party) -> None:
        """Keep the last of each group."""
        async with self.opened(party, side) as repository:
            await prune(repository, await plan(repository, PruneOptions(Policy(last=1))))

    async def sync(self, source: Side, target: Side, party: Party) -> None:
        """Copy what one side lacks, or what is named, even if it was removed there. None is damaged."""
        async with self.opened(party, source) as there, self.opened(party, target) as here:
            listed = await there.listed()
            ids = [snapshot.id for snapshot in listed.snapshots]
            named = self.random.sample(ids, self.random.randint(0, len(ids)))
            lack = lacking(listed, await here.listed(), Selection(named))
            options = SyncOptions(back=lack.back, limits=ONE_WORKER.limits)
            summary = await here.sync(there, lack.snapshots, options)
            target.oracle.made |= {snapshot.attempt.hex() for snapshot in summary.copied}
            assert not summary.damaged

    async def maintain(self, side: Side, party: Party) -> None:
        """Maintain, in most runs with no grace at all."""
        async with self.opened(party, side) as repository:
            await maintain(repository, MaintenanceOptions(grace_s=self.grace_s), Progress())

    async def read(self, side: Side, party: Party) -> None:
        """Read every chunk of a snapshot; only if it was removed meanwhile may one be missing."""
        async with self.opened(party, side) as repository:
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
                if any(each.attempt == snapshot.attempt for each in side.oracle.snapshots()):
                    raise

    async def check(self, side: Side, party: Party) -> None:
        """Nothing is damaged."""
        faults = Progress(on_fault=lambda fault: told.append(f"{fault.path!r}: {fault.reason}"))
        told: list[str] = []
        async with self.opened(party, side) as repository:
            summary = await repository.check(None, CheckOptions(fast=self.random.random() < 0.7, workers=1), faults)
            assert summary.clean, told

    def works(self) -> dict[str, Work]:
        """What a party can be cast for."""
        main, peer = self.main, self.peer
        return {
            "backup": partial(self.back_up, main),
            "tree": partial(self.back_up_tree, main),
            "remove": partial(self.remove, main),
            "prune": partial(self.prune, main),
            "maintain": partial(self.maintain, main),
            "read": partial(self.read, main),
            "check": partial(self.check, main),
            "sync from": partial(self.sync, peer, main),
            "sync to": partial(self.sync, main, peer),
            "peer's backup": partial(self.back_up, peer),
            "peer's remove": partial(self.remove, peer),
            "peer's maintain": partial(self.maintain, peer),
        }

    async def judge(self, side: Side) -> str:
        """At the end, what is wrong; or ""."""
        if violation := side.oracle.violation():
            return violation
        for snapshot in side.oracle.snapshots():
            found = side.oracle.content(snapshot)
            expected = self.expected.get(snapshot.id)  # None if its writer died after the commit
            if expected is not None and found != expected:
                return f"snapshot {snapshot.short_id} has other content"
        trash = await side.storage.names("trash/")
        for name in trash:
            if name.partition("-")[2] == "" and f"{name}-done" not in trash:
                return f"{name} is never swept"
        return ""


# How often each is cast; in every second run nobody does anything with the peer.
CAST = {"backup": 3, "tree": 1, "remove": 2, "prune": 1, "maintain": 5, "read": 1, "check": 1}
WITH_PEER = {"sync from": 8, "sync to": 2, "peer's backup": 1, "peer's remove": 1, "peer's maintain": 1}


async def run(home: Path, seed: int) -> Stage:
    """One random run. In one of four a request may be late, and there is a grace for that."""
    rng = random.Random(seed)
    delays, with_peer, alike = rng.random() < 0.25, rng.random() < 0.5, rng.random() < 0.5
    stage = Stage(seed, delays=delays)
    main = await Side.made()
    peer = await Side.made(main.storage if alike else None)
    scenery = Scenery(home, seed, stage, main, peer, GRACE_S if delays else NO_GRACE_S)
    works = scenery.works()
    # First something to work on, one after the other.
    peers = ("peer's backup", "peer's backup", "sync from") if with_peer else ()
    for name in ("tree", "backup", "backup", *peers, "remove"):
        await stage.play([(name, works[name])], 1 << 30)
    cast = CAST | (WITH_PEER if with_peer else {})
    names = rng.choices([*cast], [*cast.values()], k=rng.randint(3, 8 if with_peer else 6))
    await stage.play([(f"{name}{n}", works[name]) for n, name in enumerate(names)], SPAN)
    if stage.violation:
        return stage
    # What was in the way is dead by now. All that is marked can be swept, and all is still there.
    scenery.grace_s, stage.lossy = NO_GRACE_S, 0.0
    for _ in range(2):
        await stage.pass_an_hour()
    for side in (main, peer):
        for _ in range(2):
            await stage.play([("last", partial(scenery.maintain, side))], 1 << 30)
        stage.violation = stage.violation or await scenery.judge(side)
    return stage


@pytest.mark.anyio
@pytest.mark.usefixtures("closed_mirrors")
@pytest.mark.parametrize("batch", range(4))
async def test_nothing_is_lost(tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coffret.engine.settings.RACY_NS", 0)  # what was made just now counts as unchanged
    set_clocks(monkeypatch)
    for number in range(RUNS // 4):
        seed = SEED * 100_000 + number * 4 + batch
        stage = await run(tmp_path, seed)
        assert not stage.violation, f"seed {seed}: {stage.violation}\n" + "\n".join(stage.story[-120:])
