"""The table of the remote scenarios."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.bars import MB
from bench.results import Measurement, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.results import Line

    Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

STORAGES = ("s3", "sftp")


def is_remote(line: Line) -> bool:
    """Whether a line is of a scenario over the network."""
    return isinstance(line, Measurement) and line.scenario.partition(":")[0] in STORAGES


def remote_table(lines: Sequence[Line], table: Table) -> str:
    """Of the newest run of each scenario: seconds, CPU seconds and memory of each contender; "" if there are none."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for line in lines:
        if isinstance(line, Measurement) and is_remote(line) and line.dataset is not None:
            group = groups.setdefault((line.scenario, line.dataset.name), [])
            if group and group[0].run.run != line.run.run:
                if line.run.run < group[0].run.run:
                    continue
                group.clear()
            group.append(line)
    rows = [
        [f"{dataset}, {scenario}" if not at else "", line.contender, _seconds(line), _cpu(line), _memory(line)]
        for (scenario, dataset), group in groups.items()
        for at, line in enumerate(group)
    ]
    return table(["scenario", "contender", "s", "CPU, s", "memory, MB"], rows) if rows else ""


def _seconds(line: Measurement) -> str:
    if line.wall is None:
        return "failed" if line.faults else "–"
    return f"{line.wall.median:.2f} ({line.wall.min:.2f}–{line.wall.max:.2f})"


def _cpu(line: Measurement) -> str:
    found = spread(line.cpu_s)
    return f"{found.median:.2f}" if found else "–"


def _memory(line: Measurement) -> str:
    return f"{line.memory_bytes / MB:,.0f}" if line.memory_bytes else "–"
