"""Where commands are tried: a repository on a storage of some kind, its peer in a folder, sources, cache and state.

All of it can be kept as it is, and put back. Commands run as users run them, each in a process of its own.
"""

from __future__ import annotations

import os
import random
import shutil
from typing import TYPE_CHECKING

from tests.crash.places import PLACES, copy_tree
from tests.crash.scenes import ANOTHER
from tests.fault_harness import PASSPHRASE, contents

if TYPE_CHECKING:
    from pathlib import Path

    from tests.crash.places import Place
    from tests.crash.runner import Ran, Runner

    Point = tuple[int, str]


class Ground:
    """A repository with three snapshots and two passphrases on one kind of storage, and a peer with two snapshots."""

    def __init__(self, runner: Runner, home: Path, kind: str) -> None:
        self._runner, self._kept = runner, home / "kept"
        #: All that lies on the user's machine: sources, the peer, cache and state.
        self.home = home / "home"
        self.place: Place = PLACES[kind](home)
        #: Of each snapshot that was ever made what it holds; the ids of the three that each scene begins with.
        self.contents: dict[str, dict[str, bytes | str]] = {}
        self.earlier: list[str] = []
        #: The objects that came with the last snapshot.
        self.made_last: set[str] = set()
        #: The passphrase that is used now; the slot of the other.
        self.passphrase, self._slot = PASSPHRASE, ""
        #: Whether all objects are large ones, for S3; and where what is done to files is noted, if it is.
        self.parts = False
        self.log: Path | None = None
        self._build()

    # A repository and its peer ----------------------------------------------------------------------------------------

    def _build(self) -> None:
        chance = random.Random(1)
        for source in (self.home / "source", self.home / "peer source"):
            source.mkdir(parents=True)
            for number in range(4):
                (source / str(number)).write_bytes(chance.randbytes(2000))
        self.run("create", peer=True)
        for _ in range(2):
            self.back_up("@peer source", peer=True)
        self.keep("nothing")
        self.run("create")
        self.run("passphrase", "add", environment={"COFFRET_NEW_PASSPHRASE": ANOTHER})
        slots = self.run("passphrase", "list", "--json").outcome.of_type("item")
        self._slot = next(slot["slot_id"] for slot in slots if not slot["current"])
        for _ in range(3):
            before = self.place.names()
            self.earlier.append(self.back_up("@source"))
            self.made_last = self.place.names() - before
        self.keep("three snapshots")

    def back_up(self, source: str, *, peer: bool = False) -> str:
        """Change a source and back it up; return the snapshot's id."""
        path = self.home / source[1:]
        self.change_source(f"of {len(self.contents)}", path)
        made = self.run("backup", source, "--workers", "1", "--json", peer=peer).outcome.summary["snapshot_id"]
        self.contents[made] = contents(path)
        return str(made)

    def change_source(self, name: str, source: Path | None = None) -> None:
        """Another file, with something new, and one that is not what it was."""
        source = source or self.home / "source"
        chance = random.Random(name)
        (source / name).write_bytes(chance.randbytes(3000))
        (source / "0").write_bytes(chance.randbytes(2000))

    def keep(self, name: str) -> None:
        """Keep all as it is now, under a name."""
        kept = self._kept / name
        kept.mkdir(parents=True)
        copy_tree(self.home, kept / "home")
        self.place.keep(kept / "place")

    def put_back(self, name: str) -> None:
        """Make all what it was."""
        copy_tree(self._kept / name / "home", self.home)
        self.place.put_back(self._kept / name / "place")
        self.passphrase = PASSPHRASE

    def remember_only(self, kept: str) -> None:
        """Cache and state are as they were at an earlier time."""
        for folder in ("cache", "state"):
            copy_tree(self._kept / kept / "home" / folder, self.home / folder)

    def make_source(self, snapshot: str) -> None:
        """The source has what a snapshot holds, all of it new to look at."""
        shutil.rmtree(self.home / "source")
        (self.home / "source").mkdir()
        for name, data in self.contents[snapshot].items():
            assert isinstance(data, bytes)
            (self.home / "source" / name).write_bytes(data)

    # Commands ---------------------------------------------------------------------------------------------------------

    def run(
        self,
        *words: str,
        peer: bool = False,
        codes: tuple[int, ...] = (0,),
        death: Point | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ran:
        """Run a command on the repository, or on its peer; or let it die there, at a call."""
        stands_for = {"@url": self.place.url, "@slot": self._slot}
        stands_for |= {f"@{name}": str(self.home / name) for name in ("source", "peer source", "target")}
        if self.earlier:
            stands_for["@first"] = self.earlier[0]
        variables = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "COFFRET_REPOSITORY": str(self.home / "peer") if peer else self.place.url,
            "COFFRET_PASSPHRASE": self.passphrase,
            "COFFRET_PEER_PASSPHRASE": self.passphrase,
            **self.place.environment,
            **(environment or {}),
        }
        ran = self._runner.run(
            [stands_for.get(word, word) for word in words],
            variables,
            death=None if death is None else (self.place.url, *death),
            parts=self.parts,
            record=(self.log, self.home.parent) if self.log else None,
        )
        if death is None or death[0] < 0:
            assert ran.outcome.code in codes, str(ran.outcome)
            assert "Traceback" not in ran.outcome.stderr, str(ran.outcome)
        else:
            assert ran.died, f"{ran.outcome}\n{death} of {ran.calls}"
        return ran

    def listed(self) -> list[str]:
        """The ids of the snapshots there are."""
        return [item["snapshot_id"] for item in self.run("ls", "--json").outcome.of_type("item")]

    def check_restored(self, snapshot: str, expected: dict[str, bytes | str]) -> None:
        """Restore a snapshot: it must hold this."""
        target = self.home / "target"
        shutil.rmtree(target, ignore_errors=True)
        self.run("restore", "--to", "@target", snapshot, "--workers", "1")
        assert contents(target) == expected, snapshot
