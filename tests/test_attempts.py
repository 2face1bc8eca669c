"""Attempts: rivals in one process, objects that vanish, lie or are too large, and answers that are lost."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import time
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest
from tests.fault_harness import contents, make_source
from tests.harness import Recorder, repository

from coffret.connectors.base import ObjectInfo
from coffret.connectors.errors import AlreadyExists, ConnectionLost, StorageFull
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.memory import MemoryConnector
from coffret.engine import configuration, keys, objects, sealing
from coffret.engine.attempt import Attempt
from coffret.engine.errors import Damaged, LeaseLost, OutOfSpace, reported
from coffret.engine.index import IndexWriter
from coffret.engine.known import KnownChunks
from coffret.engine.mirror import Mirror
from coffret.engine.objects import put_once
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.pipeline import Limits
from coffret.engine.records import Block, End, IndexObject, PackTable, encode, pack_ref
from coffret.engine.repository import OpenOptions, Repository
from coffret.engine.snapshot import Snapshot, seal_snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coffret.connectors.base import Connector

pytestmark = pytest.mark.anyio

ONE_WORKER = BackupOptions(limits=Limits(workers=1))


_mirrors: list[Mirror] = []


@pytest.fixture(autouse=True)
async def _mirrors_are_closed() -> AsyncIterator[None]:
    yield
    while _mirrors:
        await _mirrors.pop().close()


class Storage:
    """A repository in memory, as several machines see it: each opens it with a mirror of its own."""

    def __init__(self) -> None:
        self.secrets = keys.new_secrets(encrypted=True)
        self.config = configuration.new_config(self.secrets)
        self.memory = MemoryConnector()

    async def open(self, connector: Connector | None = None, folder: Path | None = None) -> Repository:
        mirror = await Mirror.open(folder, self.config.repository_id)
        _mirrors.append(mirror)
        data = configuration.config_bytes(self.config)
        inner = connector or self.memory
        return Repository(inner, data, self.secrets, mirror, slot_id="", options=OpenOptions(), notes=[], writing=True)

    async def names(self, prefix: str) -> list[str]:
        return [info.name async for info in self.memory.list(prefix)]

    async def revoke(self, attempt: str) -> None:
        opened = await self.open()
        name = f"snapshots/{attempt}"
        body = opened.sealer.seal(sealing.END, name, os.urandom(16), encode(End("revoked", time.time_ns())))
        await self.memory.put(name, [body], if_absent=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", files=20, large_bytes=1 << 20)


async def restores(storage: Storage, source: Path, opened: Repository | None = None) -> bool:
    """Whether the latest snapshot is the source."""
    opened = opened or await storage.open()
    target = source.parent / f"target{random.getrandbits(64)}"
    summary = await opened.restore(await opened.find_snapshot("latest"), bytes(target))
    return not summary.errors and contents(target) == contents(source)


async def test_two_backups_through_one_repository(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One relies on what the other has stored and not committed; then that one's index objects are void."""
    storage = Storage()
    stored, relied, order = anyio.Event(), anyio.Event(), dict[str, bytes]()
    begin, commit = Attempt.begin, Attempt.commit

    async def begin_in_turn(attempt: Attempt, **options: bool) -> None:
        who = anyio.get_current_task().name
        order.setdefault(str(who), attempt.id)
        await begin(attempt, **options)
        if who == "late":
            await stored.wait()

    async def commit_in_turn(attempt: Attempt, snapshot: Snapshot) -> None:
        if attempt.id == order["lost"]:
            stored.set()
            await relied.wait()
            raise StorageFull("it never commits")
        await commit(attempt, snapshot)

    monkeypatch.setattr(Attempt, "begin", begin_in_turn)
    monkeypatch.setattr(Attempt, "commit", commit_in_turn)
    opened = await storage.open()

    async def lose() -> None:
        with pytest.raises(Exception) as raised:
            await opened.backup([bytes(source)], ONE_WORKER)
        assert isinstance(reported(raised.value), OutOfSpace)

    async def win() -> None:
        await opened.backup([bytes(source)], ONE_WORKER)
        relied.set()

    async with anyio.create_task_group() as group:
        group.start_soon(win, name="late")
        group.start_soon(lose, name="lost")
    await storage.revoke(order["lost"].hex())
    assert await restores(storage, source)


async def test_a_repository_restores_what_it_has_just_backed_up(source: Path) -> None:
    opened = await Storage().open()
    assert not (await opened.commits()).snapshots
    await opened.backup([bytes(source)], ONE_WORKER)
    assert await restores(Storage(), source, opened)


