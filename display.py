"""What the user sees: a live display on a terminal, plain lines in a pipe, JSON lines where a program reads.

Renders what the engine tells (`coffret.engine.progress`); the words of results are those of `commands/`.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import anyio

from coffret.engine.errors import CoffretError, OutOfSpace
from coffret.engine.progress import Progress
from coffret.engine.units import format_duration, format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coffret.connectors.trace import Calls
    from coffret.engine.progress import Fault, Item

SCHEMA_VERSION = 1
# A terminal is redrawn this often; a pipe or a program gets a line a second at most (s).
_REDRAW_S, _LINE_S = 0.1, 1.0
# What a remaining time and a percentage need beside the bar (columns).
_BAR_MAX, _BESIDE_BAR = 40, 22


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


def cut_left(text: str, width: int) -> str:
    """A path in at most `width` columns: of one that is too long the end is what tells it from others."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    at, room = len(text), width - 1
    while at and (room := room - cell_len(text[at - 1])) >= 0:
        at -= 1
    return f"…{text[at:]}"


class ReaderGone(BrokenPipeError):
    """Nobody reads what is printed any more."""


class OutputLost(CoffretError):
    """Standard output can't be written."""

    def __init__(self, error: OSError) -> None:
        remedy = "direct it elsewhere"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.exit_code, remedy = OutOfSpace.exit_code, "free some space, or direct it elsewhere"
        super().__init__(f"standard output can't be written: {error.strerror}", remedy=remedy)


def _calls_fields(calls: Calls) -> dict[str, int | float]:
    """Calls of one method in JSON."""
    return {
        "calls": calls.calls,
        "failed": calls.failed,
        "size_bytes": calls.size_bytes,
        "total_s": round(calls.total_s, 6),
        "median_s": round(calls.latency_s(0.5), 6),
        "p99_s": round(calls.latency_s(0.99), 6),
    }


def _told(calls: Calls) -> str:
    """Calls of one method for people: `12 (34 MB, 5.2ms each)`."""
    size = f"{format_size(calls.size_bytes)}, " if calls.size_bytes else ""
    failed = f", {calls.failed} failed" if calls.failed else ""
    return f"{calls.calls} ({size}{format_duration(calls.total_s / calls.calls)} each{failed})"


