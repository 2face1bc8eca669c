"""Commands that die at each call that changes a storage, and what must hold afterwards, wherever that was.

* `check` finds nothing wrong, and the snapshots of before are restored as they were;
* the command, repeated, does what it was to do: where a lease of the dead is in the way, after an hour;
* after a day nothing is left of the death: no lease, no temporary file, no unfinished upload.

The storage's clock is moved by making what lies there older. Everything else is as it is for users: the program, its
cache and state as the dead process left them, real storages.
"""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING

from tests.crash.deaths import DONE, modes_of
from tests.crash.ground import Ground
from tests.crash.power import Disk, lay_out
from tests.crash.scenes import SCENES
from tests.fault_harness import PASSPHRASE, contents

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.power import Tree
    from tests.crash.runner import Ran, Runner
    from tests.crash.scenes import Scene

    # The number of a call, and how a process dies there.
    Point = tuple[int, str]

# What maintenance leaves to a later hour; no put takes a day.
_A_DAY_HOURS = 25
_LEFT_OVER = ("leases/", "tmp/", ".sgwtmp/")


class Campaign(Ground):
    """Commands that die, and what comes after. `tally`: how much was tried, by command and way."""

    def __init__(self, runner: Runner, home: Path, kind: str) -> None:
        super().__init__(runner, home, kind)
        self.tally: Counter[tuple[str, str]] = Counter()
        # Of each scene that was set: the calls that its command makes, and the snapshots there are at its end.
        self._scenes: dict[str, tuple[list[str], list[str]]] = {}

    def _run_scene(self, scene: Scene, death: Point | None = None, codes: tuple[int, ...] = (0,)) -> Ran:
        return self.run(*scene.words, peer=scene.peer, death=death, codes=codes, environment=dict(scene.environment))

    # Points -----------------------------------------------------------------------------------------------------------

    def points(self, name: str) -> list[Point]:
        """Each call of a command at which it can die, and how."""
        calls = self.calls(name)
        return [
            (number, mode)
            for number, call in enumerate(calls)
            for mode in modes_of(self.place.url, call, last=number == len(calls) - 1)
        ]

    def calls(self, name: str) -> list[str]:
        """The calls by which a command changes the storage."""
        return self._whole(name)[0]

    def die(self, name: str, point: Point) -> tuple[set[str], set[str]]:
        """Let a command die at a point; return what there was before, and after."""
        self._whole(name)
        self.put_back(name)
        before = self.place.names()
        self.parts = point[1] == "unfinished"
        self._run_scene(SCENES[name], point)
        self.parts = False
        return before, self.place.names()

    def _whole(self, name: str) -> tuple[list[str], list[str]]:
        """A scene is set, and its command comes to its end: the calls that it makes, the snapshots there are then."""
        if name not in self._scenes:
            scene = SCENES[name]
            self.put_back("nothing" if scene.fresh else "three snapshots")
            scene.prepare(self)
            self.keep(name)
            calls = self._run_scene(scene, (-1, DONE)).calls
            self.passphrase = scene.opens[0]
            self.run("check", "--workers", "1", codes=scene.ends)
            self._scenes[name] = calls, self.listed()
        return self._scenes[name]

    def one(self, name: str, point: Point, *, briefly: bool = False) -> None:
        """Let a command die at a point, and see that all is well; `briefly`: read what matters once."""
        scene = SCENES[name]
        _, listed = self._whole(name)
        self.die(name, point)
        self.parts = point[1] == "unfinished"
        self._survived(scene, point[0], briefly=briefly)
        self._repeat(scene)
        self._ended_well(scene, listed, briefly=briefly)
        self.parts = False
        self.tally[name, point[1]] += 1

    # Power losses, of a storage that is a folder ----------------------------------------------------------------------

    def set_up(self, name: str) -> Disk:
        """What a command finds; and a disk on which that is certain, and what the user's machine knows of it."""
        self._whole(name)
        self.put_back(name)
        return Disk.holding(*self._on_disk)

    @property
    def _on_disk(self) -> list[Path]:
        return [self.place.folder, self.home / "cache", self.home / "state"]

    def record(self, name: str, log: Path, death: Point | None = None) -> None:
        """Run a command, which may die, and note what it does to files."""
        if death is None:
            self._find_passphrase(SCENES[name])
        self.log = log
        try:
            if death is not None:
                self._run_scene(SCENES[name], death)
            else:
                self._repeat(SCENES[name])
        finally:
            self.log = None

    def listed_after(self, name: str) -> list[str]:
        """The snapshots there are when a command has ended."""
        self.passphrase = SCENES[name].opens[0]
        return self.listed()

    def after_loss(self, name: str, number: int, tree: Tree, reported: list[str] | None) -> None:
        """See that all is well after a power loss that has left these files.

        `reported`: the command had ended before, and these snapshots were there: so they are now.
        """
        scene = SCENES[name]
        _, listed = self._whole(name)
        self.put_back(name)
        for folder in self._on_disk:
            shutil.rmtree(folder, ignore_errors=True)
        lay_out(tree)
        if reported is not None:
            self._check_done(scene, reported)
            self.passphrase = scene.opens[0]
        self._survived(scene, number, briefly=True)
        if reported is None:
            self._repeat(scene)
        self._ended_well(scene, listed, briefly=True)
        self.tally[name, "power loss"] += 1

    # What must hold ---------------------------------------------------------------------------------------------------

    def _survived(self, scene: Scene, number: int, *, briefly: bool) -> None:
        """Right after a death."""
        self._find_passphrase(scene)
        fast = ["--fast"] if briefly and 4 not in scene.check else []
        checked = self.run("check", *fast, "--workers", "1", codes=scene.check)
        if checked.outcome.code != 10 and scene.stays:
            snapshot = self.earlier[scene.stays[number % len(scene.stays)]]
            self.check_restored(snapshot, self.contents[snapshot])

    def _find_passphrase(self, scene: Scene) -> None:
        """Use the first passphrase that opens the repository: one must."""
        if scene.words[0] != "passphrase":
            return
        for self.passphrase in (PASSPHRASE, *scene.opens):
            if self.run("ls", codes=(0, 12)).outcome.code == 0:
                return
        raise AssertionError("no passphrase opens the repository")

    def _repeat(self, scene: Scene) -> None:
        """Run the command again, as users do who find that it has died."""
        if self._run_scene(scene, codes=(0, 11, *scene.again)).outcome.code == 11:
            self.place.age(hours=1)
            self._run_scene(scene)

    def _ended_well(self, scene: Scene, listed: list[str], *, briefly: bool) -> None:
        """What was asked for is done, and after a day there are no traces of the death."""
        found = self._check_done(scene, listed)
        self.place.age(hours=_A_DAY_HOURS)
        self.run("maintenance", "--grace", "0")
        assert not [name for name in self.place.names() if name.startswith(_LEFT_OVER)]
        self.run("check", *(["--fast"] if briefly else []), "--workers", "1")
        if scene.words[0] == "backup":
            self.check_restored("latest", contents(self.home / "source"))
        elif found and not briefly:
            last = [snapshot for snapshot in found if snapshot in self.contents][-1]
            self.check_restored(last, self.contents[last])

    def _check_done(self, scene: Scene, listed: list[str]) -> list[str]:
        """See that passphrases and snapshots are as they were to be; return the snapshots' ids."""
        for self.passphrase in scene.closed:
            self.run("ls", codes=(12,))
        for self.passphrase in reversed(scene.opens):
            found = self.listed()
        assert self.contents.keys() & set(found) == self.contents.keys() & set(listed)
        assert len(found) >= len(listed)
        return found
