"""The pool that reads, cuts and hashes files: which worker gets which job, and who holds which slab.

A worker owns its slabs; one it has filled belongs to the event loop until `Slab.release`. Workers start with the first
job: a run with nothing to read starts none.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from coffret.engine import settings
from coffret.engine.workerpool import Turns, Worker, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from coffret.engine.records import ChunkerConfig
    from coffret.engine.sealing import Secrets

# Jobs a worker has at a time: one to work on, one so that it need not wait for the next.
_JOBS_AHEAD = 2


class Slab:
    """A filled slab: `view` of its bytes. It goes back to its worker with the last `release`."""

    __slots__ = ("_free", "_holders", "view")

    def __init__(self, view: memoryview, free: Callable[[], None]) -> None:
        self.view, self._free, self._holders = view, free, 1

    def hold(self) -> None:
        """One more user; each calls `release` once."""
        self._holders += 1

    def release(self) -> None:
        """This user is done with the bytes."""
        self._holders -= 1
        if self._holders == 0:
            self._free()


class Job(msgspec.Struct):
    """Work for a worker: one large file as a stream of pieces, or a batch of files.

    `deliver` gets each message: ("batch", slab, results), ("piece", slab, offset, refs) or ("file", result).
    """

    kind: str
    paths: list[bytes]
    deliver: Callable[..., Awaitable[None]]


class ChunkPool:
    """Gives jobs to workers and hands on what they send. Use as an async context; leaving it ends every worker.

    :raises WorkerDied: (cancelling the context's body) if a worker ends unexpectedly
    """

    def __init__(
        self, *, workers: int, slabs: int, chunker: ChunkerConfig, secrets: Secrets, current: dict[int, bytes]
    ) -> None:
        # What each worker reads, for those who watch.
        self._current = current
        self._pool = WorkerPool(
            "coffret.engine.chunkworker",
            workers=workers,
            slabs=workers * slabs,
            slab_bytes=max(settings.SLAB_BYTES, 2 * chunker.max_bytes),
            handle=self._handle,
        )
        self._count, self._slabs = workers, slabs
        # Keep a worker for small files, so that huge ones never hold back the catalog of all others.
        self._max_streams = max(1, workers - 1)
        parameters = (chunker.name, chunker.min_bytes, chunker.avg_bytes, chunker.max_bytes)
        self._hello = ("keys", secrets.id_key, parameters, secrets.chunker_key)
        self._batches: deque[Job] = deque()
        self._streams: deque[Job] = deque()
        self._turns = Turns()
        self._number = 0

    async def __aenter__(self) -> ChunkPool:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._pool.__aexit__(kind, error, trace)

    async def submit(self, job: Job) -> None:
        """Queue a job, waiting while enough are queued already."""
        if not self._pool.workers:
            self._pool.start(self._hello)
        waiting = self._streams if job.kind == "file" else self._batches
        while len(waiting) >= _JOBS_AHEAD * self._count:
            await self._turns.room.wait()
        self.submit_nowait(job)

    def submit_nowait(self, job: Job) -> None:
        """Queue a job beyond the limit: one that came out of another, whose delivery must not wait."""
        (self._streams if job.kind == "file" else self._batches).append(job)
        self._turns.begin()
        self._assign()

    async def drain(self) -> None:
        """Wait until all jobs are finished."""
        await self._turns.drain()

    def _assign(self) -> None:
        """Give waiting jobs to the workers that have least to do; nothing waits behind a stream, which may be long."""
        workers = self._pool.workers
        while self._batches or self._streams:
            ready = [worker for worker in workers if not worker.stream and len(worker.jobs) < _JOBS_AHEAD]
            if not ready:
                return
            worker = min(ready, key=lambda worker: len(worker.jobs))
            stream = bool(self._streams) and sum(worker.stream for worker in workers) < self._max_streams
            if not stream and not self._batches:
                return
            job = (self._streams if stream else self._batches).popleft()
            self._number += 1
            worker.jobs[self._number] = job
            worker.stream = stream
            self._current[worker.process.pid] = job.paths[0]
            self._pool.send(worker, (job.kind, self._number, job.paths[0] if stream else job.paths))
            self._turns.room.wake_all()

    async def _handle(self, worker: Worker, message: tuple[Any, ...]) -> None:
        kind, number = message[0], message[1]
        job: Job = worker.jobs[number]
        if kind == "piece":
            _, _, slab, offset, refs = message
            await job.deliver(kind, self._slab(worker, slab), offset, refs)
            return
        del worker.jobs[number]
        worker.stream = worker.stream and kind != "file"
        self._assign()
        if kind == "batch":
            _, _, slab, results = message
            await job.deliver(kind, self._slab(worker, slab), results)
        else:
            await job.deliver(kind, message[2])
        self._turns.done()

    def _slab(self, worker: Worker, number: int) -> Slab:
        return Slab(self._pool.slab(number), lambda: self._pool.send(worker, ("free", number)))
