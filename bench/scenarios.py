"""The scenarios: what every contender is asked to do, in which state of the machine, and in which order.

In each round every scenario goes through all contenders before the next begins, and each round starts with another
contender: so that what else happens on the machine hits all alike, and ratios are taken round by round.
"""

from __future__ import annotations

import enum
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.changes import one_percent, undo
from bench.compare import differences
from bench.contenders import Place, version_of
from bench.measure import CommandFailed, Usage, drop_caches, run, stored_bytes, warm
from bench.restored import RestoredTrees
from bench.results import Measurement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.contenders import Arguments, Contender
    from bench.datasets import Dataset
    from bench.results import Run

# A file that is read within two seconds of its last change is read again by the next backup, since a later change might
# show the same time (FAT keeps two seconds); so a round begins when the changes of the one before are older.
_SETTLE_S = 2.1


class Scenario(enum.StrEnum):
    """What is measured. All but `first` and `cold` work on what `first` has stored."""

    COLD = "cold"  # first backup, nothing cached
    FIRST = "first"  # first backup into a new repository, the data cached
    UNCHANGED = "unchanged"  # again, nothing has changed
    RESTORE = "restore"  # to an empty directory, syncfs of the target before and after
    CHECK = "check"  # read and verify everything stored
    ONE_PERCENT = "one-percent"  # again, with 1 % changed