async def test_a_snapshot_is_committed_while_a_reader_lists(source: Path) -> None:
    """What is listed can be restored, whichever listing it comes between."""
    for prefix in ("snapshots/", "index/", "removed/", "packs/"):
        storage, done = Storage(), list[str]()

        async def commit_now(method: str, name: str, before: str = prefix, done: list[str] = done) -> None:
            if method == "list" and name == before and not done:
                done.append(name)
                await (await storage.open()).backup([bytes(source)], ONE_WORKER)  # noqa: B023 - called at once

        reader = await storage.open(FaultyConnector(storage.memory, before=commit_now))
        found = (await reader.commits()).snapshots
        assert done
        assert len(found) == (prefix == "snapshots/")
        if found:
            assert await restores(storage, source, reader)


async def test_a_parent_is_committed_while_a_writer_lists(source: Path) -> None:
    """Its index objects were not listed: they are, once more, before the parent is given up."""
    storage, done = Storage(), list[str]()

    async def commit_now(method: str, name: str) -> None:
        if method == "list" and name == "snapshots/" and not done:
            done.append(name)
            await (await storage.open()).backup([bytes(source)], ONE_WORKER)

    recorder = Recorder()
    writer = await storage.open(FaultyConnector(storage.memory, before=commit_now))
    summary = await writer.backup([bytes(source)], ONE_WORKER, recorder)
    assert summary.snapshot.header.parent
    assert not recorder.notes
    assert await restores(storage, source)


async def test_an_index_object_vanishes_between_listing_and_reading(source: Path) -> None:
    storage = Storage()
    await (await storage.open()).backup([bytes(source)], ONE_WORKER)
    [name] = await storage.names("index/")
    body = await storage.memory.get(name)

    async def merge_away(method: str, asked: str) -> None:
        if method == "get" and asked == name:  # as maintenance will do: the new one first
            await storage.memory.delete(name)

    reader = await storage.open(FaultyConnector(storage.memory, before=merge_away))
    assert len((await reader.commits()).snapshots) == 1
    assert not reader.mirror.objects
    await storage.memory.put(name, [body])
    assert await restores(storage, source)


def planted(kind: str, opened: Repository) -> tuple[str, bytes]:
    """(name, body) of an index object that authenticates, and is malformed inside."""
    pack, header, good = os.urandom(32), bytes(64), pack_ref(os.urandom(32), 10)
    tables = {
        "size": PackTable(pack, header, -1, []),
        "pack": PackTable(b"short", header, 1, []),
        "header": PackTable(pack, b"short", 1, []),
        "offset": PackTable(pack, header, 1, [Block(1 << 32, 20, 10, 0, good)]),
        "negative": PackTable(pack, header, 1, [Block(64, -20, 10, 0, good)]),
        "raw": PackTable(pack, header, 1, [Block(64, 20, 1 << 30, 0, good)]),
        "codec": PackTable(pack, header, 1, [Block(64, 20, 10, 7, good)]),
        "refs": PackTable(pack, header, 1, [Block(64, 20, 10, 0, good[:-1])]),
        "length": PackTable(pack, header, 1, [Block(64, 20, 9, 0, good)]),
    }
    attempt = os.urandom(16)
    name = f"index/{attempt.hex()}-0"
    return name, opened.sealer.seal(sealing.INDEX, name, attempt, encode(IndexObject([tables[kind]])))


@pytest.mark.parametrize("kind", ["size", "pack", "header", "offset", "negative", "raw", "codec", "refs", "length"])
async def test_a_malformed_index_object_is_left_out(source: Path, kind: str) -> None:
    storage = Storage()
    opened = await storage.open()
    name, body = planted(kind, opened)
    await storage.memory.put(name, [body])
    recorder = Recorder()
    await opened.backup([bytes(source)], ONE_WORKER, recorder)
    assert any(name in note for note in recorder.notes)
    reader = await storage.open()
    await reader.commits()
    assert [note for note in reader.notes if name in note]
    assert await restores(storage, source)


class Huge(FaultyConnector):
    """A storage in which one object is listed with an absurd size; to get it whole is to run out of memory."""

    def __init__(self, inner: Connector, name: str, size_bytes: int) -> None:
        super().__init__(inner)
        self._huge, self._size_bytes = name, size_bytes

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        async for info in super().list(prefix):
            yield ObjectInfo(info.name, self._size_bytes, info.mtime_s) if info.name == self._huge else info

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        assert name != self._huge
        return await super().get(name, offset=offset, length=length)


