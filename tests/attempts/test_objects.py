"""Attempts: objects that vanish, lie or are too large, and answers that are lost."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.attempts.storage import ONE_WORKER, Storage, restores
from tests.harness import Recorder

from coffret.connectors.base import ObjectInfo
from coffret.connectors.errors import AlreadyExists, ConnectionLost
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.memory import MemoryConnector
from coffret.engine import objects, sealing
from coffret.engine.errors import Damaged, reported
from coffret.engine.objects import put_once
from coffret.engine.records import Block, IndexObject, PackTable, encode, pack_ref
from coffret.engine.snapshot import Snapshot, seal_snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coffret.connectors.base import Connector
    from coffret.engine.repository import Repository

pytestmark = pytest.mark.anyio


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
