"""The local cache of sealed objects and blocks: bounded, shared, and never in the way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import pytest

from coffret.engine.storecache import MAX_ITEM_BYTES, StoreCache, block_key

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
MIB = 1 << 20


async def test_what_was_kept_is_found_again(tmp_path: Path) -> None:
    items: dict[str, bytes | memoryview] = {"snapshots/a": b"1", block_key(b"\1" * 32, 64): memoryview(b"22")}
    cache = StoreCache(tmp_path / "deep" / "cache.db")
    assert await cache.get(["snapshots/a"]) == {}
    await cache.keep(items)
    await cache.close()
    other = StoreCache(tmp_path / "deep" / "cache.db")
    assert await other.get([*items, "none"]) == {name: bytes(data) for name, data in items.items()}
    assert (tmp_path / "deep" / "cache.db").stat().st_mode & 0o077 == 0
    await other.close()


async def test_it_is_bounded_and_the_oldest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("coffret.engine.storecache.time.time", lambda: now)
    cache = StoreCache(tmp_path / "cache.db", max_bytes=8 * MIB)
    names = [f"snapshots/{number}" for number in range(40)]
    for name in names:
        await cache.keep({name: os.urandom(MIB // 2)})
        now += 1
    found = await cache.get(names)
    assert 7 * MIB <= sum(map(len, found.values())) <= 8 * MIB
    assert list(found) == names[-len(found) :]
    # What is used stays.
    now += 10 * 24 * 3600
    kept, unused = list(found)[:2]
    await cache.get([kept])
    for number in range(12):
        now += 1
        await cache.keep({f"snapshots/new-{number}": os.urandom(MIB // 2)})
    assert kept in await cache.get([kept])
    assert unused not in await cache.get(names)
    await cache.close()


async def test_what_is_too_large_is_left_out(tmp_path: Path) -> None:
    cache = StoreCache(tmp_path / "cache.db")
    await cache.keep({"snapshots/large": bytes(MAX_ITEM_BYTES + 1), "snapshots/small": b"1"})
    assert list(await cache.get(["snapshots/large", "snapshots/small"])) == ["snapshots/small"]
    await cache.close()


@pytest.mark.parametrize("damage", [b"", b"not a database at all" * 100, None])
async def test_a_damaged_file_is_an_empty_cache(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "cache.db"
    cache = StoreCache(path)
    await cache.keep({f"snapshots/{n}": bytes([n]) * 5000 for n in range(100)})
    await cache.close()
    data = path.read_bytes()
    path.write_bytes(data[:8192] + b"\xff" * (len(data) - 8192) if damage is None else damage)
    for _ in range(3):
        await cache.get(["snapshots/1"])
        await cache.keep({"snapshots/1": b"again"})
    assert (await cache.get(["snapshots/1"])).get("snapshots/1") == b"again"
    await cache.close()


async def test_no_place_for_it_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = StoreCache(tmp_path / "file" / "cache.db")
    await cache.keep({"snapshots/1": b"1"})
    assert await cache.get(["snapshots/1"]) == {}
    await cache.close()


async def test_several_at_once(tmp_path: Path) -> None:
    caches = [StoreCache(tmp_path / "cache.db") for _ in range(4)]

    async def use(cache: StoreCache, number: int) -> None:
        for turn in range(20):
            await cache.keep({f"snapshots/{number}-{turn}": b"%d" % turn})
            await cache.get([f"snapshots/{turn % 4}-{turn}"])

    async with anyio.create_task_group() as group:
        for number, cache in enumerate(caches):
            group.start_soon(use, cache, number)
    found = await caches[0].get([f"snapshots/{number}-{turn}" for number in range(4) for turn in range(20)])
    assert len(found) == 80
    for cache in caches:
        await cache.close()
