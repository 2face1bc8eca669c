"""Run the program on a terminal, as a person does: type what it asks for, see what it prints."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.harness import interpreter

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness import Program

# Far above what any command here takes.
_PATIENCE_S = 60.0
# ESC [ ... letter, and the two-byte sequences: what moves a cursor or sets a colour.
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[^\[])")


@dataclass
class Terminal:
    """A command on a terminal of 100 columns. `text` is all that was printed so far, control sequences included."""

    pid: int
    descriptor: int
    text: str = ""
    _seen: int = 0

    def expect(self, words: str) -> None:
        """Wait until it prints this, after what was expected before."""
        end = time.monotonic() + _PATIENCE_S
        while (at := self.text.find(words, self._seen)) < 0:
            assert self._read(end), f"it ended without {words!r}: {self.text!r}"
        self._seen = at + len(words)

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self.descriptor, line.encode() + b"\n")

    def press(self, character: str) -> None:
        """Press a key."""
        os.write(self.descriptor, character.encode())

    def end(self) -> int:
        """Wait for its end; return the exit code."""
        end = time.monotonic() + _PATIENCE_S
        while self._read(end):
            pass
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def plain(self) -> list[str]:
        """The lines printed, without control sequences."""
        return [line.rstrip("\r") for line in _ESCAPES.sub("", self.text).split("\n")]

    @property
    def screen(self) -> list[str]:
        """The lines that are there to be seen, as far as carriage returns, erasing and moving up a line go."""
        lines, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", self.text):
            if token == "\r":
                column = 0
            elif token == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif not token.startswith("\x1b"):
                lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
                column += len(token)
            elif token.endswith("A"):
                row = max(0, row - int(token[2:-1] or 1))
            elif token == "\x1b[2K":
                lines[row] = ""
        return [line.rstrip() for line in lines if line.strip()]

    def _read(self, end: float) -> bool:
        ready, _, _ = select.select([self.descriptor], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"it hung, having printed {self.text!r}")
        try:
            data = os.read(self.descriptor, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.text += data.decode("utf-8", "replace")
        return bool(data)


def start(program: Program, *arguments: str | bytes | Path) -> Terminal:
    """Start a command of `program` on a terminal of its own."""
    python, search_path = interpreter(None)
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C.UTF-8",
        "TERM": "xterm-256color",
        "COLUMNS": "100",
        "LINES": "40",
        "PYTHONPATH": search_path,
        "HOME": str(program.home),
        "XDG_CACHE_HOME": str(program.home / "cache"),
        "XDG_STATE_HOME": str(program.home / "state"),
        "COFFRET_REPOSITORY": str(program.repository),
        **program.environment,
    }
    words = [os.fsencode(word) for word in (python, "-m", "coffret", *arguments)]
    pid, descriptor = pty.fork()
    if pid == 0:
        try:
            os.chdir(program.home)
            os.execve(python, words, environment)
        finally:
            os._exit(127)
    return Terminal(pid, descriptor)
