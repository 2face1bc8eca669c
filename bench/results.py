"""What is kept of a run: one JSON line a measurement, with everything needed to read it years later."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bench.datasets import Dataset  # noqa: TC001 - msgspec resolves the annotation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.measure import Usage

DEFAULT_FILE = Path(__file__).parent / "results.jsonl"


class Run(msgspec.Struct, frozen=True):
    """What all lines of one run have in common. Only lines of the same run are compared."""

    run: str
    time: str
    commit: str
    machine: dict[str, str | float]


class Spread(msgspec.Struct, frozen=True):
    """Minimum, median and maximum."""

    min: float
    median: float
    max: float


class Measurement(msgspec.Struct, tag="scenario", kw_only=True, omit_defaults=True):
    """What one contender took for one scenario on one data set.

    `wall_s` has a value a round, in the order of the rounds, None where the command failed: ratios are taken round by
    round. `memory_bytes` and `resident_bytes` are peaks of all processes together, from a round that is not timed.
    `requests`: what a storage was asked for, a value a round.
    """

    run: Run
    dataset: Dataset | None
    scenario: str
    contender: str
    version: str
    command: str
    wall_s: list[float | None]
    cpu_s: list[float | None] = []
    system_s: list[float | None] = []
    wall: Spread | None = None
    memory_bytes: int | None = None
    resident_bytes: int | None = None
    processes: int | None = None
    repository_bytes: int | None = None
    requests: list[int] = []
    faults: list[str] = []
    summary: dict[str, Any] = {}

    def add(self, usage: Usage | None) -> None:
        """Take in one round: its times, or its peaks of memory if those were sampled; None says that it failed."""
        if usage is not None and usage.memory is not None:
            self.memory_bytes = max(usage.memory.asked, self.memory_bytes or 0)
            self.resident_bytes = max(usage.memory.resident, self.resident_bytes or 0)
            self.processes = max(usage.memory.processes, self.processes or 0)
            return
        self.wall_s.append(None if usage is None else usage.wall_s)
        self.cpu_s.append(None if usage is None else usage.user_s + usage.system_s)
        self.system_s.append(None if usage is None else usage.system_s)
        self.wall = spread(self.wall_s)


class Dedup(msgspec.Struct, tag="dedup", kw_only=True, omit_defaults=True):
    """What one contender stores of the ten versions of *edits*, in bytes for each seed; None where it failed."""

    run: Run
    seeds: list[int]
    versions: int
    contender: str
    version: str
    first_bytes: list[int | None]
    stored_bytes: list[int | None]
    faults: list[str] = []


class Primitives(msgspec.Struct, tag="primitives", kw_only=True):
    """Speeds of the primitives on one core, and the CPU seconds that each scenario needs at least.

    `megabytes_per_s` and `microseconds` (a file or entry) by primitive; `bounds_s` by scenario, all cores together.
    """

    run: Run
    dataset: Dataset
    megabytes_per_s: dict[str, float]
    microseconds: dict[str, float]
    stored_share: float
    bounds_s: dict[str, float]


class Load(msgspec.Struct, tag="load", kw_only=True, omit_defaults=True):
    """Clients and maintenance on one repository for a while; `commands` has what `load_commands.Tally` has, by kind."""

    run: Run
    storage: str
    clients: int
    seconds: float
    harm: bool
    commands: dict[str, dict[str, Any]]
    snapshots: int
    restored: int
    swept_packs: int
    freed_bytes: int
    repository_bytes: int
    faults: list[str] = []


Line = Measurement | Dedup | Primitives


def this_run(folder: Path) -> Run:
    """Describe the present: commit of the checkout, machine, and the file system of `folder`."""
    now = time.gmtime()
    machine: dict[str, str | float] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": _output("stat", "-f", "-c", "%T", str(folder)),
        "load": round(os.getloadavg()[0], 2),
    }
    checkout = str(Path(__file__).parent)
    commit = _output("git", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=12") or "unknown"
    return Run(time.strftime("%Y%m%d-%H%M%S", now), time.strftime("%Y-%m-%dT%H:%M:%SZ", now), commit, machine)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _output(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout.strip()


def spread(values: Iterable[float | None]) -> Spread | None:
    """Minimum, median and maximum of what is there; None of nothing."""
    known = [value for value in values if value is not None]
    return Spread(min(known), statistics.median(known), max(known)) if known else None


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Ours to theirs, round by round, of the rounds that both have."""
    return [a / b for a, b in zip(ours, theirs, strict=False) if a is not None and b]


def append(file: Path, lines: Iterable[Line | Load]) -> None:
    """Add lines at the end of a file."""
    with file.open("ab") as output:
        output.writelines(msgspec.json.encode(line) + b"\n" for line in lines)


def read(file: Path) -> list[Line | Load]:
    """All lines of a file, oldest first; none if there is no file."""
    if not file.exists():
        return []
    decode = msgspec.json.Decoder(Line | Load).decode
    return [decode(line) for line in file.read_bytes().splitlines() if line]
