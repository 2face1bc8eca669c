"""Turn the JSON lines into tables, verdicts on the bars, and a picture.

python -m bench.report                                        Markdown on standard output
python -m bench.report --into bench/README.md --svg bench/report.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bench.bars import BARS, MB, OURS, Kind, is_remote, judge
from bench.picture import picture
from bench.remote_table import remote_table
from bench.results import DEFAULT_FILE, Dedup, Load, Measurement, Primitives, read, spread
from bench.scenarios import Scenario
from bench.tables import markdown, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.results import Line, Run

    Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

BEGIN, END = "<!-- figures: begin (python -m bench.report) -->", "<!-- figures: end -->"
_WHAT = {
    Kind.SIZE_RATIO: "repository size",
    Kind.MEMORY_MB: "peak of memory",
    Kind.MORE_MEMORY_MB: "{}: memory",
    Kind.REQUESTS: "{}: requests",
}


def newest(lines: Sequence[Line], scale: float) -> dict[tuple[str, str], list[Measurement]]:
    """By data set and scenario: the lines of the newest run that compares, else of the newest run."""
    groups: dict[tuple[str, str], dict[str, list[Measurement]]] = {}
    for line in lines:
        if is_remote(line):
            continue
        if isinstance(line, Measurement) and line.dataset is not None and line.dataset.scale == scale:
            groups.setdefault((line.dataset.name, line.scenario), {}).setdefault(line.run.run, []).append(line)
    return {
        key: max(runs.items(), key=lambda item: (len(item[1]) > 1, item[0]))[1] for key, runs in sorted(groups.items())
    }


def scenario_tables(lines: Sequence[Line], table: Table = plain, scale: float | None = None) -> list[str]:
    """For each data set: seconds by contender and scenario, repository size and peak of memory."""
    if scale is None:
        scale = max((line.dataset.scale for line in lines if isinstance(line, Measurement) and line.dataset), default=1)
    found = newest(lines, scale)
    tables = []
    for name in sorted({dataset for dataset, _ in found}):
        scenarios = [scenario for scenario in Scenario if (name, scenario) in found]
        by_contender: dict[str, dict[str, Measurement]] = {}
        for scenario in scenarios:
            for line in found[name, scenario]:
                by_contender.setdefault(line.contender, {})[scenario] = line
        header = [name, *(f"{scenario}, s" for scenario in scenarios), "repository, MB", "memory, MB"]
        rows = [
            [contender, *(_seconds(of.get(scenario)) for scenario in scenarios), _size(of), _peak(of)]
            for contender, of in by_contender.items()
        ]
        tables.append(table(header, rows))
    return tables


def version_table(lines: Sequence[Line], table: Table = plain) -> str:
    """How long the programs take to say their version, or nothing if that was not measured."""
    found = [line for line in lines if isinstance(line, Measurement) and line.dataset is None]
    return table(["program", "version, s"], [[line.contender, _seconds(line)] for line in found]) if found else ""


def dedup_table(lines: Sequence[Line], table: Table = plain) -> str:
    """What the versions of *edits* take, or nothing if that was not measured."""
    runs = [line.run.run for line in lines if isinstance(line, Dedup)]
    found = [line for line in lines if isinstance(line, Dedup) and line.run.run == max(runs)]
    if not found:
        return ""
    header = ["edits", "first version, MB", f"{found[0].versions} versions, MB", "added, MB"]
    rows = []
    for line in found:
        first, last = spread(line.first_bytes), spread(line.stored_bytes)
        sizes = (first.median, last.median, last.median - first.median) if first and last else ()
        rows.append([line.contender, *(f"{size / MB:.1f}" for size in sizes)])
    return table(header, rows)


def bars_table(lines: Sequence[Line], scale: float, table: Table = markdown) -> str:
    """Every bar: its limit, what was measured, and whether it is reached."""
    at_scale = [
        line for line in lines if isinstance(line, Dedup) or line.dataset is None or line.dataset.scale == scale
    ]
    rows = []
    for bar in BARS:
        verdict = judge(bar, at_scale)
        measured = "not measured" if verdict.value is None else bar.show(verdict.value)
        against = " or ".join(f"{name}'s" for name in bar.against.split("|") if name)
        what = _WHAT.get(bar.kind, "{}").format(bar.scenario)
        answer = "" if verdict.value is None else "yes" if verdict.reached else "**no**"
        run_id = verdict.run.run if verdict.run else ""
        rows.append(
            [
                f"{bar.dataset}: {what}" if bar.dataset != "none" else f"`{OURS} {what}`",
                against,
                "≤ " + bar.show(bar.limit),
                measured,
                answer,
                run_id,
            ]
        )
    return table(["bar", "against", "limit", "measured", "reached", "run"], rows)


def bounds_table(lines: Sequence[Line], scale: float, table: Table = markdown) -> str:
    """How far each scenario is from the sum of its primitives, or nothing if those were not measured."""
    bounds = {line.dataset.name: line for line in lines if isinstance(line, Primitives) and line.dataset.scale == scale}
    measured = newest(lines, scale)
    rows = []
    for name, primitives in bounds.items():
        for scenario, bound in primitives.bounds_s.items():
            if not bound:  # lines of before kept milliseconds
                continue
            ours = [line for line in measured.get((name, scenario), []) if line.contender == OURS]
            if ours and ours[0].wall is not None:
                wall_s = ours[0].wall.median
                rows.append([f"{name}: {scenario}", f"{bound:.3g}", f"{wall_s:.2f}", f"{wall_s / bound:.2f}"])
    return table(["scenario", "sum of primitives, s", "measured, s", "times"], rows) if rows else ""


def primitives_table(lines: Sequence[Line], scale: float, table: Table = markdown) -> str:
    """What the primitives cost, or nothing if that was not measured."""
    found = {line.dataset.name: line for line in lines if isinstance(line, Primitives) and line.dataset.scale == scale}
    names = dict.fromkeys(name for line in found.values() for name in (*line.megabytes_per_s, *line.microseconds))
    rows = []
    for name in names:
        row = [name]
        for line in found.values():
            speed, cost = line.megabytes_per_s.get(name), line.microseconds.get(name)
            row.append(f"{speed:,.0f} MB/s" if speed is not None else f"{cost:,.1f} µs" if cost is not None else "")
        rows.append(row)
    return table(["one core", *found], rows) if rows else ""


def report(lines: Sequence[Line], scale: float = 1.0) -> str:
    """The whole report as Markdown."""
    runs = {line.run.run: line.run for line in lines}
    if not runs:
        return "Nothing has been measured yet."
    parts = [_machine(runs[max(runs)]), bars_table(lines, scale)]
    parts += ["Medians of seconds, and the range of the rounds; memory is the peak of all processes together."]
    parts += scenario_tables(lines, markdown, scale)
    parts += [remote_table(lines, markdown, scale)]
    parts += [dedup_table(lines, markdown), bounds_table(lines, scale), primitives_table(lines, scale), _faults(lines)]
    return "\n\n".join(part for part in parts if part)


def _machine(run: Run) -> str:
    machine = run.machine
    memory = int(machine["memory_bytes"]) / 2**30
    return (
        f"Newest run: {run.time}, commit {run.commit}, {machine['cores']} cores of {machine['cpu']}, {memory:.0f} GiB, "
        f"Linux {machine['kernel']}, {machine['file_system']}, Python {machine['python']}; load average before it "
        f"{machine['load']}."
    )


def _faults(lines: Sequence[Line]) -> str:
    """What went wrong in the newest run."""
    last = max(line.run.run for line in lines)
    faults = [
        f"- {line.contender}: {line.faults[0].splitlines()[0]}"
        for line in lines
        if isinstance(line, Measurement | Dedup) and line.run.run == last and line.faults
    ]
    return "\n".join(["What failed in the newest run:", "", *faults]) if faults else ""


def _seconds(line: Measurement | None) -> str:
    if line is None:
        return "–"
    if line.wall is None:
        return "failed" if line.faults else "–"
    return f"{line.wall.median:.2f} ({line.wall.min:.2f}–{line.wall.max:.2f})"


def _size(of: dict[str, Measurement]) -> str:
    first = of.get(Scenario.FIRST)
    return f"{first.repository_bytes / MB:,.0f}" if first is not None and first.repository_bytes else "–"


def _peak(of: dict[str, Measurement]) -> str:
    peaks = [line.memory_bytes for line in of.values() if line.memory_bytes]
    return f"{max(peaks) / MB:,.0f}" if peaks else "–"


def write_into(file: Path, text: str) -> None:
    """Replace what lies between the marks in a file.

    :raises ValueError: if the marks are not there
    """
    head, begin, rest = file.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} has no lines {BEGIN} and {END}")
    file.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the lines and write the report."""
    parser = argparse.ArgumentParser(prog="bench.report", description="Report what the benchmarks measured.")
    parser.add_argument("--results", type=Path, default=DEFAULT_FILE, help="file with the lines")
    parser.add_argument("--scale", type=float, default=1.0, help="report on data sets of this scale")
    parser.add_argument("--into", type=Path, metavar="FILE", help="replace the figures in a Markdown file")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture")
    options = parser.parse_args(arguments)
    lines = [line for line in read(options.results) if not isinstance(line, Load)]
    text = report(lines, options.scale)
    if options.into is not None:
        write_into(options.into, text)
    else:
        print(text)
    if options.svg is not None:
        options.svg.write_text(picture(newest(lines, options.scale)))


if __name__ == "__main__":
    main()
