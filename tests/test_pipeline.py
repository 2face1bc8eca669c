"""The pipeline at its limits: every pool at its minimum, delays everywhere, storage that fails, rivals, revocation.

COFFRET_TEST_ROUNDS=20 makes a campaign of what is random, COFFRET_TEST_SEED another one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tests.fault_harness import ROUNDS, SEED, contents, create, make_source
from tests.harness import Program
from tests.processes import left_behind

from coffret.connectors.errors import ConnectionLost, StorageFull
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.memory import MemoryConnector
from coffret.engine import check_packs, configuration, keys, messages, sealing
from coffret.engine.chunkpool import ChunkPool
from coffret.engine.errors import LeaseLost, OutOfSpace, StorageError, reported
from coffret.engine.flow import Channel
from coffret.engine.messages import MetaChunks, Run
from coffret.engine.mirror import Mirror
from coffret.engine.openpool import OpenPool
from coffret.engine.ops import restore
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.packer import Packer
from coffret.engine.pipeline import Limits
from coffret.engine.progress import Progress
from coffret.engine.records import ChunkerConfig, End, encode
from coffret.engine.repository import OpenOptions, Repository

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from coffret.connectors.base import Connector
    from coffret.engine.sealing import Secrets

pytestmark = pytest.mark.anyio

LEAST = BackupOptions(limits=Limits(workers=1, slabs=2, sealers=1, uploads=1, pages=1, blocks=1, runs=1))
SMALL = ChunkerConfig(min_bytes=1 << 12, avg_bytes=1 << 14, max_bytes=1 << 16)
# Far above what anything here takes: what is still at it hangs.
HANGS_S = 100.0


class Storage:
    """A repository in memory, with small chunks and the smallest packs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.secrets: Secrets = keys.new_secrets(encrypted=True)
        config = configuration.new_config(self.secrets, chunker=SMALL, pack_bytes=configuration.MIN_PACK_BYTES)
        self.config_data, self.config = configuration.config_bytes(config), config
        self.memory = MemoryConnector()

    @asynccontextmanager
    async def open(self, connector: Connector | None = None) -> AsyncIterator[Repository]:
        """The repository through a connector around its storage, with a mirror that knows nothing."""
        mirror = await Mirror.open(None, self.config.repository_id)
        try:
            options = OpenOptions(cache_dir=self.home / "cache", state_dir=self.home / "state")
            inner = connector or self.memory
            yield Repository(inner, self.config_data, self.secrets, mirror, slot_id="", options=options, notes=[])
        finally:
            with anyio.CancelScope(shield=True):
                await mirror.close()

    async def names(self, prefix: str) -> list[str]:
        """What objects there are."""
        return [info.name async for info in self.memory.list(prefix)]

    async def verify(self, source: Path) -> None:
        """All is whole, and the latest snapshot is the source."""
        async with self.open() as repository:
            assert (await repository.check()).clean
        async with self.open() as repository:
            snapshot = await repository.find_snapshot("latest")
            target = self.home / "verified"
            summary = await repository.restore(snapshot, bytes(target))
            assert not summary.errors
        assert contents(target) == contents(source)
        shutil.rmtree(target)
        assert not await self.names("leases/")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(check_packs, "OPEN_WORKERS", 1)
    monkeypatch.setattr(restore, "OPEN_WORKERS", 1)
    return Storage(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than the slabs hold, and some packs; attributes so large that the scan stores them as chunks."""
    made = make_source(tmp_path_factory.mktemp("source"), files=700, large_bytes=20 << 20)
    rng = random.Random(SEED)
    for number in range(200):
        folder = made / "attributes" / str(number)
        folder.mkdir(parents=True)
        with suppress(OSError):
            os.setxattr(folder, "user.large", rng.randbytes(900))
    return made


def delay(monkeypatch: pytest.MonkeyPatch, seed: str, longest_s: float) -> None:
    """Random waits in every stage: at each channel, where workers answer, and in the threads that seal and scan."""
    rng = random.Random(seed)

    def slowly(owner: type, name: str) -> None:
        original: Callable[..., Awaitable[Any]] = getattr(owner, name)

        async def late(*arguments: Any, **options: Any) -> Any:
            if rng.random() < 0.3:
                await anyio.sleep(rng.uniform(0, longest_s))
            return await original(*arguments, **options)

        monkeypatch.setattr(owner, name, late)

    for owner, names in (
        (Channel, ("send", "receive")),
        (ChunkPool, ("_handle", "submit")),
        (OpenPool, ("_handle", "acquire")),
        (Packer, ("make_room",)),
    ):
        for name in names:
            slowly(owner, name)
    place = Packer._place

    def place_late(self: Packer, body: Any) -> Any:
        time.sleep(rng.uniform(0, longest_s))
        return place(self, body)

    monkeypatch.setattr(Packer, "_place", place_late)

    def run_late(*arguments: Any, **options: Any) -> Run:
        run = Run(*arguments, **options)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(rng.uniform(0, longest_s))
        return run

    # In the middle of `MetaChunks.store`, which the scan's thread calls.
    monkeypatch.setattr(messages, "Run", run_late)


async def test_what_a_thread_stores_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan's thread queues a chunk while the loop takes what is queued."""
    meta = MetaChunks(bytes(32))
    taken: list[Run] = []

    def interrupted(*arguments: Any, **options: Any) -> Run:
        taken.extend(meta.runs())
        return Run(*arguments, **options)

    monkeypatch.setattr(messages, "Run", interrupted)
    for number in range(10):
        meta.store(b"%d" % number)
    taken += meta.runs()
    assert [run.view for run in taken] == [b"%d" % number for number in range(10)]


@pytest.mark.parametrize("turn", range(2 * ROUNDS))
async def test_least_of_everything(storage: Storage, source: Path, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "OPEN_SLABS", 1)
    monkeypatch.setattr(check_packs, "CHECK_SLABS", 1)
    delay(monkeypatch, f"{SEED} {turn}", 0.004)
    slow = FaultyConnector(storage.memory, seed=SEED + turn, latency_s=0.003)
    with anyio.fail_after(HANGS_S):
        async with storage.open(slow) as repository:
            summary = await repository.backup([bytes(source)], LEAST)
            assert summary.counts.errors == 0
            again = await repository.backup([bytes(source)], LEAST)
            assert again.counts.files == summary.counts.files
        await storage.verify(source)
    assert len(await storage.names("packs/")) > 5


def failing_at(number: int, error: Exception) -> Callable[[str, str], Awaitable[None]]:
    """A hook that raises at the put of a number, and at no other."""
    puts = 0

    async def hook(method: str, name: str) -> None:
        nonlocal puts
        if method == "put":
            puts += 1
            if puts - 1 == number:
                raise error

    return hook


@pytest.mark.parametrize("lost", [False, True], ids=["not done", "answer lost"])
async def test_each_put_fails(storage: Storage, tmp_path: Path, lost: bool) -> None:
    """The k-th put fails, for each k: the error is told, all ends, and nothing that was stored is lost."""
    source = make_source(tmp_path / "source", files=50, large_bytes=12 << 20)
    counting = FaultyConnector(storage.memory)
    async with storage.open(counting) as repository:
        await repository.backup([bytes(source)], LEAST)
    count = sum(method == "put" for method, _ in counting.calls)
    assert count >= 5
    for number in sorted({0, 1, count // 2, count - 3, count - 2, count - 1}):
        fresh = Storage(tmp_path)
        error = ConnectionLost("torn") if lost else StorageFull("full")
        hook = failing_at(number, error)
        torn = FaultyConnector(fresh.memory, before=None if lost else hook, after=hook if lost else None)
        with anyio.fail_after(HANGS_S):
            async with fresh.open(torn) as repository:
                try:
                    await repository.backup([bytes(source)], LEAST)
                except Exception as failure:
                    raised = failure
                else:  # what was put was found; or, since how blocks fall into packs varies, this run had fewer puts
                    assert lost or sum(method == "put" for method, _ in torn.calls) <= number
                    await fresh.verify(source)
                    continue
        assert isinstance(reported(raised), StorageError if lost else OutOfSpace)
        assert not await fresh.names("leases/")
        committed = await fresh.names("snapshots/")
        assert not committed or (lost and number == count - 1)
        if number >= count - 2:
            async with fresh.open() as repository:
                summary = await repository.backup([bytes(source)], LEAST)
                if number >= count - 2 and not lost:  # packs were indexed: they are not stored again
                    assert summary.counts.stored_bytes < 1 << 20
            await fresh.verify(source)
    assert not left_behind()


async def test_revoked(storage: Storage, source: Path) -> None:
    """Maintenance took the writer for dead: another attempt takes its work over, and commits a whole snapshot."""
    rivals = 1
    notes: list[str] = []

    async def revoke(method: str, name: str) -> None:
        nonlocal rivals
        if rivals and method == "put" and name.startswith("index/"):
            rivals -= 1
            attempt = bytes.fromhex(name.partition("/")[2].partition("-")[0])
            taken = f"snapshots/{attempt.hex()}"
            if taken in await storage.names("snapshots/"):
                return
            end = encode(End("revoked", time.time_ns()))
            body = repository.sealer.seal(sealing.END, taken, attempt, end)
            await storage.memory.put(taken, [body], if_absent=True)

    progress = Progress()
    progress.on_note = notes.append
    async with storage.open(FaultyConnector(storage.memory, before=revoke)) as repository:
        await repository.backup([bytes(source)], LEAST, progress)
    assert any("another one takes over" in note for note in notes)
    assert len(await storage.names("snapshots/")) == 2
    await storage.verify(source)

    rivals = 100
    async with storage.open(FaultyConnector(storage.memory, before=revoke)) as repository:
        (source / "fresh").write_bytes(random.Random(0).randbytes(1 << 20))
        try:
            with pytest.raises(Exception) as raised:
                await repository.backup([bytes(source)], LEAST)
        finally:
            (source / "fresh").unlink()
    assert isinstance(reported(raised.value), LeaseLost)
    await storage.verify(source)


async def test_cancelled_anywhere(storage: Storage, source: Path) -> None:
    """Cancelled at the n-th call of the storage: all ends, the lease is gone, and the next run is good."""
    rng = random.Random(SEED)
    for _ in range(3 * ROUNDS):
        at = rng.randrange(2, 20)
        calls = 0
        scope = anyio.CancelScope()

        async def cancel(method: str, name: str) -> None:
            nonlocal calls
            calls += 1
            if calls == at:  # noqa: B023 - called within this turn
                scope.cancel()  # noqa: B023

        with anyio.fail_after(HANGS_S), scope:
            async with storage.open(FaultyConnector(storage.memory, before=cancel)) as repository:
                await repository.backup([bytes(source)], LEAST)
        assert not await storage.names("leases/")
    async with storage.open() as repository:
        await repository.backup([bytes(source)], LEAST)
    await storage.verify(source)


def test_two_at_once(tmp_path: Path) -> None:
    """Two processes back up into one repository, at once, much of it the same: both snapshots are whole."""
    create(tmp_path, encrypted=False)
    program = Program(tmp_path)
    sources = [make_source(tmp_path / f"source{n}", seed=n // 2, files=300, large_bytes=24 << 20) for n in range(3)]
    for turn in range(ROUNDS):
        for number, source in enumerate(sources):
            (source / "fresh").write_bytes(random.Random(turn * 10 + number // 2).randbytes(8 << 20))
        processes = [program.start("backup", "--json", source) for source in sources]
        outcomes = [(*process.communicate(timeout=100), process.returncode) for process in processes]
        assert [code for _, _, code in outcomes] == [0, 0, 0], outcomes
        program("check")
        for number, (out, _, _) in enumerate(outcomes):
            snapshot = json.loads(out.splitlines()[-1])["snapshot_id"]
            program("restore", snapshot, "--to", tmp_path / "target")
            assert contents(tmp_path / "target") == contents(sources[number])
            shutil.rmtree(tmp_path / "target")
