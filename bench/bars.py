"""The bars: what is to be reached, and whether the newest run that can tell says so."""

from __future__ import annotations

import enum
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.results import Dedup, Measurement, ratios

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.results import Line, Run

OURS = "coffret"
# What remote scenarios are named after (`bench.remote`), and the contenders that are Coffret otherwise.
STORAGES = {"s3": "aiobotocore", "sftp": "asyncssh"}  # with the library a bare loop uses
LOCAL, UNDELAYED = f"{OURS}, local", f"{OURS}, no delay"
CONNECTOR, CONNECTOR_UNDELAYED = "connector", "connector, no delay"
TRANSFER_MS, RESTORE_MS = 20, 50
# Scenarios of copies (`bench.sync`, `bench.copies`), and what a copy to S3 is compared with.
COPIES = "copies"
SYNC, SYNC_S3, CLONE = f"{COPIES}: sync", f"{COPIES}: sync to S3", f"{COPIES}: clone"
FIRST_BACKUP = f"{OURS}, first backup"
MB = 1_000_000


class Kind(enum.Enum):
    """What a bar is about; the value is what its figure looks like."""

    TIME_RATIO = "{:.2f} ×"
    SIZE_RATIO = "{:.3f} ×"
    MEMORY_MB = "{:.0f} MB"
    MORE_MEMORY_MB = "{:+.0f} MB"
    REQUESTS = "{:.0f}"
    ENTRY_US = "{:.1f} µs an entry"
    SECONDS = "{:.3f} s"


