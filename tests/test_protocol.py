"""What a backup owes to others at work on the repository: the order of its calls, marks it heeds, a lease it keeps."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.fault_harness import NOTHING_SEEN, contents, make_source

from coffret.connectors.errors import ConnectionLost
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.memory import MemoryConnector
from coffret.engine import configuration, keys, sealing
from coffret.engine.mirror import Mirror
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.pipeline import Limits
from coffret.engine.records import Mark, encode
from coffret.engine.repository import Repository

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

PLAIN = BackupOptions(limits=Limits(workers=1))
FORCED = BackupOptions(limits=Limits(workers=1), force=True)


class Storage:
    """A repository in memory, seen through a connector that records every call."""

    def __init__(self, mirror: Mirror) -> None:
        self.memory = MemoryConnector()
        self.connector = FaultyConnector(self.memory)
        secrets = keys.new_secrets(encrypted=True)
        config = configuration.new_config(secrets)
        data = configuration.config_bytes(config)
        self.opened = Repository(
            self.connector, data, secrets, mirror, slot_id="", options=NOTHING_SEEN, notes=[], writing=True
        )

    async def names(self, prefix: str) -> list[str]:
        return [info.name async for info in self.memory.list(prefix)]

    async def mark(self, packs: list[str], *, done: bool = False) -> None:
        """What maintenance puts before it sweeps packs, and when it has."""
        ids = b"".join(bytes.fromhex(name.rpartition("/")[2]) for name in packs)
        body = self.opened.sealer.seal(sealing.MARK, "trash/1", os.urandom(16), encode(Mark(ids)))
        await self.memory.put("trash/1", [body])
        if done:
            await self.memory.put("trash/1-done", [b""])


@pytest.fixture
async def storage() -> AsyncIterator[Storage]:
    async with await Mirror.open(None, "a repository") as mirror:
        yield Storage(mirror)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that counts as old: nothing of it is read again for being fresh."""
    monkeypatch.setattr("coffret.engine.settings.RACY_NS", 0)
    return make_source(tmp_path / "source", files=20, large_bytes=1 << 20)


async def test_the_order_of_calls(storage: Storage, source: Path) -> None:
    """Lease; trash, index and snapshots as they are then; packs, their index, the snapshot; and the lease is gone."""

    async def listed(method: str, name: str) -> None:
        if method == "list":
            assert len(await storage.names("leases/")) == 1, "not announced"

    storage.connector.before = listed
    await storage.opened.backup([bytes(source)], PLAIN)
    order = dict.fromkeys(f"{method} {name.partition('/')[0]}" for method, name in storage.connector.calls)
    expected = ["put leases", "list trash", "list index", "list snapshots"]
    assert [call for call in order if call in expected] == expected
    writes = [f"{method} {name.partition('/')[0]}" for method, name in storage.connector.calls if method != "list"]
    assert writes[0] == "put leases"
    assert writes[-3:] == ["put index", "put snapshots", "delete leases"]
    assert set(writes[1:-3]) == {"put packs"}


@pytest.mark.parametrize("options", [PLAIN, FORCED], ids=["with a parent", "without one"])
@pytest.mark.parametrize("done", [False, True], ids=["open", "done"])
async def test_what_is_marked_is_not_believed(
    storage: Storage, source: Path, options: BackupOptions, done: bool
) -> None:
    """While a mark is open its packs may go at any time: all that only they hold is stored again."""
    await storage.opened.backup([bytes(source)], PLAIN)
    packs, indexes = await storage.names("packs/"), await storage.names("index/")
    await storage.mark(packs, done=done)
    await storage.opened.backup([bytes(source)], options)
    if done:
        # But for a page of the catalog: a directory above the source may have changed meanwhile.
        assert len({*await storage.names("packs/")} - {*packs}) < 2 <= len(packs)
        return
    for name in (*packs, *indexes):
        await storage.memory.delete(name)
    async with await Mirror.open(None, "another's view") as mirror:
        storage.opened.mirror = mirror
        target = source.parent / "target"
        summary = await storage.opened.restore(await storage.opened.find_snapshot("latest"), bytes(target))
        assert not summary.errors
        assert contents(target) == contents(source)


@pytest.mark.parametrize("during", ["list index/", "put packs/", "put snapshots/"])
async def test_the_lease_is_refreshed(
    storage: Storage, source: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """From the beginning to the end, under one name, though a refresh may fail."""
    monkeypatch.setattr("coffret.engine.attempt.LEASE_REFRESH_S", 0.001)
    puts: list[str] = []
    seen: list[str] = []

    async def watch(method: str, name: str) -> None:
        if method == "put" and name.startswith("leases/"):
            puts.append(name)
            if len(puts) % 2 == 0:
                raise ConnectionLost("no answer")
        elif f"{method} {name}".startswith(during) and not seen:
            seen.append(name)
            before = len(puts)
            with anyio.fail_after(60):
                while len(puts) < before + 3:  # noqa: ASYNC110
                    await anyio.sleep(0.001)

    storage.connector.before = watch
    await storage.opened.backup([bytes(source)], PLAIN)
    assert seen
    assert len(set(puts)) == 1
    assert not await storage.names("leases/")
