"""Attempts: a revoked writer's work is committed by another attempt, unless something of it is gone."""

from __future__ import annotations

import os
import random
import shlex
from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import ONE_WORKER, Storage, restores
from tests.harness import Recorder

from coffret.connectors.faults import FaultyConnector
from coffret.engine import sealing
from coffret.engine.errors import LeaseLost, reported
from coffret.engine.records import Mark, encode
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from coffret.engine.ops.backup import BackupSummary

pytestmark = pytest.mark.anyio


class Revoking:
    """A storage on which maintenance ends attempts as they commit, and does more if it is told to."""

    def __init__(self, times: int = 1, then: Callable[[], Awaitable[None]] | None = None) -> None:
        self.storage, self.times, self.then = Storage(), times, then
        self.revoked: list[str] = []
        self.faulty = FaultyConnector(self.storage.memory, before=self._before)
        self.recorder = Recorder()

    async def _before(self, method: str, name: str) -> None:
        if method == "put" and name.startswith("snapshots/") and len(self.revoked) < self.times:
            self.revoked.append(name.partition("/")[2])
            await self.storage.revoke(self.revoked[-1])
            if self.then is not None:
                await self.then()

    async def backup(self, source: Path, *, stream: bool) -> BackupSummary:
        opened = await self.storage.open(self.faulty)
        if not stream:
            return await opened.backup([bytes(source)], ONE_WORKER, self.recorder)
        command = f"cat {shlex.quote(str(source / 'large'))}"
        return await opened.backup(StreamSource(b"large", command), ONE_WORKER, self.recorder)

    async def packs(self) -> list[str]:
        return await self.storage.names("packs/")

    async def whole(self, source: Path, *, stream: bool) -> bool:
        """Whether the latest snapshot is the source, by what counts in the repository."""
        if not stream:
            return await restores(self.storage, source)
        opened = await self.storage.open()
        target = source.parent / f"stream{random.getrandbits(64)}"
        summary = await opened.restore(await opened.find_snapshot("latest"), bytes(target))
        return not summary.errors and (target / "large").read_bytes() == (source / "large").read_bytes()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("times", [1, 2])
async def test_nothing_is_read_or_stored_again(source: Path, stream: bool, times: int) -> None:
    plain, revoking = Revoking(times=0), Revoking(times)
    expected = await plain.backup(source, stream=stream)
    summary = await revoking.backup(source, stream=stream)
    assert len(revoking.revoked) == times
    assert summary.snapshot.attempt.hex() not in revoking.revoked
    assert (summary.counts.read_bytes, summary.counts.new) == (expected.counts.read_bytes, expected.counts.new)
    assert len(await revoking.packs()) == len(await plain.packs())
    reads = [name for method, name in revoking.faulty.calls if method == "put" and name.startswith("packs/")]
    assert len(reads) == len(set(reads)) == len(await revoking.packs())
    assert await revoking.whole(source, stream=stream)
    assert not await revoking.storage.names("leases/")
    assert sum("takes over" in note for note in revoking.recorder.notes) == times
    assert (await (await revoking.storage.open()).check()).clean


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["deleted", "marked", "cut short"])
async def test_a_pack_is_gone(source: Path, stream: bool, what: str) -> None:
    """What was stored is swept, or will be, before another attempt could rely on it: paths are read again."""
    lost: list[str] = []

    async def lose() -> None:
        memory = revoking.storage.memory
        for name in await revoking.packs():
            lost.append(name)
            if what == "deleted":
                await memory.delete(name)
            elif what == "cut short":
                await memory.put(name, [(await memory.get(name))[:-1]])
        if what == "marked":
            ids = b"".join(bytes.fromhex(name.rpartition("/")[2]) for name in lost)
            opened = await revoking.storage.open()
            body = opened.sealer.seal(sealing.MARK, "trash/1", os.urandom(16), encode(Mark(ids)))
            await memory.put("trash/1", [body])

    revoking = Revoking(then=lose)
    if stream:
        with pytest.raises(Exception) as raised:
            await revoking.backup(source, stream=True)
        assert isinstance(reported(raised.value), LeaseLost)
        assert not (await (await revoking.storage.open()).commits()).snapshots
        return
    await revoking.backup(source, stream=False)
    assert any("everything is read again" in note for note in revoking.recorder.notes)
    for name in lost:  # the sweep
        await revoking.storage.memory.delete(name)
    assert await revoking.whole(source, stream=False)


async def test_what_others_have_stored_meanwhile_is_relied_on(source: Path) -> None:
    """The content that the revoked attempt put is gone, but another backup of the same has been made since."""

    async def replace() -> None:
        before = [info async for info in revoking.storage.memory.list("packs/")]
        await (await revoking.storage.open()).backup([bytes(source)], ONE_WORKER)
        # The catalog may have differed: entries say how fresh they are.
        await revoking.storage.memory.delete(max(before, key=lambda info: info.size_bytes).name)

    revoking = Revoking(then=replace)
    await revoking.backup(source, stream=False)
    assert not any("read again" in note for note in revoking.recorder.notes)
    assert await revoking.whole(source, stream=False)


async def test_pages_taken_over_from_a_parent_are_looked_up_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unchanged catalog and files that were not read: what they name is swept while the attempt looks dead."""
    monkeypatch.setattr("coffret.engine.settings.RACY_NS", 0)
    gone: list[str] = []

    async def lose() -> None:
        gone.extend(before)
        for name in before:
            await revoking.storage.memory.delete(name)
        for name in await revoking.storage.names("index/"):
            if name.partition("/")[2].partition("-")[0] not in revoking.revoked:
                await revoking.storage.memory.delete(name)

    revoking = Revoking(times=0)
    await revoking.backup(source, stream=False)
    before = await revoking.packs()
    (source / "new").write_bytes(b"new")
    revoking.times, revoking.then = 1, lose
    await revoking.backup(source, stream=False)
    assert gone
    assert any("everything is read again" in note for note in revoking.recorder.notes)
    assert await revoking.whole(source, stream=False)