@pytest.mark.parametrize(
    ("name", "limit_bytes"),
    [
        ("snapshots/" + "01" * 16, objects.MAX_SNAPSHOT_BYTES),
        ("index/" + "01" * 16 + "-0", objects.MAX_INDEX_BYTES),
    ],
)
async def test_an_object_of_absurd_size_is_left_out(source: Path, name: str, limit_bytes: int) -> None:
    storage = Storage()
    await storage.memory.put(name, [b"as large as it may be"])
    reader = await storage.open(Huge(storage.memory, name, limit_bytes + 1))
    await reader.commits()
    assert [note for note in reader.notes if name in note and "more than any" in note]
    await reader.backup([bytes(source)], ONE_WORKER)
    assert await restores(storage, source, reader) if name.startswith("index") else True


async def test_a_mark_of_absurd_size_is_damage(source: Path) -> None:
    storage = Storage()
    await storage.memory.put("trash/1", [b"a mark"])
    writer = await storage.open(Huge(storage.memory, "trash/1", objects.MAX_MARK_BYTES + 1))
    with pytest.raises(Exception) as raised:
        await writer.backup([bytes(source)], ONE_WORKER)
    assert isinstance(reported(raised.value), Damaged)


async def test_large_objects_are_fetched_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_TOGETHER_BYTES", 10)
    infos = [ObjectInfo(str(n), size, 0.0) for n, size in enumerate((1, 1, 1, 9, 1, 1, 30, 5, 5))]
    batches = [[info.size_bytes for info in batch] for batch in objects.batches(infos, 3)]
    assert batches == [[1, 1, 1], [9, 1], [1], [30], [5, 5]]


async def test_a_parent_that_is_malformed_is_not_compared_with(source: Path) -> None:
    storage = Storage()
    opened = await storage.open()
    first = (await opened.backup([bytes(source)], ONE_WORKER)).snapshot
    header = msgspec.structs.replace(first.header, snapshot_id=os.urandom(16), depth=99, time_ns=time.time_ns())
    planted = Snapshot(os.urandom(16), header)
    await storage.memory.put(f"snapshots/{planted.attempt.hex()}", [seal_snapshot(opened.sealer, planted)])
    recorder = Recorder()
    summary = await opened.backup([bytes(source)], ONE_WORKER, recorder)
    assert not summary.snapshot.header.parent
    assert any("all files are" in note for note in recorder.notes)
    assert await restores(storage, source)


@pytest.mark.parametrize("how", ["kept", "full"])
async def test_the_lease_can_t_be_deleted(source: Path, how: str) -> None:
    """That is told; it hides neither the snapshot nor what went wrong before."""
    storage = Storage()

    async def fail(method: str, name: str) -> None:
        if method == "delete":
            raise ConnectionLost("no answer")
        if how == "full" and method == "put" and name.startswith("packs/"):
            raise StorageFull("full")

    opened, recorder = await storage.open(FaultyConnector(storage.memory, before=fail)), Recorder()
    if how == "full":
        with pytest.raises(Exception) as raised:
            await opened.backup([bytes(source)], ONE_WORKER, recorder)
        assert isinstance(reported(raised.value), OutOfSpace)
    else:
        await opened.backup([bytes(source)], ONE_WORKER, recorder)
        assert await restores(storage, source)
    assert any("lease" in note for note in recorder.notes)


async def test_a_lost_answer_is_decided_by_the_bytes() -> None:
    memory = MemoryConnector()
    lose = True

    async def lost(method: str, name: str) -> None:
        if method == "put" and lose:
            raise ConnectionLost("no answer")

    after, before = FaultyConnector(memory, after=lost), FaultyConnector(memory, before=lost)
    await put_once(after, "index/a-0", b"mine")
    await put_once(memory, "index/a-0", b"mine")
    for connector in (after, memory, before):
        for other in (b"another's", b"mine, too", b"min"):
            with pytest.raises(AlreadyExists):
                await put_once(connector, "index/a-0", other)
    with pytest.raises(ConnectionLost):
        await put_once(before, "index/b-0", b"mine")
    assert await memory.get("index/a-0") == b"mine"


@pytest.mark.parametrize("kind", ["index/", "snapshots/"])
async def test_a_put_whose_answer_is_lost_is_no_failure(source: Path, kind: str) -> None:
    storage = Storage()

    async def lost(method: str, name: str) -> None:
        if method == "put" and name.startswith(kind):
            raise ConnectionLost("no answer")

    opened = await storage.open(FaultyConnector(storage.memory, after=lost))
    await opened.backup([bytes(source)], ONE_WORKER)
    assert len(await storage.names("snapshots/")) == 1
    assert await restores(storage, source)