class Bench:
    """One run over one data set. `round` adds to `measurements`, which can be read at any time."""

    def __init__(
        self,
        run_: Run,
        dataset: Dataset,
        contenders: Sequence[Contender],
        folder: Path,
        scenarios: Sequence[Scenario],
        tell: Callable[[str], None] = print,
    ) -> None:
        self._run = run_
        self._dataset = dataset
        self._contenders = contenders
        self._folder = folder
        self._scenarios = frozenset(scenarios)
        self._tell = tell
        self._sampled = False
        self._usable: set[str] = set()  # contenders whose repository has a backup
        self._restored = RestoredTrees(folder / f"restored-{dataset.name}", room_bytes=dataset.tree_bytes)
        self._versions = {contender.name: version_of(contender) for contender in contenders}
        self._lines: dict[tuple[str, str], Measurement] = {}

    @property
    def measurements(self) -> list[Measurement]:
        """What there is so far, a line for each scenario and contender."""
        return list(self._lines.values())

    def round(self, number: int, *, sampled: bool = False) -> None:
        """Take all contenders through all scenarios, once.

        A `sampled` round finds the peaks of memory and compares what is restored with the source, instead of the time.
        """
        undo(self._dataset)
        time.sleep(_SETTLE_S)
        self._sampled = sampled
        self._usable.clear()
        start = number % max(1, len(self._contenders))
        order = [*self._contenders[start:], *self._contenders[:start]]
        try:
            if Scenario.COLD in self._scenarios and not sampled:
                self._cold(order)
            self._first(order)
            if Scenario.UNCHANGED in self._scenarios:
                self._unchanged(order)
            if Scenario.RESTORE in self._scenarios:
                self._restore(order)
            if Scenario.CHECK in self._scenarios:
                self._check(order)
            if Scenario.ONE_PERCENT in self._scenarios:
                self._one_percent(order, number)
        finally:
            for contender in order:
                self._place(contender).remove()

    def _cold(self, order: Sequence[Contender]) -> None:
        for contender in order:
            if self._create(contender, Scenario.COLD):
                drop_caches()
                self._measure(Scenario.COLD, contender, contender.backup, serial=0)
            self._place(contender).remove()

    def _first(self, order: Sequence[Contender]) -> None:
        for contender in order:
            if not self._create(contender, Scenario.FIRST):
                continue
            # A contender may have told the kernel that it needs what it read no longer.
            warm(self._dataset.path)
            if self._measure(Scenario.FIRST, contender, contender.backup, serial=0) is not None:
                self._usable.add(contender.name)
                size = stored_bytes(self._place(contender).repository)
                self._line(Scenario.FIRST, contender).repository_bytes = size

    def _unchanged(self, order: Sequence[Contender]) -> None:
        warm(self._dataset.path, contents=False)
        for contender in self._again(order):
            self._measure(Scenario.UNCHANGED, contender, contender.backup, serial=1)

    def _restore(self, order: Sequence[Contender]) -> None:
        for contender in order:
            if contender.name in self._usable and contender.restore:
                target = self._restored.make_target()
                warm(self._place(contender).repository)
                self._measure(Scenario.RESTORE, contender, contender.restore, target)
                if self._sampled:
                    self._compare(contender, target)

    def _check(self, order: Sequence[Contender]) -> None:
        for contender in order:
            if contender.name in self._usable and contender.check:
                warm(self._place(contender).repository)
                self._measure(Scenario.CHECK, contender, contender.check)

    def _one_percent(self, order: Sequence[Contender], number: int) -> None:
        with one_percent(self._dataset, f"{self._dataset.seed} {number}"):
            for contender in self._again(order):
                warm(self._dataset.path)
                self._measure(Scenario.ONE_PERCENT, contender, contender.backup, serial=2)

    def _again(self, order: Sequence[Contender]) -> Iterator[Contender]:
        return (contender for contender in order if contender.again and contender.name in self._usable)

    def _place(self, contender: Contender) -> Place:
        return Place(self._folder / contender.name)

    def _create(self, contender: Contender, scenario: Scenario) -> bool:
        """Make an empty repository; whether that worked."""
        try:
            contender.make(self._place(contender))
        except CommandFailed as error:
            self._fail(scenario, contender, error)
            return False
        return True

    def _measure(
        self, scenario: Scenario, contender: Contender, template: Arguments, target: Path | None = None, serial: int = 0
    ) -> Usage | None:
        """Execute one command and add what it took to its line; None if it failed."""
        place, source = self._place(contender), self._dataset.path
        folder = contender.restore_from if target is not None else "{home}"
        command = contender.command(template, place, folder=folder, source=source, target=target, serial=serial)
        try:
            usage = run(command, place.folder / f"{scenario}.log", sample=self._sampled, sync_on=target)
        except CommandFailed as error:
            self._fail(scenario, contender, error)
            return None
        line = self._line(scenario, contender)
        line.add(usage)
        line.summary = summary_of(usage.output) or line.summary
        if usage.memory is not None:
            self._say(scenario, contender, f"{usage.memory.asked / 1e6:8.0f} MB (not timed)")
        else:
            cpu_s = usage.user_s + usage.system_s
            self._say(scenario, contender, f"{usage.wall_s:8.2f} s wall  {cpu_s:8.2f} s CPU")
        return usage

    def _compare(self, contender: Contender, target: Path) -> None:
        """Note what of the source a restore did not bring back."""
        source = self._dataset.path
        whole = target / source.relative_to("/")
        found = differences(source, whole if whole.is_dir() else target)
        if found:
            self._line(Scenario.RESTORE, contender).faults.append(f"restored tree differs: {'; '.join(found)}")
            self._say(Scenario.RESTORE, contender, f"differs: {found[0]}")

    def _fail(self, scenario: Scenario, contender: Contender, error: CommandFailed) -> None:
        line = self._line(scenario, contender)
        line.faults.append(str(error))
        if not self._sampled:
            line.add(None)
        self._say(scenario, contender, f"failed: {error}")

    def _say(self, scenario: Scenario, contender: Contender, text: str) -> None:
        self._tell(f"  {self._dataset.name:8} {scenario:12} {contender.name:15} {text}")

    def _line(self, scenario: Scenario, contender: Contender) -> Measurement:
        key = (str(scenario), contender.name)
        if key not in self._lines:
            others = {Scenario.RESTORE: contender.restore, Scenario.CHECK: contender.check}
            arguments = (Path(contender.program).name, *others.get(scenario, contender.backup))
            self._lines[key] = Measurement(
                run=self._run,
                dataset=self._dataset,
                scenario=scenario,
                contender=contender.name,
                version=self._versions[contender.name],
                command=shlex.join(arguments),
                wall_s=[],
            )
        return self._lines[key]


def summary_of(output: str) -> dict[str, Any]:
    """The last line of a command's output, if it is a JSON object."""
    last = output.rstrip().rpartition("\n")[2]
    try:
        found = json.loads(last)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
