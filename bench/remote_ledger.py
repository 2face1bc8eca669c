"""What the remote scenarios measured: commands are executed, and lines kept."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from bench.contenders import version_of
from bench.measure import CommandFailed, run
from bench.results import Measurement
from bench.scenarios import summary_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.contenders import Contender
    from bench.datasets import Dataset
    from bench.measure import Command, Usage
    from bench.results import Run


class Ledger:
    """The lines of one run, by data set, scenario and contender. While `sampled`, memory is looked at, not time."""

    def __init__(self, run_: Run, folder: Path, tell: Callable[[str], None]) -> None:
        self._run, self.folder, self.tell = run_, folder, tell
        self.sampled = False
        self._lines: dict[tuple[str, str, str], Measurement] = {}

    @property
    def measurements(self) -> list[Measurement]:
        """What there is so far, a line for each scenario and contender."""
        return list(self._lines.values())

    def measure(
        self,
        dataset: Dataset,
        scenario: str,
        name: str,
        contender: Contender,
        command: Command,
        *,
        sync_on: Path | None = None,
    ) -> Usage | None:
        """Execute one command and add what it took to its lines; None if it failed."""
        try:
            usage = run(command, self.folder / "measured.log", sample=self.sampled, sync_on=sync_on)
        except CommandFailed as error:
            self.fail(dataset, scenario, name, contender, error)
            return None
        line = self.line(dataset, scenario, name, contender, command)
        line.add(usage)
        line.summary = summary_of(usage.output) or line.summary
        if usage.memory is not None:
            text = f"{usage.memory.asked / 1e6:8.0f} MB (not timed)"
        else:
            text = f"{usage.wall_s:8.2f} s wall  {usage.user_s + usage.system_s:8.2f} s CPU"
        self.tell(f"  {scenario:28} {name:22} {text}")
        return usage

    def fail(self, dataset: Dataset, scenario: str, name: str, contender: Contender, error: CommandFailed) -> None:
        """Note that a command failed."""
        line = self.line(dataset, scenario, name, contender)
        line.faults.append(str(error))
        if not self.sampled:
            line.add(None)
        self.tell(f"  {scenario:28} {name:22} failed: {error}")

    def line(
        self, dataset: Dataset, scenario: str, name: str, contender: Contender, command: Command | None = None
    ) -> Measurement:
        """The line of a scenario and contender, made when it is first asked for."""
        key = (dataset.name, scenario, name)
        if key not in self._lines:
            self._lines[key] = Measurement(
                run=self._run,
                dataset=dataset,
                scenario=scenario,
                contender=name,
                version=version_of(contender),
                command=self._shown(command, dataset) if command else "",
                wall_s=[],
            )
        return self._lines[key]

    def _shown(self, command: Command, dataset: Dataset) -> str:
        """A command for people anywhere: without the places that programs, data and storages have here."""
        program, *arguments = command.arguments
        shown = shlex.join((Path(program).name, *arguments))
        return shown.replace(str(self.folder), ".").replace(str(dataset.path), "{source}")


def calls_of(line: Measurement) -> int:
    """The calls of the connector in the last run, as its summary tells them."""
    return sum(calls["calls"] for calls in line.summary.get("storage", {}).values())
