"""Attempts: what is adopted from those that did not end is published, in time."""

from __future__ import annotations

import os

import anyio
import pytest
from tests.attempts.storage import Storage

from coffret.connectors.errors import StorageFull
from coffret.connectors.faults import FaultyConnector
from coffret.engine.index import IndexWriter
from coffret.engine.known import KnownChunks
from coffret.engine.records import Block, IndexObject, PackTable, pack_ref

pytestmark = pytest.mark.anyio


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
