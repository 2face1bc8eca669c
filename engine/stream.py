"""Stream: standard input, or what a command prints, as the one file of a snapshot."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyio import to_thread
from blake3 import blake3

from coffret.engine.catalog import RefList
from coffret.engine.chunker import Chunker
from coffret.engine.entries import make_entry, make_extra
from coffret.engine.errors import SourceError, UsageError
from coffret.engine.messages import Run, ScanPage
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


@dataclass(frozen=True, slots=True)
class StreamSource:
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
    """Reads, cuts and hashes a stream, step by step; `read` runs in a thread."""

    def __init__(self, source: StreamSource, chunker: ChunkerConfig, secrets: Secrets) -> None:
        self._source, self._id_key = source, secrets.id_key
        sizes = (chunker.min_bytes, chunker.avg_bytes, chunker.max_bytes)
        self._chunker = Chunker(chunker.name, *sizes, secrets.chunker_key)
        self._step_bytes = max(SLAB_BYTES, 2 * chunker.max_bytes)
        self._carry = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._fd = 0

    def open(self) -> None:
        """Start the command, if there is one.

        :raises SourceError: if it can't be started, or standard input is a terminal
        """
        if not self._source.command:
            if sys.stdin is not None and os.isatty(0):
                raise SourceError("standard input is a terminal", remedy="pipe something into the backup")
            return
        try:
            words = shlex.split(self._source.command)
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except (OSError, ValueError, IndexError) as error:
            raise SourceError(f"{self._source.command}: {error}", remedy="check --stdin-command") from None
        assert self._process.stdout is not None
        self._fd = self._process.stdout.fileno()

    def read(self) -> tuple[bytes, bytes, bool]:
        """The next (bytes, their chunks as refs, whether this was the end)."""
        parts, size, final = [self._carry], len(self._carry), False
        while size < self._step_bytes and not final:
            data = os.read(self._fd, min(_READ_BYTES, self._step_bytes - size))
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

    def finish(self) -> None:
        """Wait for the command.

        :raises SourceError: if it failed: then there must be no snapshot
        """
        if self._process is None:
            return
        code = self._process.wait()
        if code:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            raise SourceError(
                f"the command {how}: {self._source.command}", remedy="no snapshot was made; mend the command"
            )

    def close(self) -> None:
        """End a command that still runs: nobody reads it any more."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


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
            data, refs, final = await to_thread.run_sync(reader.read, abandon_on_cancel=True)
            for at in range(0, len(refs), 36):
                chunks.add(refs[at : at + 32], int.from_bytes(refs[at + 32 : at + 36], "little"))
            size += len(data)
            progress.read_bytes = progress.size_bytes = size
            if refs:
                await runs.send(Run(data, refs))
            for run in meta.runs():
                await runs.send(run)
        await to_thread.run_sync(reader.finish, abandon_on_cancel=True)
    finally:
        reader.close()
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
    await pages.send(page)