async def test_a_revoked_writer_counts_anew(source: Path) -> None:
    storage, revoked = Storage(), list[str]()

    async def revoke(method: str, name: str) -> None:
        if method == "put" and name.startswith("snapshots/") and not revoked:
            revoked.append(name)
            await storage.revoke(name.partition("/")[2])

    told = Recorder()
    plain = (await (await Storage().open()).backup([bytes(source)], ONE_WORKER, told)).counts
    opened, recorder = await storage.open(FaultyConnector(storage.memory, before=revoke)), Recorder()
    counts = (await opened.backup([bytes(source)], ONE_WORKER, recorder)).counts
    assert revoked
    assert (counts.read_bytes, counts.new, counts.files) == (plain.read_bytes, plain.new, plain.files)
    for name in ("files", "entries", "size_bytes", "read_bytes", "new", "unmodified", "errors"):
        assert getattr(recorder, name) == getattr(told, name), name


async def test_the_lease_is_refreshed_while_the_repository_is_listed(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing and fetching a large index may take longer than a lease lasts."""
    monkeypatch.setattr("coffret.engine.attempt.LEASE_REFRESH_S", 0.001)
    storage, puts = Storage(), list[str]()

    async def watch(method: str, name: str) -> None:
        if method == "put" and name.startswith("leases/"):
            puts.append(name)
        if method == "list" and name == "index/":
            before = len(puts)
            with anyio.fail_after(60):
                while len(puts) < before + 2:  # noqa: ASYNC110
                    await anyio.sleep(0.001)

    opened = await storage.open(FaultyConnector(storage.memory, before=watch))
    await opened.backup([bytes(source)], ONE_WORKER)


async def test_latest_is_not_silently_an_older_one(source: Path) -> None:
    storage = Storage()
    first = (await (await storage.open()).backup([bytes(source)], ONE_WORKER)).snapshot
    second = (await (await storage.open()).backup([bytes(source)], ONE_WORKER)).snapshot
    names = [f"snapshots/{snapshot.attempt.hex()}" for snapshot in (first, second)]
    times = dict(zip(names, (100.0, 200.0), strict=True))
    bodies = {name: await storage.memory.get(name) for name in times}
    for damaged, other in ((names[1], first), (names[0], second)):
        for name, body in bodies.items():
            storage.memory.clock = lambda name=name: times[name]  # type: ignore[misc]
            await storage.memory.put(name, [body[:-1] + b"?" if name == damaged else body])
        opened = await storage.open()
        assert (await opened.find_snapshot(other.short_id)).id == other.id
        if damaged == names[1]:
            with pytest.raises(Damaged, match=damaged) as raised:
                await opened.find_snapshot("latest")
            assert "id" in raised.value.remedy
        else:
            assert (await opened.find_snapshot("latest")).id == other.id


async def test_listed_headers_are_light(source: Path) -> None:
    storage = Storage()
    made = await (await storage.open()).backup([bytes(source), bytes(source / "not there")], ONE_WORKER)
    assert len(made.snapshot.header.faults) == 1
    opened = await storage.open()
    [snapshot] = (await opened.commits()).snapshots
    assert not snapshot.header.faults
    assert await opened.faults(snapshot) == made.snapshot.header.faults


def adoptable(chunks: int) -> tuple[list[bytes], IndexObject]:
    """Ids of chunks, and an index object that locates them."""
    refs = [pack_ref(os.urandom(32), 10) for _ in range(chunks)]
    blocks = [
        Block(64 + at, 500, 10 * len(refs[at : at + 50]), 0, b"".join(refs[at : at + 50]))
        for at in range(0, chunks, 50)
    ]
    return refs, IndexObject([PackTable(os.urandom(32), bytes(64), 10_000, blocks)])


@pytest.mark.parametrize("by", ["number", "time"])
async def test_what_is_adopted_is_published_in_time(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though no pack comes: an unchanged source after a run that was killed."""
    from coffret.engine import index as module

    monkeypatch.setattr(module, "INDEX_EVERY_CHUNKS", 100 if by == "number" else 1 << 30)
    monkeypatch.setattr(module, "INDEX_EVERY_S", 1e9 if by == "number" else 0.0)
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.001)
    storage, opened = Storage(), await Storage().open()
    refs, index = adoptable(1000)
    await opened.mirror.reconcile(["index/" + "01" * 16 + "-0"])
    await opened.mirror.merge([("index/" + "01" * 16 + "-0", index)])
    known = KnownChunks(opened.mirror, marked=frozenset())
    writer = IndexWriter(storage.memory, opened.sealer, b"2" * 16, mirror=opened.mirror, known=known)
    most = 0
    for at in range(0, len(refs), 50):
        assert not any(await known.claim(b"".join(refs[at : at + 50])))
        most = max(most, len(known.adopted))
        if by == "number":
            await writer.relieve()
    if by == "number":
        assert most <= 100
        assert len(await storage.names("index/")) == 10
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(writer.keep)
            with anyio.fail_after(60):
                while known.adopted or not await storage.names("index/"):  # noqa: ASYNC110
                    await anyio.sleep(0.001)
            group.cancel_scope.cancel()


