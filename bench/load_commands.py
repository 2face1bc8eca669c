"""Commands of `coffret` side by side on one repository: counted, their memory sampled, and what goes wrong kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.memory import MemorySampler, descendants

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

IN_THE_WAY = 11
# Far above what any command takes here: one that takes longer hangs.
_PATIENCE_S = 180.0
_SAMPLE_EVERY_S = 0.2
# What an attempt says, with the same exit code, that was ended by others three times in a row.
_TAKEN_FOR_DEAD = "another process ended this"
# The program as a host has it whose clock is wrong by so many seconds.
_SKEWED = """
import sys, time
now, now_ns, skew_s = time.time, time.time_ns, int(sys.argv.pop(1))
time.time, time.time_ns = lambda: now() + skew_s, lambda: now_ns() + skew_s * 10**9
from coffret.cli import main
main()
"""
# How often harm is done, for how long a process stands still, and how far a lease is put back (s).
_HARM_EVERY_S, _STOPPED_S, _AGED_S = (0.1, 2.0), (0.1, 4.0), 3600.0


@dataclass(slots=True)
class Tally:
    """Commands of one kind. `memory_bytes`: peak of one with its workers, in the first and in the second half."""

    done: int = 0
    in_the_way: int = 0
    ended: int = 0  # by others: killed, or taken for dead again and again
    longest_s: float = 0.0
    memory_bytes: list[int] = field(default_factory=lambda: [0, 0])


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended; `objects` are those of --json."""

    code: int
    objects: list[dict[str, Any]]

    @property
    def summary(self) -> dict[str, Any]:
        """The last of a command that was done."""
        return self.objects[-1]


@dataclass(frozen=True, slots=True)
class Host:
    """A machine: its home folder, and by how much its clock is wrong."""

    home: Path
    skew_s: int = 0


class Commands:
    """Runs commands, from any thread. `environment` says which repository, and how it is opened."""

    def __init__(self, environment: Mapping[str, str], half_s: float) -> None:
        self.tallies: dict[str, Tally] = {}
        self.faults: list[str] = []
        self._environment, self._half = environment, time.monotonic() + half_s
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._killed: set[subprocess.Popen[bytes]] = set()
        self._harmed = False

    def run(self, host: Host, kind: str, *words: str) -> Outcome | None:
        """Run a command to its end. None if others ended it, or if it went wrong, which is a fault."""
        begin = time.monotonic()
        process = self._start(host, (kind, "--json", *words))
        with MemorySampler(process.pid, _SAMPLE_EVERY_S) as sampler:
            out, err, hung = _ended(process)
        with self._lock:
            self._running.remove(process)
            tally = self.tallies.setdefault(kind, Tally())
            tally.longest_s = max(tally.longest_s, time.monotonic() - begin)
            half = begin > self._half
            tally.memory_bytes[half] = max(tally.memory_bytes[half], sampler.peak.asked)
            code, failed = process.returncode, hung or "Traceback" in err
            if process in self._killed or (self._harmed and code == IN_THE_WAY and _TAKEN_FOR_DEAD in err):
                tally.ended += 1
            elif not failed and code in ((0, IN_THE_WAY) if kind == "maintenance" else (0,)):
                tally.done += code == 0
                tally.in_the_way += code == IN_THE_WAY
                return Outcome(code, [json.loads(line) for line in out.splitlines()])
            else:
                self.faults.append(f"{kind} {' '.join(words)}: {hung or f'exit code {code}'}\n{err[-4000:]}")
        return None

    def fault(self, text: str) -> None:
        """Something is wrong."""
        with self._lock:
            self.faults.append(text)

    def harm(self, rng: random.Random, leases: Path, over: threading.Event) -> None:
        """Until it is over: kill processes, stop them for a while, and let all that are at work be taken for dead."""
        while not over.wait(rng.uniform(*_HARM_EVERY_S)):
            with self._lock:
                if not self._running:
                    continue
                process = rng.choice(self._running)
                if rng.random() < 0.3:
                    self._killed.add(process)
                    process.kill()
                    continue
                self._harmed = True
                process.send_signal(signal.SIGSTOP)
            if rng.random() < 0.5:
                age(leases)
            over.wait(rng.uniform(*_STOPPED_S))
            with self._lock:
                if process in self._running:
                    process.send_signal(signal.SIGCONT)
        age(leases)

    def _start(self, host: Host, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        home = str(host.home)
        folders = {"HOME": home, "XDG_CACHE_HOME": f"{home}/cache", "XDG_STATE_HOME": f"{home}/state"}
        program = ("-c", _SKEWED, str(host.skew_s)) if host.skew_s else ("-m", "coffret")
        with self._lock:
            process = subprocess.Popen(
                (sys.executable, "-X", "faulthandler", *program, *words),
                env={**kept, **folders, **self._environment},
                cwd=host.home,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
            self._running.append(process)
        return process


def age(leases: Path) -> None:
    """Put all leases back by an hour, behind the storage's back: who holds one is taken for dead."""
    for lease in leases.iterdir() if leases.is_dir() else ():
        with suppress(FileNotFoundError):
            os.utime(lease, times=(time.time() - _AGED_S,) * 2)


def _ended(process: subprocess.Popen[bytes]) -> tuple[bytes, str, str]:
    """Wait for the end of a process: its output, its errors, and, if it hung and was killed, what it was doing."""
    hung = ""
    try:
        out, err = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        hung = f"hung, {_doing(process.pid)}"
        process.send_signal(signal.SIGABRT)  # says where each thread is
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return out, err.decode(errors="replace"), hung


def _doing(pid: int) -> str:
    """What a process and those below it wait for in the kernel."""
    found = []
    for each in descendants(pid):
        with suppress(OSError):
            folder = Path(f"/proc/{each}")
            words = (folder / "cmdline").read_bytes().split(b"\0")[1:5]
            found.append(f"{b' '.join(words).decode()} in {(folder / 'wchan').read_text()}")
    return "; ".join(found)
