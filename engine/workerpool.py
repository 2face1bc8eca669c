"""Worker processes with shared slabs: how they start, talk and end. `chunkpool` and `openpool` say what they do.

A worker is `python -m MODULE`, not a fork: forking a process with threads is not safe, and multiprocessing would
import a library user's main again. It inherits one end of a socketpair and a memfd; when its socket ends, it ends.
Messages are frames of marshal, since both ends are the same interpreter. A worker that fails says ("error", reason).

It imports nothing from the current directory, which is what is being backed up as often as not: `-P` keeps it off the
search path, and the worker's own is the root. Nor does it import `site` (`-S`), a fifth of its start.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from coffret.engine.errors import WorkerDied
from coffret.engine.flow import Waiters
from coffret.engine.frames import frame, take_frames
from coffret.engine.memory import give_back
from coffret.engine.processes import STOPPING, all_ended, environment, exit_of, how_ended

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from types import TracebackType

    from anyio.abc import TaskGroup

# The size of one read from a worker's socket (bytes).
_READ = 1 << 18
# Blocks of a MiB are allocated and freed all the time: keep the memory. Giving it back to the system and touching it
# anew was 18 % of a restore (glibc, mallopt(3); other C libraries do not look).
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
# What a worker imports beside the standard library.
_PACKAGES = ("coffret", "blake3", "cryptography", "_cffi_backend", "msgspec", "xxhash", "zstandard")
# How long a worker that was told to end may take, and one that was killed (seconds).
_PATIENCE_S = 5.0


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
            try:
                await self._end(kill=error is not None)
            finally:
                self._release()

    def start(self, hello: tuple[Any, ...], descriptors: Sequence[int] = ()) -> None:
        """Start the processes, once.

        `hello`, and the numbers of the slabs that are its own, is the first message each gets: keys go there, never on
        a command line. Ahead of it come, with one byte, the `descriptors`, if there are any.

        :raises WorkerDied: if the system does not let them start
        """
        try:
            self._start()
        except OSError as error:
            raise WorkerDied(
                f"a worker process can't be started: {error.strerror}",
                remedy="raise the limits of open files, processes and memory (ulimit -a), or use fewer --workers",
            ) from error
        share = self._slabs // self._count
        for number, worker in enumerate(self.workers):
            if descriptors:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `_serve` reports the death
                    socket.send_fds(worker.socket, [b"\0"], descriptors)
            self.send(worker, (*hello, list(range(number * share, (number + 1) * share))))
            self._group.start_soon(self._serve, worker)

    def slab(self, number: int) -> memoryview:
        """The bytes of a slab."""
        assert self._memory is not None
        at = number * self.slab_bytes
        return memoryview(self._memory)[at : at + self.slab_bytes]

    def send(self, worker: Worker, message: tuple[Any, ...]) -> None:
        """Send a message. What the socket has no room for is buffered here, and sent by a task: a few jobs ahead."""
        if self.closed:
            return
        waiting = bool(worker.output)
        worker.output += frame(message)
        if not waiting and not _write(worker):
            self._group.start_soon(self._flush, worker)

    def _start(self) -> None:
        memory = os.memfd_create("coffret-slabs", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, self._slabs * self.slab_bytes)
            self._memory = mmap.mmap(memory, self._slabs * self.slab_bytes)
            variables = {**environment(), **_MALLOC, "PYTHONPATH": _search_path()}
            # What ends the program is for this process to handle. What is blocked here is blocked in a worker, from its
            # first instruction on and for ever. Asked first: a handler that is due may raise as soon as that is done.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
                for number in range(self._count):
                    self.workers.append(self._spawn(memory, number, variables))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        finally:
            os.close(memory)

    def _spawn(self, memory: int, number: int, variables: Mapping[str, str]) -> Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        arguments = [str(n) for n in (theirs.fileno(), memory, number, self._slabs, self.slab_bytes)]
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-S", "-m", self._module, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    # What went wrong comes as a message; a traceback is for those who ask for it.
                    stderr=None if os.environ.get("COFFRET_TRACEBACK") else subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), memory),
                    cwd="/",
                    env=variables,
                )
        except BaseException:
            ours.close()
            raise
        return Worker(process, ours)

    async def _flush(self, worker: Worker) -> None:
        while not self.closed and not _write(worker):
            await anyio.wait_writable(worker.socket)

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
                raise WorkerDied(f"a worker process ended unexpectedly ({await _how_ended(worker)})")
            worker.input += data
            for message in take_frames(worker.input):
                if message[0] == "error":
                    raise WorkerDied(f"a worker process failed: {message[1]}")
                await self._handle(worker, message)

    async def _end(self, *, kill: bool) -> None:
        self.closed = True
        for worker in self.workers:
            worker.socket.close()
            if kill:
                worker.process.kill()
        await all_ended([worker.process for worker in self.workers], _PATIENCE_S)

    def _release(self) -> None:
        """Give the slabs back to the system, whoever still has a view of one; nobody looks at it any more.

        After an error that may be for long: tracebacks hold frames, frames hold slabs.
        """
        self.workers.clear()
        del self._handle
        if self._memory is not None:
            give_back([self._memory], mmap.MADV_REMOVE)
            self._memory = None


def _write(worker: Worker) -> bool:
    """Send what is buffered; False if the socket has no room for all of it."""
    try:
        while worker.output:
            del worker.output[: worker.socket.send(worker.output)]
    except BlockingIOError:
        return False
    except (BrokenPipeError, ConnectionResetError):
        pass  # `_serve` reports the death, and what is left keeps others from trying
    return True


async def _how_ended(worker: Worker) -> str:
    with anyio.move_on_after(_PATIENCE_S):
        return how_ended(await exit_of(worker.process))
    return "it closed its socket"


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
    """PYTHONPATH for a worker: where this process found the packages that a worker needs, behind the standard library.

    Whatever else this process has on its path is not the worker's.
    """
    library = Path(os.__file__).parent
    folders = {str(library): None, str(library / "lib-dynload"): None}
    for name in _PACKAGES:
        spec = find_spec(name)
        if spec is not None and spec.origin:
            origin = Path(spec.origin)
            folders[str((origin.parent.parent if spec.submodule_search_locations else origin.parent).absolute())] = None
    return os.pathsep.join(folders)