async def test_what_is_adopted_survives_a_failed_put() -> None:
    storage, opened = Storage(), await Storage().open()
    refs, index = adoptable(10)
    await opened.mirror.reconcile(["index/" + "01" * 16 + "-0"])
    await opened.mirror.merge([("index/" + "01" * 16 + "-0", index)])
    known = KnownChunks(opened.mirror, marked=frozenset())
    full = True

    async def fail(method: str, name: str) -> None:
        if full and method == "put":
            raise StorageFull("full")

    connector = FaultyConnector(storage.memory, before=fail)
    writer = IndexWriter(connector, opened.sealer, b"2" * 16, mirror=opened.mirror, known=known)
    await known.claim(b"".join(refs))
    with pytest.raises(StorageFull):
        await writer.flush()
    assert len(known.adopted) == 10
    full = False
    await writer.flush()
    assert len(await storage.names("index/")) == 1
    assert not known.adopted


async def test_a_dry_run_remembers_no_more_than_so_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coffret.engine.known.MAX_CLAIMED", 100)
    opened = await Storage().open()
    known = KnownChunks(opened.mirror, marked=frozenset())
    for _ in range(50):
        assert all(await known.claim(b"".join(pack_ref(os.urandom(32), 1) for _ in range(50))))
        assert len(known._claimed) <= 150


async def test_cancelled_by_asyncio_s_own_means(tmp_path: Path, source: Path) -> None:
    """At any moment, also while the mirror merges: the task ends by being cancelled, and all that follows works."""
    rng = random.Random(7)
    for turn in range(8):
        (source / "fresh").write_bytes(rng.randbytes(300_000))
        async with repository(tmp_path) as opened:
            task = asyncio.ensure_future(opened.backup([bytes(source)], ONE_WORKER))
            for _ in range(rng.randrange(1, 400) if turn % 2 else 5 * turn):
                await asyncio.sleep(0)
            await asyncio.sleep(rng.uniform(0, 0.1))
            task.cancel()
            [ended] = await asyncio.gather(task, return_exceptions=True)
            assert not isinstance(ended, BaseException) or isinstance(ended, asyncio.CancelledError), ended
    async with repository(tmp_path) as opened:
        await opened.backup([bytes(source)], ONE_WORKER)
        assert await restores(Storage(), source, opened)


async def test_a_step_of_the_mirror_is_over_when_its_task_is_cancelled(tmp_path: Path) -> None:
    """Else its generator would be closed while a thread is in it."""
    import threading

    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def step() -> None:
        begun.set()
        go_on.wait(60)
        ended.set()

    async with await Mirror.open(tmp_path, "repository") as mirror:
        task = asyncio.ensure_future(mirror._alone(step))
        while not begun.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()


async def test_another_process_does_not_let_go_of_the_cache(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped one, say: that is told, and the run goes on without the cache."""
    monkeypatch.setattr("coffret.engine.mirror_store.LOCK_WAIT_S", 0.05)
    storage, folder = Storage(), tmp_path / "mirror"
    await (await storage.open()).backup([bytes(source)], ONE_WORKER)
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        opened, recorder = await storage.open(folder=folder), Recorder()
        assert await restores(storage, source, opened)
        assert [note for note in opened.notes if "another process" in note]
        (source / "fresh").write_bytes(os.urandom(10_000))
        other = await storage.open(folder=folder)
        await other.backup([bytes(source)], ONE_WORKER, recorder)
        assert [note for note in recorder.notes if "another process" in note]
        await opened.mirror.close()
    assert await restores(storage, source)
    assert {path.name for path in folder.iterdir()} == {"lock"}


async def test_lease_lost_again_and_again(source: Path) -> None:
    storage = Storage()

    async def revoke(method: str, name: str) -> None:
        if method == "put" and name.startswith("snapshots/"):
            await storage.revoke(name.partition("/")[2])

    opened = await storage.open(FaultyConnector(storage.memory, before=revoke))
    with pytest.raises(Exception) as raised:
        await opened.backup([bytes(source)], ONE_WORKER)
    assert isinstance(reported(raised.value), LeaseLost)
    assert len(await storage.names("snapshots/")) == 3