class Display:
    """The display of one command. `quiet`, `verbose` and `as_json` are the global options; `name` the command."""

    def __init__(self, name: str, *, quiet: bool, verbose: bool, as_json: bool) -> None:
        self.name, self.as_json = name, as_json
        #: What a summary calls the command: with its subcommand.
        self.command = name
        self.quiet, self.verbose = quiet, verbose
        #: Nothing is done: a line for a path says what would be.
        self.dry_run = False
        self.progress = Progress(on_fault=self._fault, on_note=self.note)
        if verbose:
            self.progress.on_item = self._item
        #: What was asked of the repository's storage, by method.
        self.storage_calls: Mapping[str, Calls] = {}
        self._live: Any = None
        # The last line is said.
        self._over = False
        self._begin = time.perf_counter()
        # The phase that was shown last, and since when.
        self._phase, self._phase_begin = "", self._begin

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
        self._over = True
        if self.as_json:
            if self.storage_calls:
                fields["storage"] = {method: _calls_fields(calls) for method, calls in self.storage_calls.items()}
            self._json("summary", schema_version=SCHEMA_VERSION, command=self.command, **fields)
        elif text and not self.quiet:
            self._out(text)
            if self.verbose and self.storage_calls:
                told = "; ".join(f"{method} {_told(calls)}" for method, calls in self.storage_calls.items())
                self._err(f"{self.name}: storage: {told}")

    def error(self, error: CoffretError) -> None:
        """The one line of a failure: what happened, and what to do."""
        self.close()
        self._over = True
        message, remedy = str(error), error.remedy
        if self.as_json:
            with contextlib.suppress(ReaderGone, OutputLost):
                self._json("error", message=message, remedy=remedy, code=error.exit_code)
        text = f"coffret: {message}" + (f" ({remedy})" if remedy else "")
        self._err(printable(os.fsencode(" ".join(text.splitlines()))))

    def note(self, text: str) -> None:
        """A remark."""
        if self.as_json:
            self._json("status", note=text)
        elif not self.quiet:
            self._err(printable(os.fsencode(f"{self.name}: note: {text}")))

    def aside(self, text: str) -> None:
        """A line beside the result, for people; not in JSON."""
        if not self.as_json and not self.quiet:
            self._err(f"{self.name}: {printable(os.fsencode(text))}")

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
                if self._over:  # it was woken just before it was cancelled
                    return
                if self.as_json:
                    self._json("status", **self._counters())
                elif not self.verbose:
                    self._err(self._plain())

    async def _run_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, highlight=False)
        # Neither stream is redirected: `_err` prints above the display, and `summary` is printed when it is gone.
        self._live = live = Live(
            console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        # The terminal may go away: a signal tells.
        with contextlib.suppress(OSError):
            live.start()
            while self._live is not None:
                await anyio.sleep(_REDRAW_S)
                if self._live is not None:
                    live.update(self._drawn(console.width, console.height), refresh=True)
        self.close()

    def close(self) -> None:
        """Clear the live display away, if there is one."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

    def _drawn(self, width: int, height: int) -> Any:
        from rich.text import Text

        lines = progress_lines(self.name, self.progress, self._elapsed(), self._phase_elapsed(), width)
        shown = lines[: max(1, height - 1)]
        return Text("\n".join(shown), no_wrap=True, overflow="crop")

    def _elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def _phase_elapsed(self) -> float:
        """Seconds since the phase began, as far as it was looked at."""
        now = time.perf_counter()
        if self.progress.phase != self._phase:
            self._phase, self._phase_begin = self.progress.phase, now
        return now - self._phase_begin

    def _plain(self) -> str:
        progress = self.progress
        phase = "" if progress.phase == self.name else f" {progress.phase}:"
        cells = _amounts(self.name, progress)
        cells += [counted(progress.errors, "error")] if progress.errors else []
        return f"{self.name}:{phase} {', '.join(cells)}".removesuffix(": ")

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
        elif self.dry_run:
            self._out(f"{self.name}: {item.status}: {printable(item.path)}")
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
    :raises OutputLost: if it can't be written for another reason
    """
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again at its end
        raise ReaderGone(*error.args) if isinstance(error, BrokenPipeError) else OutputLost(error) from None


def progress_lines(name: str, progress: Progress, elapsed_s: float, phase_s: float, width: int) -> list[str]:
    """What a terminal of `width` columns shows of a command at work: the phase, a bar, counters, what is being read."""
    phase = "" if progress.phase == name else f" {progress.phase}"
    lines = [f"{name}{phase}  {format_duration(int(elapsed_s))}"]
    amounts = _amounts(name, progress)
    done, total = _measure(name, progress)
    if total:
        lines.append(_bar(done, total, phase_s, width))
    if amounts and not _by_files(name, progress):
        amounts.append(f"{format_size(int(done / max(phase_s, 0.001)))}/s")
    if progress.stored_bytes:
        amounts += [f"added {format_size(progress.added_bytes)}", f"stored {format_size(progress.stored_bytes)}"]
        amounts.append(f"ratio {progress.added_bytes / progress.stored_bytes:.2f}")
    if progress.errors:
        amounts.append(counted(progress.errors, "error"))
    lines += _filled(amounts, width)
    return lines + [f"  {cut_left(printable(path), width - 2)}" for path in list(progress.current.values())]


def _by_files(name: str, progress: Progress) -> bool:
    """Whether the work is measured in files: a check goes through catalogs when its packs are done."""
    return name == "check" and progress.phase != "packs"


def _measure(name: str, progress: Progress) -> tuple[int, int | None]:
    """(how much is done, of how much), in what the work is measured in."""
    if _by_files(name, progress):
        return progress.files, progress.files_total
    return max(progress.size_bytes, progress.read_bytes), progress.size_total


def _amounts(name: str, progress: Progress) -> list[str]:
    """Files and bytes done, as far as they mean anything by now."""
    if progress.phase == "opening":
        return []
    of_files = f" of {progress.files_total:,}" if progress.files_total else ""
    of_bytes = f" of {format_size(progress.size_total)}" if progress.size_total else ""
    files = counted(progress.files, "object" if name == "clone" else "file") + of_files
    size = format_size(max(progress.size_bytes, progress.read_bytes)) + of_bytes
    if name != "check":
        return [files, size]
    if _by_files(name, progress):
        return [files]
    return [size] if progress.size_total else []  # a fast one reads none


def _bar(done: int, total: int, elapsed_s: float, width: int) -> str:
    """A bar, how much of it is done, and how long the rest takes at the speed so far."""
    done = min(done, total)
    room = max(10, min(_BAR_MAX, width - _BESIDE_BAR))
    filled = room * done // total
    left = f"  {format_duration(int((total - done) / done * elapsed_s))} left" if done else ""
    return f"{'━' * filled}{'╌' * (room - filled)} {100 * done // total:3} %{left}"


def _filled(cells: Sequence[str], width: int) -> list[str]:
    """Cells in lines of at most `width` columns."""
    lines: list[str] = []
    for cell in cells:
        if lines and len(lines[-1]) + len(cell) + 2 <= width:
            lines[-1] += f"  {cell}"
        else:
            lines.append(cell)
    return lines


def terminal() -> bool:
    """Whether a passphrase can be asked for."""
    return sys.stdin.isatty() and os.isatty(2)
