"""The pool that opens blocks, for restore and check: the parent fetches stored bytes into slabs, workers do more."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from coffret.engine.restore_writer import read_marks
from coffret.engine.workerpool import Turns, Worker, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from coffret.engine.sealing import Secrets

Faults = list[tuple[Any, ...]]


class OpenPool:
    """Slabs to fill, and workers to send them to. Use as an async context; leaving it ends every worker.

    `target` is a descriptor of the directory a restore writes to, -1 for a check; `owner`, `sparse`, `wary` and
    `unlock` are what `openworker` is told of it.
    """

    def __init__(
        self,
        secrets: Secrets,
        repository_id: bytes,
        *,
        workers: int,
        slabs: int,
        slab_bytes: int,
        target: int = -1,
        owner: bool = False,
        sparse: bool = False,
        wary: bool = False,
        unlock: bool = False,
    ) -> None:
        self._pool = WorkerPool(
            "coffret.engine.openworker", workers=workers, slabs=slabs, slab_bytes=slab_bytes, handle=self._handle
        )
        self._hello = ("keys", secrets.data_key, secrets.id_key, repository_id, owner, sparse, wary, unlock)
        self._target = target
        # A word for each worker, in which it says what it is at; looked at if it is killed.
        self._marks = os.memfd_create("coffret-marks", os.MFD_CLOEXEC)
        os.ftruncate(self._marks, 8 * workers)
        #: When it has ended: what workers were at, as `restore_writer.read_marks` has it.
        self.marks: list[tuple[int, int, bool]] = []
        self.slabs, self.slab_bytes = slabs, slab_bytes
        self._free = list(range(slabs))
        self._turns = Turns()
        self._number = 0

    async def __aenter__(self) -> OpenPool:
        await self._pool.__aenter__()
        try:
            # By descriptor: a path may come to mean another directory, and a worker has another current directory.
            self._pool.start(self._hello, [self._marks] if self._target < 0 else [self._marks, self._target])
        except BaseException as error:
            try:
                await self._pool.__aexit__(type(error), error, error.__traceback__)
            finally:
                os.close(self._marks)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return await self._pool.__aexit__(kind, error, trace)
        finally:
            self.marks = read_marks(memoryview(os.pread(self._marks, 1 << 16, 0)).cast("Q"))
            os.close(self._marks)

    async def acquire(self) -> int:
        """The number of a free slab, waiting for one. It counts as a job from here on, for it is still to be filled."""
        while not self._free:
            await self._turns.room.wait()
        self._turns.begin()
        return self._free.pop()

    def view(self, slab: int) -> memoryview:
        """The bytes of a slab."""
        return self._pool.slab(slab)

    def release(self, slab: int) -> None:
        """A slab is not needed after all."""
        self._return(slab)
        self._turns.done()

    def submit(
        self, kind: str, *arguments: Any, slab: int | None = None, done: Callable[[Faults], None], ordered: bool = False
    ) -> int:
        """Send a job to the worker with least to do (`ordered`: always to the same); its slab comes back after it.

        The job's number is returned.
        """
        self._number += 1
        worker = self._pool.workers[0] if ordered else min(self._pool.workers, key=lambda worker: len(worker.jobs))
        worker.jobs[self._number] = (slab, done)
        if slab is None:
            self._turns.begin()
        self._pool.send(worker, (kind, self._number, *(() if slab is None else (slab,)), *arguments))
        return self._number

    async def drain(self, *, below: int = 1) -> None:
        """Wait until fewer than `below` jobs are unfinished."""
        await self._turns.drain(below=below)

    async def _handle(self, worker: Worker, message: tuple[Any, ...]) -> None:
        _, number, faults = message
        slab, done = worker.jobs.pop(number)
        if slab is not None:
            self._return(slab)
        done(faults)
        self._turns.done()

    def _return(self, slab: int) -> None:
        self._free.append(slab)
        self._turns.room.wake()
