"""Stream: standard input, or what a command prints, as the one file of a snapshot.

Nobody knows when the next byte comes: a thread waits for it and for the end of the run at once, so that it can always
be stopped. A command is the leader of a session of its own, and is ended with all that it started.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.engine.bridge import Stopped
from coffret.engine.catalog import RefList
from coffret.engine.chunker import Chunker
from coffret.engine.entries import make_entry, make_extra
from coffret.engine.errors import SourceError, UsageError
from coffret.engine.messages import Run, ScanPage
from coffret.engine.processes import all_ended, environment, exit_of, how_ended
from coffret.engine.records import Entry, pack_ref
from coffret.engine.settings import SLAB_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.chunk import FaultSink
    from coffret.engine.flow import Sender
    from coffret.engine.messages import MetaChunks
    from coffret.engine.progress import Progress
    from coffret.engine.records import ChunkerConfig
    from coffret.engine.sealing import Secrets

_READ_BYTES = 1 << 20
# How long the output of a command that has ended may stay open with nothing more coming (seconds).
_SILENCE_S = 10.0
# How long a command that was killed may take to end (seconds): it may be stuck in a system call.
_PATIENCE_S = 5.0


class StreamSource(msgspec.Struct, frozen=True):
    """Where a stream comes from, `command` or else standard input, and the name its file gets at the root."""

    name: bytes
    command: str = ""

    @classmethod
    def asked_for(cls, paths: Sequence[str], *, name: str | None, command: str | None) -> StreamSource | None:
        """What a command line asks for; None if it is not a stream.

        :raises UsageError: if it asks for a stream and something else at once
        """
        if command is None and "-" not in paths:
            if name is not None:
                raise UsageError("--stdin-name goes with `-` or --stdin-command", remedy="give `-` as the PATH")
            return None
        if list(paths) != (["-"] if command is None else list(paths)[:0]):
            raise UsageError("a stream is a snapshot of its own", remedy="back up PATHs by another command")
        if command is not None and not command.strip():
            raise UsageError("--stdin-command is empty", remedy="give a command, or `-` for standard input")
        given = os.fsencode(name if name is not None else "stdin")
        if given in (b"", b".", b"..") or b"/" in given or len(given) > 255:
            raise UsageError(f"{name!r} is no file name", remedy="choose another --stdin-name")
        return cls(given, command or "")


class StreamReader:
    """Reads, cuts and hashes a stream, step by step; `read` runs in a thread, and `stop` ends it from another."""

    def __init__(self, source: StreamSource, chunker: ChunkerConfig, secrets: Secrets) -> None:
        self._source, self._id_key = source, secrets.id_key
        sizes = (chunker.min_bytes, chunker.avg_bytes, chunker.max_bytes)
        self._chunker = Chunker(chunker.name, *sizes, secrets.chunker_key)
        self._step_bytes = max(SLAB_BYTES, 2 * chunker.max_bytes)
        self._carry = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._fd = 0
        self._stopping = os.eventfd(0, os.EFD_CLOEXEC)
        self._ready = select.poll()

    def open(self) -> None:
        """Start the command, if there is one.

        :raises SourceError: if it can't be started, or standard input is a terminal
        """
        if self._source.command:
            self._start(self._source.command)
        elif sys.stdin is not None and os.isatty(0):
            raise SourceError("standard input is a terminal", remedy="pipe something into the backup")
        self._ready.register(self._fd, select.POLLIN)
        self._ready.register(self._stopping, select.POLLIN)

    def _start(self, command: str) -> None:
        try:
            self._process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env=environment(),
                start_new_session=True,
            )
        except (OSError, ValueError, IndexError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no command line"
            remedy = "check --stdin-command; there is no shell, but it may be one: sh -c '...'"
            raise SourceError(f"{command}: {reason}", remedy=remedy) from None
        assert self._process.stdout is not None
        self._fd = self._process.stdout.fileno()

    def read(self) -> tuple[bytes, bytes, bool]:
        """The next (bytes, their chunks as refs, whether this was the end).

        :raises SourceError: if there is no reading on
        :raises Stopped: after `stop`
        """
        parts, size, final = [self._carry], len(self._carry), False
        while size < self._step_bytes and not final:
            data = self._next(min(_READ_BYTES, self._step_bytes - size))
            parts.append(data)
            size += len(data)
            final = not data
        joined = b"".join(parts)
        refs, at, view = [], 0, memoryview(joined)
        for length in self._chunker.cut(view, final=final):
            refs.append(pack_ref(blake3(view[at : at + length], key=self._id_key).digest(), length))
            at += length
        self._carry = bytes(view[at:])
        return joined[:at] if at < size else joined, b"".join(refs), final

    def _next(self, size_bytes: int) -> bytes:
        """Up to `size_bytes`, as soon as there are any; none at the end."""
        while True:
            found = self._ready.poll(_SILENCE_S * 1000)
            if any(fd == self._stopping for fd, _ in found):
                raise Stopped
            try:
                if found:
                    return os.read(self._fd, size_bytes)
            except BlockingIOError:  # another process was faster
                continue
            except OSError as error:
                what = self._source.command or "standard input"
                raise SourceError(f"{what}: {error.strerror}", remedy="pipe something into the backup") from None
            if self._has_ended():
                raise SourceError(
                    f"the command ended, but something it started keeps its output open: {self._source.command}",
                    remedy="no snapshot was made; let the command wait for what it starts, or redirect its output",
                )

    def _has_ended(self) -> bool:
        """Whether there is a command that has. It is left unreaped: so its number stays that of its group."""
        if self._process is None:
            return False
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def stop(self) -> None:
        """Let `read` raise Stopped, now or when it is called."""
        os.eventfd_write(self._stopping, 1)

    async def finish(self) -> None:
        """Wait for the command.

        :raises SourceError: if it failed: then there must be no snapshot
        """
        if self._process is None:
            return
        code = await exit_of(self._process)
        if code:
            raise SourceError(
                f"the command failed ({how_ended(code)}): {self._source.command}",
                remedy="no snapshot was made; mend the command",
            )

    async def close(self) -> None:
        """End a command that was not waited for, with all that it started: nobody reads it any more."""
        os.close(self._stopping)
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()
        await all_ended([process], _PATIENCE_S)


async def stream_stage(
    source: StreamSource,
    *,
    reader: StreamReader,
    runs: Sender[Run],
    pages: Sender[ScanPage],
    meta: MetaChunks,
    progress: Progress,
    fault: FaultSink,
) -> None:
    """Send a stream's chunks on, then the one page of its catalog."""
    chunks, size, final = RefList(meta.store), 0, False
    try:
        await to_thread.run_sync(reader.open)
        while not final:
            data, refs, final = await _read(reader)
            for at in range(0, len(refs), 36):
                chunks.add(refs[at : at + 32], int.from_bytes(refs[at + 32 : at + 36], "little"))
            size += len(data)
            progress.read_bytes = progress.size_bytes = size
            if refs:
                await runs.send(Run(data, refs))
            for run in meta.runs():
                await runs.send(run)
        await reader.finish()
    finally:
        await reader.close()
    if not size:
        fault(b"/" + source.name, "the stream was empty")
    content, depth = chunks.finish()
    now, mode = time.time_ns(), stat.S_IFREG | 0o600
    extra = make_extra(meta.store, depth=depth)
    entry = make_entry(
        source.name, (mode, os.getuid(), os.getgid(), size, now, now, 0, 0, 1), now, content=content, extra=extra
    )
    root_mode = stat.S_IFDIR | 0o755
    root = make_entry(b"", (root_mode, os.getuid(), os.getgid(), 0, now, now, 0, 0, 1), now)
    listed: list[Entry | None] = [root, entry]
    page = ScanPage(0, 1, sections=[(b"", listed)], count=2, files=1, directories=1, new=2)
    page.new_directories = page.to_read = 1
    await pages.send(page)


async def _read(reader: StreamReader) -> tuple[bytes, bytes, bool]:
    """`reader.read` in a thread, which ends when this is cancelled."""
    reading = True

    async def stop_when_cancelled() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            if reading:
                reader.stop()

    async with anyio.create_task_group() as group:
        group.start_soon(stop_when_cancelled)
        try:
            found = await to_thread.run_sync(reader.read)
        except Stopped:  # the consequence of being cancelled, not a cause
            await anyio.sleep_forever()
        reading = False
        group.cancel_scope.cancel()
    return found
