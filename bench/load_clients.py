"""Clients under load: each backs up a tree of its own that changes, and knows what its snapshots have to hold."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from bench.load_commands import Commands, Host

_FILES, _CHANGED = 40, 6
# Sizes of files: most are small, one in eight has some chunks.
_SMALL_BYTES, _LARGE_BYTES = (0, 150_000), (500_000, 3_000_000)
# Half of what is new in a turn is one of so many contents that all clients have at about that time.
_SHARED = 30
_KEPT = 3


def content(seed: str) -> bytes:
    """The same for the same seed."""
    rng = random.Random(seed)
    return rng.randbytes(rng.randint(*(_LARGE_BYTES if rng.random() < 0.125 else _SMALL_BYTES)))


def digest(root: Path) -> str:
    """Of the files below a folder: their names and contents."""
    total = blake3()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(root)}\0".encode() + blake3(path.read_bytes()).digest())
    return total.hexdigest()


class Client:
    """One client. `expected`: the digest of each snapshot that has to be there.

    Where a command was ended by others, nobody knows whether it did its work: `doubtful` are snapshots that may be
    removed, `unsure` the digests of those that may have been made.
    """

    def __init__(self, name: str, host: Host, commands: Commands) -> None:
        self.name, self._host, self._commands = name, host, commands
        self.expected: dict[str, str] = {}
        self.doubtful: set[str] = set()
        self.unsure: set[str] = set()
        self.restored = 0
        self._random = random.Random(name)
        self._tree, self._turn = host.home / "tree", 0
        self._tree.mkdir(parents=True)
        for number in range(_FILES):
            self._change(number)

    def work(self, over: threading.Event) -> None:
        """Back up after each change, and now and then do something else, until it is over."""
        others = (self._remove, self._prune, self._restore, self._check, self._list)
        while not (self._turn and over.is_set()):
            self._turn += 1
            for number in self._random.sample(range(_FILES), _CHANGED):
                self._change(number)
            self._back_up()
            if self.expected and self._random.random() < 0.6 and not over.is_set():
                self._random.choice(others)()

    def restore(self, snapshot: str, host: Host) -> str:
        """Restore a snapshot on a machine; the digest of what it holds, "" if that failed."""
        target = host.home / f"restored-{snapshot}"
        if self._commands.run(host, "restore", "--to", str(target), snapshot) is None:
            shutil.rmtree(target, ignore_errors=True)
            return ""
        self.restored += 1
        found = digest(target)
        shutil.rmtree(target)
        return found

    def judge(self, listed: set[str], host: Host) -> None:
        """At the end: all of this client's snapshots that have to be there are, and each that is there restores."""
        for snapshot in sorted(self.expected.keys() - listed - self.doubtful):
            self._commands.fault(f"snapshot {snapshot} of {self.name} is lost")
        for snapshot in sorted(listed):
            found = self.restore(snapshot, host)
            known = self.expected.get(snapshot)
            if found and (found != known if known else found not in self.unsure):
                self._commands.fault(f"snapshot {snapshot} of {self.name} has other content than the tree had")

    def _change(self, number: int) -> None:
        """Give a file new content, in half of the cases such as other clients have too."""
        shared = f"shared {self._turn + self._random.randrange(_SHARED)}"
        mine = f"{self.name} {self._turn} {number}"
        path = self._tree / f"folder{number % 5}" / str(number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(self._random.choice((shared, mine))))

    def _back_up(self) -> None:
        found = digest(self._tree)
        self.unsure.add(found)
        outcome = self._commands.run(self._host, "backup", "--host", self.name, str(self._tree))
        if outcome is not None:
            self.unsure.discard(found)
            self.expected[outcome.summary["snapshot_id"]] = found

    def _remove(self) -> None:
        snapshot = self._random.choice([*self.expected])
        self.doubtful.add(snapshot)
        if self._commands.run(self._host, "rm", snapshot) is not None:
            self._forget(snapshot)

    def _prune(self) -> None:
        before = {*self.expected}
        outcome = self._commands.run(self._host, "prune", "--host", self.name, "--keep-last", str(_KEPT))
        if outcome is None:
            self.doubtful |= before
            return
        for snapshot in outcome.summary["snapshot_ids"]:
            self._forget(snapshot)

    def _forget(self, snapshot: str) -> None:
        self.expected.pop(snapshot, None)
        self.doubtful.discard(snapshot)

    def _restore(self) -> None:
        """One that nobody removes meanwhile."""
        snapshot = self._random.choice([*self.expected])
        found = "" if snapshot in self.doubtful else self.restore(snapshot, self._host)
        if found and found != self.expected[snapshot]:
            self._commands.fault(f"snapshot {snapshot} of {self.name} was restored with other content")

    def _check(self) -> None:
        self._commands.run(self._host, "check")

    def _list(self) -> None:
        """What has to be there is listed."""
        if (outcome := self._commands.run(self._host, "ls")) is not None:
            listed = {each["snapshot_id"] for each in outcome.objects if each["message_type"] == "item"}
            for snapshot in sorted(self.expected.keys() - self.doubtful - listed):
                self._commands.fault(f"snapshot {snapshot} of {self.name} is not listed")
