"""What the user sees: a live display on a terminal, plain lines in a pipe, JSON lines where a program reads.

Renders what the engine tells (`coffret.engine.progress`); the words of results are those of `commands/`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import anyio

from coffret.engine.progress import Progress
from coffret.engine.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.errors import CoffretError
    from coffret.engine.progress import Fault, Item

SCHEMA_VERSION = 1
# A terminal is redrawn this often; a pipe or a program gets a line a second at most (s).
_REDRAW_S, _LINE_S = 0.1, 1.0


def printable(path: bytes) -> str:
    """A path for people: what is not UTF-8 is escaped, and control characters are, so that no name moves a cursor."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def counted(number: int, noun: str) -> str:
    """`1 file`, `12,345 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def path_fields(path: bytes, name: str = "path") -> dict[str, str]:
    """A path in JSON: `path`, and `path_b64` if it is not UTF-8; or under another name, and that with `_b64`."""
    try:
        return {name: path.decode("utf-8")}
    except UnicodeDecodeError:
        return {name: path.decode("utf-8", "replace"), f"{name}_b64": base64.b64encode(path).decode()}


def paths_fields(paths: Sequence[bytes]) -> dict[str, list[str]]:
    """Paths in JSON: `paths`, and `paths_b64`, which has them all, if one of them is not UTF-8."""
    found = {"paths": [path.decode("utf-8", "replace") for path in paths]}
    if any("path_b64" in path_fields(path) for path in paths):
        found["paths_b64"] = [base64.b64encode(path).decode() for path in paths]
    return found


class ReaderGone(BrokenPipeError):
    """Nobody reads what is printed any more."""


class Display:
    """The display of one command. `quiet`, `verbose` and `as_json` are the global options; `name` the command."""

    def __init__(self, name: str, *, quiet: bool, verbose: bool, as_json: bool) -> None:
        self.name, self.as_json = name, as_json
        #: What a summary calls the command: with its subcommand.
        self.command = name
        self.quiet, self.verbose = quiet, verbose
        self.progress = Progress(on_fault=self._fault, on_note=self.note)
        if verbose:
            self.progress.on_item = self._item
        self._live: Any = None
        self._begin = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the command began."""
        return round(time.perf_counter() - self._begin, 3)

    def begin(self) -> None:
        """The work begins now: a passphrase was asked for before."""
        self._begin = time.perf_counter()

    # Results ----------------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """A line of the result; not in JSON."""
        if not self.as_json:
            self._out(text)

    def item(self, **fields: Any) -> None:
        """An object of a listing; only in JSON."""
        if self.as_json:
            self._json("item", **fields)

    def summary(self, text: str, **fields: Any) -> None:
        """The end: what happened. Without a text, what was printed before says it all."""
        self.close()
        if self.as_json:
            self._json("summary", schema_version=SCHEMA_VERSION, command=self.command, **fields)
        elif text and not self.quiet:
            self._out(text)

    def error(self, error: CoffretError) -> None:
        """The one line of a failure: what happened, and what to do."""
        self.close()
        message, remedy = str(error), error.remedy
        if self.as_json:
            self._json("error", message=message, remedy=remedy, code=error.exit_code)
        text = f"coffret: {message}" + (f" ({remedy})" if remedy else "")
        self._err(printable(os.fsencode(" ".join(text.splitlines()))))

    def note(self, text: str) -> None:
        """A remark."""
        if self.as_json:
            self._json("status", note=text)
        elif not self.quiet:
            self._err(printable(os.fsencode(f"{self.name}: note: {text}")))

    # Progress ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Show the progress until cancelled."""
        if self.quiet:
            await anyio.sleep_forever()
        if not self.as_json and sys.stderr.isatty() and not (self.verbose and sys.stdout.isatty()):
            await self._run_live()
        else:
            while True:
                await anyio.sleep(_LINE_S)
                if self.as_json:
                    self._json("status", **self._counters())
                elif not self.verbose:
                    self._err(self._plain())

    async def _run_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        # Neither stream is redirected: `_err` prints above the display, and `summary` is printed when it is gone.
        self._live = live = Live(
            console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        live.start()
        try:
            while self._live is not None:
                await anyio.sleep(_REDRAW_S)
                if self._live is not None:
                    live.update(self._table(), refresh=True)
        finally:
            self.close()

    def close(self) -> None:
        """Clear the live display away, if there is one."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        progress, elapsed = self.progress, time.perf_counter() - self._begin
        done, total = max(progress.size_bytes, progress.read_bytes), progress.size_total
        table = Table.grid(padding=(0, 2))
        speed = format_size(int(done / max(elapsed, 0.001))) + "/s"
        table.add_row(
            f"[bold]{self.name}[/]" + ("" if progress.phase == self.name else f" {progress.phase}"),
            counted(progress.files, "file") + (f" of {progress.files_total:,}" if progress.files_total else ""),
            format_size(done) + (f" of {format_size(total)}" if total else ""),
            speed,
            f"{elapsed:.0f}s" + _eta(done, total, elapsed),
        )
        if total:
            table.add_row(ProgressBar(total=total, completed=done, width=20))
        if progress.stored_bytes:
            ratio = progress.added_bytes / max(progress.stored_bytes, 1)
            table.add_row(
                "",
                f"added {format_size(progress.added_bytes)}",
                f"stored {format_size(progress.stored_bytes)}",
                f"ratio {ratio:.2f}",
            )
        if progress.errors:
            table.add_row("", f"[red]{counted(progress.errors, 'error')}[/]")
        from rich.text import Text

        for path in list(progress.current.values()):
            table.add_row("", Text(printable(path), overflow="ellipsis", no_wrap=True))
        return table

    def _plain(self) -> str:
        progress = self.progress
        phase = "" if progress.phase == self.name else f" {progress.phase}:"
        done = format_size(max(progress.size_bytes, progress.read_bytes))
        text = f"{self.name}:{phase} {counted(progress.files, 'file')}, {done}"
        return text + (f", {counted(progress.errors, 'error')}" if progress.errors else "")

    def _counters(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "phase": progress.phase,
            "files": progress.files,
            "files_total": progress.files_total,
            "bytes": progress.size_bytes,
            "bytes_total": progress.size_total,
            "bytes_read": progress.read_bytes,
            "bytes_added": progress.added_bytes,
            "bytes_stored": progress.stored_bytes,
            "errors": progress.errors,
            "elapsed_s": self.elapsed_s,
        }

    def _item(self, item: Item) -> None:
        if self.as_json:
            self._json(
                "item",
                short_id=self.progress.subject,
                **path_fields(item.path),
                status=item.status,
                size_bytes=item.size_bytes,
            )
        elif not self.quiet:
            mark = "✓" if item.status == "verified" else "OK ✓"
            self._out(f"{self.progress.subject}: {mark} {printable(item.path)}")

    def _fault(self, fault: Fault) -> None:
        if self.as_json:
            self._json("error", reason=fault.reason, **path_fields(fault.path))
        self._err(f"{self.name}: {printable(fault.path)}: {printable(os.fsencode(fault.reason))}")

    def _json(self, message_type: str, **fields: Any) -> None:
        # Text that came from the command line may hold bytes that are not UTF-8; JSON can't.
        text = json.dumps({"message_type": message_type, **fields}, ensure_ascii=False)
        _write(os.fsencode(text).decode("utf-8", "replace"))

    def _out(self, text: str) -> None:
        _write(text)

    def _err(self, text: str) -> None:
        """One line on standard error, above the live display; whether anybody reads it does not matter."""
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(text), soft_wrap=True)
            return
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr)


def _write(text: str) -> None:
    """One line on standard output, in UTF-8 whatever the locale.

    :raises ReaderGone: if it is a pipe that nobody reads
    """
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        raise ReaderGone(*error.args) from None


def _eta(done: int, total: int | None, elapsed_s: float) -> str:
    if not total or not done:
        return ""
    return f", {max(0, total - done) / done * elapsed_s:.0f}s left"


def terminal() -> bool:
    """Whether a passphrase can be asked for."""
    return sys.stdin.isatty() and os.isatty(2)
