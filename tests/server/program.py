"""`coffret server` as a process."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from bench.remote_servers import Server
from tests.harness import ROOT, Program

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence
    from pathlib import Path


class ServerProcess(Server):
    """`coffret at FOLDER/repository server`, on one port, that can be killed and started again; its state lies beside.

    `words`: more of the command line. Unless it is started with `--no-auth` there must be a token.
    """

    def __init__(self, folder: Path, *words: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / "log")
        self.root, self._words = folder, words
        #: The program as it is run on the server's host.
        self.program = Program(folder)
        self.url = f"http{'s' if '--tls-cert' in words else ''}://127.0.0.1:{self.port}/"

    def command(self) -> Sequence[str]:
        return [sys.executable, "-m", "coffret", "server", "--listen", f"127.0.0.1:{self.port}", *self._words]

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": str(ROOT / ".pkg"),
            "HOME": str(self.root),
            "XDG_STATE_HOME": str(self.root / "state"),
            "COFFRET_REPOSITORY": str(self.root / "repository"),
        }

    def token(self, right: str) -> str:
        """A new token."""
        token: str = self.program("server", "token", "add", f"--{right}", "--json").summary["token"]
        return token

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; its exit code."""
        assert self._process is not None
        try:
            return self._process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                self.kill()
