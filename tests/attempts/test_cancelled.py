"""Attempts that are cancelled by asyncio's own means, and a cache that another process holds."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import ONE_WORKER, Storage, restores
from tests.harness import Recorder, repository

from coffret.engine.mirror import Mirror

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.anyio


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
