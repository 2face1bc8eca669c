"""The original is not at rest while it is cloned: maintenance replaces and deletes, backups add."""

from __future__ import annotations

import itertools
import os
import random
from typing import TYPE_CHECKING

import pytest
from tests.copies.storages import GOLDEN, Places, to_copy
from tests.fault_harness import make_source

from coffret.engine import sealing
from coffret.engine.creation import create_repository
from coffret.engine.errors import CoffretError
from coffret.engine.index import index_name, open_index
from coffret.engine.opening import open_repository
from coffret.engine.packfile import PackBuilder, pack_name
from coffret.engine.records import End, IndexObject, PackTable, encode, iter_refs
from coffret.engine.snapshot import load_commits, snapshot_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coffret.connectors.base import ObjectInfo
    from coffret.connectors.memory import MemoryConnector
    from coffret.engine.sealing import Sealer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def sealer_of(places: Places) -> Sealer:
    async with open_repository("r:", options=places.options) as opened:
        return opened.sealer


async def moved(storage: MemoryConnector, sealer: Sealer, attempt: bytes, table: PackTable) -> PackTable:
    """Put the blocks of a pack into a new one."""
    builder = PackBuilder(memoryview(bytearray(1 << 20)), sealer, attempt)
    old = sealer.cipher(table.header, sealing.PACK)
    for block in table.blocks:
        stored = await storage.get(pack_name(table.pack), offset=block.offset, length=block.stored_bytes)
        body = bytes(old.open(stored, block.offset))
        offset = builder.reserve(len(body), block.raw_bytes, block.codec, block.refs)
        assert offset is not None
        builder.seal(body, offset)
    pack, length = builder.finish()
    await storage.put(pack_name(pack), [builder.buffer[:length]])
    return PackTable(pack, builder.header, length, builder.blocks)


async def maintain(storage: MemoryConnector, sealer: Sealer, attempt: bytes = b"") -> None:
    """All chunks move to other packs, by the rules of docs/format.md: packs, index, commit, and only then deletions."""
    attempt, revoked = attempt or os.urandom(16), (await load_commits(storage, sealer)).revoked
    tables: dict[bytes, PackTable] = {}
    names = [info.name async for info in storage.list("index/") if info.name[6:38] not in revoked]
    for name in names:
        for table in open_index(sealer, name, await storage.get(name)).packs:
            # What names chunks anew names a part of the others.
            if all(any(chunk_id) for block in table.blocks for chunk_id, _ in iter_refs(block.refs)):
                tables[table.pack] = table
    fresh = [await moved(storage, sealer, attempt, table) for table in tables.values()]
    for kind, name, payload in (
        (sealing.INDEX, index_name(attempt, 0), encode(IndexObject(fresh))),
        (sealing.END, snapshot_name(attempt), encode(End("maintained", 1))),
    ):
        await storage.put(name, [sealer.seal(kind, name, attempt, payload)], if_absent=True)
    for name in [*names, *map(pack_name, tables)]:
        await storage.delete(name)


async def test_maintenance_at_any_moment(places: Places) -> None:
    """Once, or twice, before any call to the original: of each snapshot in the copy everything is there."""
    places.load("r:", GOLDEN / "clear")
    storage, sealer = places.storages["r:"], await sealer_of(places)
    wanted, golden, chance = await places.snapshots("r:"), places.objects("r:"), random.Random(1)
    anew = 0
    for first in itertools.count(1, 2):
        storage._objects.clear()
        places.load("r:", GOLDEN / "clear")
        calls, moments = itertools.count(), {first, first + chance.randrange(40)}

        async def hook(
            method: str, name: str, calls: itertools.count[int] = calls, moments: set[int] = moments
        ) -> None:
            if next(calls) in moments:
                await maintain(storage, sealer)

        places.faults = {"r:": {"before": hook}}
        _, told = await places.clone("r:", f"x{first}:")
        places.faults = {}
        assert await places.snapshots(f"x{first}:") == wanted
        anew += any("listed anew" in note for note in told.notes)
        if next(calls) <= first:
            break
    assert anew > 5
    assert places.objects("r:") == golden  # the last one ended before its moment


