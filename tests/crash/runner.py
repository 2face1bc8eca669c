"""A process that has everything imported, and forks one that runs a command, as often as it is told to.

`python -m tests.crash.runner` reads a request a line, JSON, and answers each with a line. It never has a thread: so a
fork of it is as good as a program of its own, and takes 10 ms instead of 300. `Runner` is its other end.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.fault_harness import cheap_passphrases
from tests.harness import ROOT, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

MODULES = (
    "aiobotocore.config", "aiobotocore.session", "aiohttp", "asyncssh", "botocore.auth", "rich.console",
    "coffret.commands.backup", "coffret.commands.check", "coffret.commands.clone", "coffret.commands.create",
    "coffret.commands.ls", "coffret.commands.maintenance", "coffret.commands.passphrase", "coffret.commands.prune",
    "coffret.commands.repair", "coffret.commands.restore", "coffret.commands.rm", "coffret.commands.sync",
    "coffret.engine.mirror", "coffret.engine.ops.backup", "coffret.engine.ops.check", "coffret.engine.ops.clone",
    "coffret.engine.ops.maintenance", "coffret.engine.ops.prune", "coffret.engine.ops.repair",
    "coffret.engine.ops.restore", "coffret.engine.ops.rm", "coffret.engine.ops.sync", "coffret.engine.storecache",
    "tests.crash.deaths", "tests.crash.recording",
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """How a command ended, and the calls that changed the storage that was watched."""

    outcome: Outcome
    calls: list[str]

    @property
    def died(self) -> bool:
        """Whether a signal ended it."""
        return self.outcome.code < 0


class Runner:
    """Runs commands in forks of one process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / ".pkg"), str(ROOT)))},
            text=True,
        )

    def run(
        self,
        words: Sequence[str | Path],
        environment: Mapping[str, str],
        *,
        death: tuple[str, int, str] | None = None,
        parts: bool = False,
        record: tuple[Path, Path] | None = None,
    ) -> Ran:
        """Run a command, which may be made to die: (the storage's URL, the call's number, the mode).

        `parts`: for S3 all objects are large. `record`: a log, and the
        folder that `tests.crash.recording` is to note the changes of.
        """
        line = [os.fspath(word) for word in words]
        request = {
            "words": line,
            "environment": dict(environment),
            "death": death,
            "parts": parts,
            "record": record and [os.fspath(path) for path in record],
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return Ran(Outcome(tuple(line), answer["code"], answer["stdout"], answer["stderr"]), answer["calls"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def main() -> None:
    """Answer requests until there are no more."""
    for module in MODULES:
        __import__(module)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    gc.collect()
    gc.freeze()
    with cheap_passphrases():
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line))), file=answers)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    files = [os.memfd_create(name) for name in ("stdout", "stderr", "calls")]
    try:
        pid = os.fork()
        if not pid:
            _be_the_program(request, *files)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out, err, calls = (os.pread(file, os.fstat(file).st_size, 0).decode() for file in files)
        return {"code": code, "stdout": out, "stderr": err, "calls": calls.splitlines()}
    finally:
        for file in files:
            os.close(file)


def _be_the_program(request: dict[str, Any], out: int, err: int, calls: int) -> None:
    """What `python -m coffret` does, in the child; never returns."""
    from tests.crash.deaths import Death
    from tests.crash.halves import all_in_parts
    from tests.crash.recording import record

    from coffret import cli

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in ((1, out), (2, err)):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["coffret", *request["words"]]
    if request["parts"]:
        all_in_parts()
    if request["record"]:
        record(*request["record"])
    if request["death"]:
        url, number, mode = request["death"]
        Death(url, number, mode, lambda call: print_to(calls, call)).install()
    cli.main()


def print_to(file: int, line: str) -> None:
    """Write a line past all buffers: the process may be about to die."""
    os.write(file, f"{line}\n".encode())


if __name__ == "__main__":
    main()
