"""Worker processes with shared slabs: how they start, talk and end. `chunkpool` and `openpool` say what they do.

A worker is `python -m MODULE`, not a fork: forking a process with threads is not safe, and multiprocessing would
import a library user's main again. It inherits one end of a socketpair and a memfd; when its socket ends, it ends.
Messages are frames of marshal, since both ends are the same interpreter.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from coffret.engine.errors import WorkerDied
from coffret.engine.flow import Waiters
from coffret.engine.frames import frame, take_frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from anyio.abc import TaskGroup

# The size of one read from a worker's socket (bytes).
_READ = 1 << 18
# Blocks of a MiB are allocated and freed all the time: keep the memory. Giving it back to the system and touching it
# anew was 18 % of a restore (glibc, mallopt(3); other C libraries do not look).
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


class Worker:
    """One process: its end of the socket, and what has been read and written only in part."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process, self.socket = process, sock
        self.jobs: dict[int, Any] = {}
        self.stream = False
        self.input = bytearray()
        self.output = bytearray()


class WorkerPool:
    """Processes of one module over one memfd of slabs. Use as an async context; leaving it ends every process.

    `slabs` of `slab_bytes` are shared by all. `handle` gets (worker, message) for each message, in order per worker.

    :raises WorkerDied: (cancelling the context's body) if a worker ends unexpectedly
    """

    def __init__(
        self,
        module: str,
        *,
        workers: int,
        slabs: int,
        slab_bytes: int,
        handle: Callable[[Worker, tuple[Any, ...]], Awaitable[None]],
    ) -> None:
        self._module, self._count, self._slabs, self.slab_bytes = module, workers, slabs, slab_bytes
        self._handle = handle
        self.workers: list[Worker] = []
        self.closed = False
        self._memory: mmap.mmap | None = None

    async def __aenter__(self) -> WorkerPool:
        self._group: TaskGroup = anyio.create_task_group()
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            if error is None:
                self._group.cancel_scope.cancel()
            return await self._group.__aexit__(kind, error, trace)
        finally:
            self._end(kill=error is not None)

    def start(self, hello: tuple[Any, ...]) -> None:
        """Start the processes, once.

        `hello`, and the numbers of the slabs that are its own, is the first message each gets: keys go there, never on
        a command line.
        """
        memory = os.memfd_create("coffret-slabs", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, self._slabs * self.slab_bytes)
            self._memory = mmap.mmap(memory, self._slabs * self.slab_bytes)
            for number in range(self._count):
                self.workers.append(self._spawn(memory, number))
        finally:
            os.close(memory)
        share = self._slabs // self._count
        for number, worker in enumerate(self.workers):
            self.send(worker, (*hello, list(range(number * share, (number + 1) * share))))
            self._group.start_soon(self._serve, worker)

    def slab(self, number: int) -> memoryview:
        """The bytes of a slab."""
        assert self._memory is not None
        at = number * self.slab_bytes
        return memoryview(self._memory)[at : at + self.slab_bytes]

    def send(self, worker: Worker, message: tuple[Any, ...]) -> None:
        """Send a message; the few that a worker is sent ahead are buffered here."""
        if self.closed:
            return
        if not worker.output:
            self._group.start_soon(self._flush, worker)
        worker.output += frame(message)

    def _spawn(self, memory: int, number: int) -> Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        arguments = [str(n) for n in (theirs.fileno(), memory, number, self._slabs, self.slab_bytes)]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", self._module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
                env={**os.environ, **_MALLOC, "PYTHONPATH": _search_path()},
            )
        return Worker(process, ours)

    async def _flush(self, worker: Worker) -> None:
        while worker.output and not self.closed:
            try:
                sent = worker.socket.send(worker.output)
                del worker.output[:sent]
            except BlockingIOError:
                await anyio.wait_writable(worker.socket)
            except (BrokenPipeError, ConnectionResetError):
                return  # `_serve` reports the death

    async def _serve(self, worker: Worker) -> None:
        while True:
            try:
                data = worker.socket.recv(_READ)
            except BlockingIOError:
                await anyio.wait_readable(worker.socket)
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                code = worker.process.wait()
                reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise WorkerDied(f"a worker process ended unexpectedly ({reason})")
            worker.input += data
            for message in take_frames(worker.input):
                await self._handle(worker, message)

    def _end(self, *, kill: bool) -> None:
        self.closed = True
        for worker in self.workers:
            worker.socket.close()
            if kill:
                worker.process.kill()
        for worker in self.workers:
            try:
                worker.process.wait(5)
            except subprocess.TimeoutExpired:  # stuck in a read of a dead network file system
                worker.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(5)


class Turns:
    """Counts unfinished jobs, and lets senders wait for room and for jobs to finish."""

    def __init__(self) -> None:
        self.unfinished = 0
        self.room, self.finished = Waiters(), Waiters()

    def begin(self) -> None:
        """A job was queued."""
        self.unfinished += 1

    def done(self) -> None:
        """A job is finished, its result delivered."""
        self.unfinished -= 1
        self.finished.wake_all()

    async def drain(self, *, below: int = 1) -> None:
        """Wait until fewer than `below` jobs are unfinished."""
        while self.unfinished >= below:
            await self.finished.wait()


def _search_path() -> str:
    """PYTHONPATH for a worker: it imports the same code, whatever the parent did to its own path."""
    home = next(
        (path for path in sys.path if path and (Path(path) / "coffret" / "engine").is_dir()),
        str(Path(__file__).parent.parent.parent),
    )
    return os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