async def test_maintenance_while_the_index_is_listed(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing goes by what is there as it comes to it: it may see neither what is replaced nor what replaces it."""
    places.load("r:", GOLDEN / "clear")
    storage, sealer = places.storages["r:"], await sealer_of(places)
    wanted = await places.snapshots("r:")
    seen = 0

    async def listing(self: MemoryConnector, prefix: str) -> AsyncIterator[ObjectInfo]:
        nonlocal seen
        last = ""
        if self is storage and prefix == "index/":
            seen += 1
            if seen == 1:
                await maintain(storage, sealer, bytes(16))
                last = index_name(bytes(16), 0)  # the listing was there before it was put
        while names := [name for name in self._objects if name.startswith(prefix) and name > last]:
            last = min(names)
            yield await self.stat(last)

    monkeypatch.setattr("coffret.connectors.memory.MemoryConnector.list", listing)
    await places.clone("r:", "x:")
    assert seen == 3  # the clone, maintenance, and the clone anew
    assert await places.snapshots("x:") == wanted


async def test_one_that_never_comes_to_rest(places: Places) -> None:
    places.load("r:", GOLDEN / "clear")
    storage, sealer = places.storages["r:"], await sealer_of(places)

    async def hook(method: str, name: str) -> None:
        if (method, name) == ("list", "packs/"):
            await maintain(storage, sealer)

    places.faults = {"r:": {"before": hook}}
    with pytest.raises(CoffretError, match="changes without end"):
        await places.clone("r:", "x:")
    assert "config" not in places.objects("x:")
    places.faults = {}
    await places.clone("r:", "x:")
    assert places.objects("r:").items() <= places.objects("x:").items()
    assert await places.snapshots("x:", fast=False) == await places.snapshots("r:")


async def test_an_interrupted_one_after_maintenance(places: Places) -> None:
    """What the first run copied, and is no more in the original, stays, and harms nobody."""
    places.load("r:", GOLDEN / "clear")
    sealer = await sealer_of(places)

    async def stop(method: str, name: str) -> None:
        if method == "put" and name.startswith("removed/"):
            raise RuntimeError

    places.faults = {"x:": {"before": stop}}
    with pytest.raises(ExceptionGroup):
        await places.clone("r:", "x:")
    places.faults = {}
    await maintain(places.storages["r:"], sealer)
    _, told = await places.clone("r:", "x:")
    assert "has objects that the original has not" in told.notes[0]
    assert await places.snapshots("x:", fast=False) == await places.snapshots("r:")


@pytest.mark.parametrize("moment", ["list:packs/", "get_into:packs/", "list:snapshots/"])
async def test_backups_meanwhile(places: Places, tmp_path: Path, moment: str) -> None:
    """They are not in the way, and the next clone has them."""
    source = os.fsencode(make_source(tmp_path / "source", files=20, large_bytes=1 << 20))
    await create_repository("r:", passphrase=b"golden", options=places.options)
    made: list[str] = []
    async with open_repository("r:", passphrase=lambda: b"golden", options=places.options) as opened:

        async def backup() -> None:
            (tmp_path / "source" / f"fresh{len(made)}").write_bytes(os.urandom(100_000))
            snapshot = (await opened.backup([source])).snapshot
            assert snapshot is not None
            made.append(snapshot.id)

        async def hook(method: str, name: str) -> None:
            if f"{method}:{name}".startswith(moment) and len(made) < 3:
                await backup()

        await backup()
        places.faults = {"r:": {"before": hook}}
        await places.clone("r:", "x:")
        places.faults = {}
    assert len(made) > 1
    assert made[0] in await places.snapshots("x:")
    assert {*made} >= {*await places.snapshots("x:")}
    await places.clone("r:", "x:")
    assert places.objects("x:") == to_copy(places.objects("r:"))
    assert {*await places.snapshots("x:", fast=False)} == {*made}