@dataclass(frozen=True, slots=True)
class Bar:
    """At most `limit`, of what `kind` says, in a scenario on a data set, against another contender if one is named.

    `against` may be several, separated by "|": the slowest of them in each round.
    """

    dataset: str
    scenario: str
    kind: Kind
    limit: float
    against: str = ""
    ours: str = OURS

    def show(self, value: float) -> str:
        """A figure of this bar's, with its unit."""
        return self.kind.value.format(value)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was measured for a bar, in which run, over how many rounds; `value` is None when nothing was."""

    bar: Bar
    value: float | None = None
    rounds: int = 0
    run: Run | None = None

    @property
    def reached(self) -> bool:
        """Whether it was measured and is not above the limit."""
        return self.value is not None and self.value <= self.bar.limit


def _remote_bars(storage: str, library: str) -> tuple[Bar, ...]:
    """What is to be reached over the network. A throughput that stays 0.9 times as high takes 1.11 times as long."""
    far, ratio, slowed = f"at {TRANSFER_MS} ms", Kind.TIME_RATIO, 1 / 0.9
    unchanged = f"{storage}: unchanged at {RESTORE_MS} ms"
    return (
        Bar("big", f"{storage}: first", ratio, 0.75, "restic"),
        Bar("big", f"{storage}: first", ratio, 1.15, f"{LOCAL}|{library}"),
        Bar("big", f"{storage}: restore", ratio, 0.7, "restic"),
        Bar("big", f"{storage}: first", Kind.MORE_MEMORY_MB, 100, LOCAL),
        Bar("big", f"{storage}: put {far}", ratio, slowed, CONNECTOR_UNDELAYED, CONNECTOR),
        Bar("big", f"{storage}: get {far}", ratio, slowed, CONNECTOR_UNDELAYED, CONNECTOR),
        Bar("big", f"{storage}: first {far}", ratio, slowed, UNDELAYED),
        Bar("big", f"{storage}: restore at {RESTORE_MS} ms", ratio, 1.3, UNDELAYED),
        Bar("small", unchanged, Kind.SECONDS, 2),
        Bar("small", unchanged, Kind.REQUESTS, 12),
    )


BARS = (
    *(Bar(name, "first", Kind.TIME_RATIO, limit, "tar") for name, limit in (("big", 0.75), ("small", 0.8))),
    *(Bar(name, "cold", Kind.TIME_RATIO, limit, "rustic") for name, limit in (("big", 0.36), ("small", 0.4))),
    *(Bar(name, "restore", Kind.TIME_RATIO, limit, "tar") for name, limit in (("big", 0.45), ("small", 0.7))),
    *(Bar(name, "check", Kind.TIME_RATIO, 0.5, "rustic") for name in ("big", "small")),
    *(Bar(name, "unchanged", Kind.TIME_RATIO, limit, "rustic") for name, limit in (("big", 1.0), ("small", 0.18))),
    *(Bar(name, "first", Kind.SIZE_RATIO, limit, "rustic") for name, limit in (("big", 1.04), ("small", 0.93))),
    *(Bar(name, "any", Kind.MEMORY_MB, limit) for name, limit in (("big", 450), ("small", 450), ("million", 600))),
    Bar("million", "unchanged", Kind.ENTRY_US, 8),
    Bar("edits", "ten versions", Kind.SIZE_RATIO, 1.02, "rustic"),
    Bar("none", "version", Kind.SECONDS, 0.1),
    *(bar for storage, library in STORAGES.items() for bar in _remote_bars(storage, library)),
    Bar("big", SYNC, Kind.TIME_RATIO, 0.35, "rustic"),
    Bar("big", SYNC_S3, Kind.TIME_RATIO, 1.1, FIRST_BACKUP),
    Bar("big", CLONE, Kind.TIME_RATIO, 1.2, "cp"),
)


def is_remote(line: Line) -> bool:
    """Whether a line is of a scenario over the network, or of copies."""
    return isinstance(line, Measurement) and line.scenario.partition(":")[0] in (*STORAGES, COPIES)


def judge(bar: Bar, lines: Sequence[Line]) -> Verdict:
    """Find the newest run with all that a bar needs, and its figure."""
    for run_id in sorted({line.run.run for line in lines}, reverse=True):
        chosen = [line for line in lines if line.run.run == run_id]
        values = _dedup_values(bar, chosen) if bar.dataset == "edits" else _values(bar, chosen)
        if values:
            value = max(values) if bar.kind in (Kind.MEMORY_MB, Kind.REQUESTS) else statistics.median(values)
            return Verdict(bar, value, len(values), chosen[0].run)
    return Verdict(bar)


def _values(bar: Bar, lines: Iterable[Line]) -> list[float]:
    """The figure in each round, of the lines of one run."""
    found = {
        line.contender: line
        for line in lines
        if isinstance(line, Measurement) and line.scenario == bar.scenario and _name(line) == bar.dataset
    }
    ours = found.get(bar.ours)
    others = [found[name] for name in bar.against.split("|") if name in found]
    if bar.kind is Kind.MEMORY_MB:
        peaks = [line.memory_bytes for line in lines if isinstance(line, Measurement) and line.contender == OURS
                 and _name(line) == bar.dataset and not is_remote(line)]  # fmt: skip
        return [peak / MB for peak in peaks if peak]
    if ours is None or (bar.against and len(others) <= bar.against.count("|")):
        return []
    times = [time for time in ours.wall_s if time is not None]
    if bar.kind is Kind.SECONDS:
        return times
    if bar.kind is Kind.REQUESTS:
        return [float(count) for count in ours.requests]
    if bar.kind is Kind.ENTRY_US:
        return [time / ours.dataset.entries * 1e6 for time in times] if ours.dataset is not None else []
    if bar.kind is Kind.TIME_RATIO:
        return ratios(ours.wall_s, _slowest([line.wall_s for line in others]))
    if bar.kind is Kind.MORE_MEMORY_MB:
        theirs = others[0].memory_bytes
        return [(ours.memory_bytes - theirs) / MB] if ours.memory_bytes and theirs else []
    return ratios([ours.repository_bytes], [others[0].repository_bytes])


def _slowest(times: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The longest time of each round, if there are all of them."""
    rounds = zip(*times, strict=False)
    return [max(known) if len(known := [time for time in each if time is not None]) == len(each) else None
            for each in rounds]  # fmt: skip


def _dedup_values(bar: Bar, lines: Iterable[Line]) -> list[float]:
    """The ratio of each seed, of the lines of one run."""
    found = {line.contender: line for line in lines if isinstance(line, Dedup)}
    if OURS not in found or bar.against not in found:
        return []
    return ratios(found[OURS].stored_bytes, found[bar.against].stored_bytes)


def _name(line: Measurement) -> str:
    return line.dataset.name if line.dataset is not None else "none"
