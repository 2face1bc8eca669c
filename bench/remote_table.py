"""The table of the remote scenarios."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.bars import MB, is_remote
from bench.results import Measurement, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.results import Line

    Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def remote_table(lines: Sequence[Line], table: Table, scale: float | None = None) -> str:
    """Of the newest run of each scenario: seconds, CPU seconds and memory of each contender; "" if there are none."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for line in lines:
        if not isinstance(line, Measurement) or not is_remote(line) or line.dataset is None:
            continue
        if scale is not None and line.dataset.scale != scale:
            continue
        group = groups.setdefault((line.scenario, line.dataset.name), [])
        if group and group[0].run.run != line.run.run:
            if line.run.run < group[0].run.run:
                continue
            group.clear()
        group.append(line)
    rows = [
        [
            f"{dataset}, {scenario}" if not at else "",
            line.contender, _seconds(line), _cpu(line), _memory(line), _requests(line),
        ]
        for (scenario, dataset), group in groups.items()
        for at, line in enumerate(group)
    ]  # fmt: skip
    header = ["over the network, and copies", "contender", "s", "its CPU, s", "memory, MB", "requests"]
    return table(header, rows) if rows else ""


def _seconds(line: Measurement) -> str:
    if line.wall is None:
        return "failed" if line.faults else "–"
    return f"{line.wall.median:.2f} ({line.wall.min:.2f}–{line.wall.max:.2f})"


def _cpu(line: Measurement) -> str:
    found = spread(line.cpu_s)
    return f"{found.median:.2f}" if found else "–"


def _memory(line: Measurement) -> str:
    return f"{line.memory_bytes / MB:,.0f}" if line.memory_bytes else "–"


def _requests(line: Measurement) -> str:
    return ", ".join(map(str, sorted(set(line.requests)))) if line.requests else "–"
