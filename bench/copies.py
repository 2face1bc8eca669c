"""Measure copies between repositories on this machine.

python -m bench.copies                              everything, five rounds
python -m bench.copies --parts clone --rounds 3

`clone` is timed beside `cp -r` of the repository's folder and an fsync of each file and folder of the copy, which makes
that copy as durable as a clone is when it returns. Contenders alternate; the original is read once before each, as in
all scenarios, and everything is written out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.bars import CLONE
from bench.contenders import PASSPHRASE
from bench.datasets import default_folder, load
from bench.measure import Command, CommandFailed, run, stored_bytes, warm
from bench.results import DEFAULT_FILE, Measurement, append, ratios, spread, this_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.datasets import Dataset
    from bench.results import Run

PARTS = ("clone",)
# coreutils' sync is fsync(2) of each name it is given.
_COPY = 'cp -r "$0" "$1" && find "$1" -print0 | xargs -0 sync'


@dataclass
class CopyBench:
    """One run: a repository of one snapshot of `dataset`, and copies of it, below `work`."""

    run: Run
    dataset: Dataset
    work: Path
    measurements: list[Measurement] = field(default_factory=list)

    def prepare(self) -> None:
        """Make the repository."""
        self._execute("create", sample=False)
        self._execute("backup", self.dataset.root, sample=False)

    @property
    def repository(self) -> Path:
        """What is copied."""
        return self.work / "repository"

    def _command(self, *words: str) -> Command:
        return Command((sys.executable, "-m", "coffret", *words), self._environment(), self.work)

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        own = {name: str(self.work / name) for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")}
        return {**kept, **own, "COFFRET_REPOSITORY": str(self.repository), "COFFRET_PASSPHRASE": PASSPHRASE}

    def _execute(self, *words: str, sample: bool) -> None:
        run(self._command(*words), self.work / "log", sample=sample)

    def clone(self, rounds: int, *, memory: bool) -> None:
        """Time both in each round, each time with another one first; then sample the memory of one clone."""
        copy = str(self.work / "copy")
        commands = {
            "coffret": self._command("clone", copy),
            "cp": Command(("sh", "-ec", _COPY, str(self.repository), copy), self._environment(), self.work),
        }
        shown = {"coffret": "coffret clone {copy}", "cp": _COPY.replace("$0", "{repository}").replace("$1", "{copy}")}
        size_bytes = stored_bytes(self.repository)
        lines = {
            name: Measurement(
                run=self.run,
                dataset=self.dataset,
                scenario=CLONE,
                contender=name,
                version="",
                command=shown[name],
                wall_s=[],
                repository_bytes=size_bytes,
            )
            for name in commands
        }
        for number in range(rounds):
            for name in sorted(commands, reverse=bool(number % 2)):
                self._one(lines[name], commands[name], sample=False)
        if memory:
            self._one(lines["coffret"], commands["coffret"], sample=True)
        self.measurements += lines.values()

    def _one(self, line: Measurement, command: Command, *, sample: bool) -> None:
        shutil.rmtree(self.work / "copy", ignore_errors=True)
        warm(self.repository)
        try:
            line.add(run(command, self.work / "log", sample=sample))
        except CommandFailed as error:
            line.add(None)
            line.faults.append(str(error))


def told(lines: Sequence[Measurement]) -> str:
    """What was measured, for people."""
    texts = []
    for line in lines:
        wall, cpu = line.wall, spread(line.cpu_s)
        if wall is None or cpu is None:
            texts.append(f"{line.scenario}: {line.contender} failed: {'; '.join(line.faults)}")
            continue
        memory = f", {line.memory_bytes / 1e6:.0f} MB" if line.memory_bytes else ""
        size = f"{(line.repository_bytes or 0) / 1e6:,.0f} MB"
        texts.append(
            f"{line.scenario} of {size}: {line.contender} {wall.median:.2f} s ({wall.min:.2f} to {wall.max:.2f}),"
            f" {cpu.median:.2f} CPU s{memory}"
        )
    ours = next((line.wall_s for line in lines if line.contender == "coffret"), [])
    theirs = next((line.wall_s for line in lines if line.contender == "cp"), [])
    if found := spread(ratios(ours, theirs)):
        texts.append(f"{CLONE} / cp, round by round: {found.median:.2f} ({found.min:.2f} to {found.max:.2f})")
    return "\n".join(texts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _parser().parse_args(arguments)
    parts = tuple(options.parts.split(",")) if options.parts else PARTS
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"bench.copies: no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    dataset = load(options.data, options.dir, scale=options.scale)
    run_ = this_run(options.dir)
    work = (options.work or options.dir / "work") / run_.run
    work.mkdir(parents=True)
    print(f"run {run_.run}, commit {run_.commit}, load {run_.machine['load']}: {', '.join(parts)}", flush=True)
    bench = CopyBench(run_, dataset, work)
    try:
        bench.prepare()
        bench.clone(options.rounds, memory=not options.no_memory)
    finally:
        append(options.results, bench.measurements)
        print(told(bench.measurements), flush=True)
        shutil.rmtree(work, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.copies", description="Measure copies between repositories.")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where data sets lie")
    parser.add_argument("--work", type=Path, help="where repositories lie; default: DIR/work")
    parser.add_argument("--data", default="big", help="the data set that is in the repository")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size of the data set")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--no-memory", action="store_true", help="leave out the round that samples memory")
    parser.add_argument("--parts", metavar="NAMES", help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--results", type=Path, default=DEFAULT_FILE, help="file to append lines to")
    return parser


if __name__ == "__main__":
    main()
