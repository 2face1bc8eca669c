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
MB = 1_000_000


class Kind(enum.Enum):
    """What a bar is about; the value is what its figure looks like."""

    TIME_RATIO = "{:.2f} ×"
    SIZE_RATIO = "{:.3f} ×"
    MEMORY_MB = "{:.0f} MB"
    ENTRY_US = "{:.1f} µs an entry"
    SECONDS = "{:.3f} s"


@dataclass(frozen=True, slots=True)
class Bar:
    """At most `limit`, of what `kind` says, in a scenario on a data set, against another contender if one is named."""

    dataset: str
    scenario: str
    kind: Kind
    limit: float
    against: str = ""

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
)


def judge(bar: Bar, lines: Sequence[Line]) -> Verdict:
    """Find the newest run with all that a bar needs, and its figure."""
    for run_id in sorted({line.run.run for line in lines}, reverse=True):
        chosen = [line for line in lines if line.run.run == run_id]
        values = _dedup_values(bar, chosen) if bar.dataset == "edits" else _values(bar, chosen)
        if values:
            value = max(values) if bar.kind is Kind.MEMORY_MB else statistics.median(values)
            return Verdict(bar, value, len(values), chosen[0].run)
    return Verdict(bar)


def _values(bar: Bar, lines: Iterable[Line]) -> list[float]:
    """The figure in each round, of the lines of one run."""
    found = {
        line.contender: line
        for line in lines
        if isinstance(line, Measurement) and line.scenario == bar.scenario and _name(line) == bar.dataset
    }
    ours, theirs = found.get(OURS), found.get(bar.against)
    if bar.kind is Kind.MEMORY_MB:
        peaks = [line.memory_bytes for line in lines if isinstance(line, Measurement) and line.contender == OURS
                 and _name(line) == bar.dataset]  # fmt: skip
        return [peak / MB for peak in peaks if peak]
    if ours is None or (bar.against and theirs is None):
        return []
    times = [time for time in ours.wall_s if time is not None]
    if bar.kind is Kind.SECONDS:
        return times
    if bar.kind is Kind.ENTRY_US:
        return [time / ours.dataset.entries * 1e6 for time in times] if ours.dataset is not None else []
    assert theirs is not None
    if bar.kind is Kind.TIME_RATIO:
        return ratios(ours.wall_s, theirs.wall_s)
    return ratios([ours.repository_bytes], [theirs.repository_bytes])


def _dedup_values(bar: Bar, lines: Iterable[Line]) -> list[float]:
    """The ratio of each seed, of the lines of one run."""
    found = {line.contender: line for line in lines if isinstance(line, Dedup)}
    if OURS not in found or bar.against not in found:
        return []
    return ratios(found[OURS].stored_bytes, found[bar.against].stored_bytes)


def _name(line: Measurement) -> str:
    return line.dataset.name if line.dataset is not None else "none"
