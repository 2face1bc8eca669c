"""Run the benchmarks: append a JSON line a measurement, and print a table.

python -m bench.run                                     everything, five rounds
python -m bench.run --only coffret,tar,rustic small     one data set, three contenders
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from bench.bars import OURS
from bench.contenders import Place, available, prototype, version_of
from bench.datasets import default_folder, load
from bench.dedup import measure_dedup
from bench.measure import CommandFailed, can_drop_caches, run
from bench.primitives import measure_primitives
from bench.report import dedup_table, primitives_table, scenario_tables, version_table
from bench.results import DEFAULT_FILE, Measurement, Primitives, append, this_run
from bench.scenarios import Bench, Scenario
from bench.tables import plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.contenders import Contender
    from bench.datasets import Dataset
    from bench.results import Line, Run

PARTS = ("version", "primitives", "big", "small", "edits", "million")
# A million files take some of the others half an hour a round; they are run on it when they are named.
_MILLION_CONTENDERS = (OURS, "tar", "rustic")
_VERSION_STARTS = 4  # a round


class NotEnoughSpace(Exception):
    """The repositories of all contenders would not fit on the disk."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _parser().parse_args(arguments)
    contenders = available(options.only.split(",") if options.only else None)
    if options.prototype:
        contenders.append(prototype(options.prototype))
    options.dir.mkdir(parents=True, exist_ok=True)
    run_ = this_run(options.dir)
    _tell(f"run {run_.run}, commit {run_.commit}: " + ", ".join(contender.name for contender in contenders))
    work = options.dir / "work" / run_.run
    work.mkdir(parents=True)
    try:
        for part in options.parts or PARTS:
            for lines in _measure(part, run_, contenders, work, options):
                append(options.results, lines)
                _tell(_table(lines))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.run", description="Run the benchmarks.")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where data sets and repositories lie")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size of the data sets")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--no-memory", action="store_true", help="leave out the round that samples memory and compares")
    parser.add_argument("--only", metavar="NAMES", help="contenders, separated by commas")
    parser.add_argument("--scenarios", metavar="NAMES", help="of " + ",".join(Scenario) + "; default: all")
    parser.add_argument("--prototype", metavar="COMMAND", help="one that takes SOURCE and TARGET, as another contender")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds of edits")
    parser.add_argument("--results", type=Path, default=DEFAULT_FILE, help="file to append lines to")
    parser.add_argument("parts", nargs="*", metavar="PART", help="of " + ", ".join(PARTS))
    return parser


def _measure(
    part: str, run_: Run, contenders: Sequence[Contender], work: Path, options: argparse.Namespace
) -> Iterator[list[Line]]:
    """The lines of one part; what is measured before an interruption is kept."""
    if part == "version":
        yield _version_starts(run_, contenders, work, options.rounds)
    elif part == "edits":
        sample = load("small", options.dir, scale=options.scale).path
        able = [contender for contender in contenders if contender.again]
        seeds = range(1, options.seeds + 1)
        yield list(measure_dedup(run_, able, work, seeds, scale=options.scale, sample=sample, tell=_tell))
    elif part == "primitives":
        for name in ("big", "small", "million"):
            yield [measure_primitives(run_, load(name, options.dir, scale=options.scale), work)]
    else:
        few = part == "million" and not options.only
        chosen = [contender for contender in contenders if not few or contender.name in _MILLION_CONTENDERS]
        yield from _rounds(run_, load(part, options.dir, scale=options.scale), chosen, work, options)


def _rounds(
    run_: Run, dataset: Dataset, contenders: Sequence[Contender], work: Path, options: argparse.Namespace
) -> Iterator[list[Line]]:
    _check_space(dataset, contenders, work)
    bench = Bench(run_, dataset, contenders, work, _scenarios(options.scenarios), _tell)
    try:
        if not options.no_memory:
            bench.round(0, sampled=True)
        for number in range(options.rounds):
            bench.round(number)
    finally:
        lines: list[Line] = list(bench.measurements)
        yield lines


def _scenarios(names: str | None) -> list[Scenario]:
    """Those named, or all that can be run here.

    :raises ValueError: if one is not known
    """
    if names:
        return [Scenario(name) for name in names.split(",")]
    if can_drop_caches():
        return list(Scenario)
    _tell("the page cache can't be dropped by this user: scenario `cold` is left out")
    return [scenario for scenario in Scenario if scenario is not Scenario.COLD]


def _check_space(dataset: Dataset, contenders: Sequence[Contender], work: Path) -> None:
    """Refuse to begin what can't end.

    :raises NotEnoughSpace: if the repositories and a restored tree might not fit
    """
    needed = dataset.size_bytes * len(contenders) + 2 * dataset.tree_bytes
    free = shutil.disk_usage(work).free
    if free < needed:
        raise NotEnoughSpace(f"{dataset.name} needs {needed / 1e9:.0f} GB, {work} has {free / 1e9:.0f} GB")


def _version_starts(run_: Run, contenders: Sequence[Contender], work: Path, rounds: int) -> list[Line]:
    """How long each program takes to say its version."""
    lines = []
    for contender in contenders:
        if not contender.version or not contender.again:
            continue
        place = Place(work / contender.name)
        place.make()
        command = contender.command(contender.version, place)
        line = Measurement(
            run=run_,
            dataset=None,
            scenario="version",
            contender=contender.name,
            version=version_of(contender),
            command=" ".join((Path(contender.program).name, *contender.version)),
            wall_s=[],
        )
        for _ in range(rounds * _VERSION_STARTS):
            try:
                line.add(run(command, place.folder / "version.log", sample=False))
            except CommandFailed as error:
                line.faults.append(str(error))
                line.add(None)
        lines.append(line)
        place.remove()
    return list(lines)


def _tell(text: str) -> None:
    print(text, flush=True)


def _table(lines: Sequence[Line]) -> str:
    scale = max((line.dataset.scale for line in lines if isinstance(line, Primitives)), default=1)
    tables = [version_table(lines), *scenario_tables(lines), dedup_table(lines), primitives_table(lines, scale, plain)]
    return "\n\n".join(table for table in tables if table) + "\n"


if __name__ == "__main__":
    main()
