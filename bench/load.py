"""Load: clients back up to one repository while maintenance loops with no grace; at the end every snapshot restores.

    python -m bench.load                                 eight clients, ten minutes, on the local disk
    python -m bench.load --storage s3 --seconds 60       on a versitygw of this host
    python -m bench.load --harm                          with deaths

Each client is a machine: processes of the program itself, with a home, a cache and a clock of their own. It changes a
tree, of which others have half, backs it up, and removes, prunes, restores, checks and lists beside. Two others
maintain, one all the time. With `--harm` processes are killed and stopped at any moment, those at work are taken for
dead, and the machines' clocks differ by an hour.

Exit code 1 if a snapshot is lost or has other content, a command fails or takes more than three minutes, one needs more
memory than MEMORY_BYTES, `check` finds anything, or a lease is left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.contenders import PASSPHRASE
from bench.datasets import default_folder
from bench.load_clients import Client
from bench.load_commands import IN_THE_WAY, Commands, Host, age
from bench.measure import stored_bytes
from bench.remote_storages import S3Storage
from bench.results import DEFAULT_FILE, Load, append, this_run
from bench.tables import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# What a command with its workers may take: the bar of a first backup of large files.
MEMORY_BYTES = 450_000_000
_STORAGES = ("local", "s3")
_HOUR_S = 3600
# Runs of maintenance after the last writer: each ends what was in the way of the one before.
_LAST_RUNS = 5
# So many processes at most are stopped at a time.
_HARMERS = 2


@dataclass(frozen=True)
class Place:
    """Where the repository is: its URL, the folder that has its objects as files, and what it takes to be let in."""

    url: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def placed(storage: str, work: Path) -> Iterator[Place]:
    """A place for a new repository."""
    if storage == "local":
        yield Place(str(work / "repository"), work / "repository")
        return
    server = S3Storage(work / "s3")
    try:
        yield Place(server.url("load", server.server.port), server.folder("load"), server.environment)
    finally:
        server.close()


class LoadTest:
    """One run on a new repository below `work`."""

    def __init__(self, place: Place, work: Path, *, clients: int, seconds: float, harm: bool) -> None:
        self._place, self._work, self._seconds, self._harm = place, work, seconds, harm
        passphrase = {"COFFRET_REPOSITORY": place.url, "COFFRET_PASSPHRASE": PASSPHRASE}
        self.commands = Commands({**place.environment, **passphrase}, seconds / 2)
        self._homes = 0
        self.clients = [Client(f"client{number}", self._host(), self.commands) for number in range(clients)]
        #: Summaries of maintenance, and how many snapshots there are at the end.
        self.maintained: list[dict[str, Any]] = []
        self.snapshots = 0

    def run(self) -> None:
        """Do it all; what is wrong is in `commands.faults`."""
        self.commands.run(self._host(), "create")
        over = threading.Event()
        works = [
            *(partial(client.work, over) for client in self.clients),
            partial(self._maintain, over, 0.0),
            partial(self._maintain, over, 3.0),
        ]
        if self._harm:
            leases = self._place.folder / "leases"
            works += [partial(self.commands.harm, random.Random(seed), leases, over) for seed in range(_HARMERS)]
        threads = _started(works)
        end = time.monotonic() + self._seconds
        while time.monotonic() < end and not self.commands.faults:
            time.sleep(0.1)
        over.set()
        for thread in threads:
            thread.join()
        self._judge()

    def _maintain(self, over: threading.Event, pause_s: float) -> None:
        host = self._host()
        while not over.wait(pause_s):
            self._maintenance(host)

    def _maintenance(self, host: Host) -> bool:
        """Maintain with no grace; whether nothing was in the way."""
        outcome = self.commands.run(host, "maintenance", "--grace", "0s")
        if outcome is None or outcome.code == IN_THE_WAY:
            return False
        self.maintained.append(outcome.summary)
        return True

    def _judge(self) -> None:
        """Nobody is at work any more: after a last maintenance everything is there, and nothing else."""
        host = self._host()
        if self._harm:
            age(self._place.folder / "leases")
        if not any(self._maintenance(host) for _ in range(_LAST_RUNS)):
            self.commands.fault("maintenance comes to no end")
        listing = self.commands.run(host, "ls")
        items = [each for each in listing.objects if each["message_type"] == "item"] if listing else []
        self.snapshots = len(items)
        judged = []
        for client in self.clients:
            listed = {each["snapshot_id"] for each in items if each["host"] == client.name}
            judged.append(partial(client.judge, listed, host))
        threads = _started(judged)
        for thread in threads:
            thread.join()
        self.commands.run(host, "check")
        for lease in (self._place.folder / "leases").rglob("*"):
            self.commands.fault(f"leases/{lease.name} is left")
        for kind, tally in self.commands.tallies.items():
            if max(tally.memory_bytes) > MEMORY_BYTES:
                self.commands.fault(f"{kind} took {max(tally.memory_bytes) / 1e6:.0f} MB")

    def _host(self) -> Host:
        """Another machine; where harm is done their clocks are slow, right and fast in turn."""
        self._homes += 1
        home = self._work / f"home{self._homes}"
        home.mkdir()
        return Host(home, (self._homes % 3 - 1) * _HOUR_S if self._harm else 0)


def _started(works: Sequence[Callable[[], None]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def told(line: Load) -> str:
    """What was done, for people."""
    header = ["command", "done", "in the way", "ended", "longest, s", "first half, MB", "second half, MB"]
    rows = [
        [
            kind, *(f"{tally[name]:,}" for name in ("done", "in_the_way", "ended")), f"{tally['longest_s']:.1f}",
            *(f"{size_bytes / 1e6:.0f}" for size_bytes in tally["memory_bytes"]),
        ]
        for kind, tally in sorted(line.commands.items())
    ]  # fmt: skip
    return "\n".join(
        [
            plain(header, rows),
            f"{line.snapshots} snapshots at the end, {line.restored} restored in all; {line.swept_packs:,} packs swept,"
            f" {line.freed_bytes / 1e6:,.0f} MB freed; the repository has {line.repository_bytes / 1e6:,.0f} MB",
            *(f"FAULT: {fault}" for fault in line.faults),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.load", description="Clients and maintenance on one repository.")
    parser.add_argument("--clients", type=int, default=8, help="how many back up")
    parser.add_argument("--seconds", type=float, default=600.0, help="for how long")
    parser.add_argument("--storage", choices=_STORAGES, default="local", help="where the repository is")
    parser.add_argument("--harm", action="store_true", help="kill, stop and take for dead; clocks differ")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where everything lies")
    parser.add_argument("--results", type=Path, default=DEFAULT_FILE, help="file to append a line to")
    options = parser.parse_args(arguments)
    options.dir.mkdir(parents=True, exist_ok=True)
    run = this_run(options.dir)
    work = options.dir / "work" / run.run
    work.mkdir(parents=True)
    try:
        with placed(options.storage, work) as place:
            test = LoadTest(place, work, clients=options.clients, seconds=options.seconds, harm=options.harm)
            test.run()
            line = Load(
                run=run,
                storage=options.storage,
                clients=options.clients,
                seconds=options.seconds,
                harm=options.harm,
                commands={kind: asdict(tally) for kind, tally in test.commands.tallies.items()},
                snapshots=test.snapshots,
                restored=sum(client.restored for client in test.clients),
                swept_packs=sum(each["swept_packs"] for each in test.maintained),
                freed_bytes=sum(each["bytes_freed"] - each["bytes_stored"] for each in test.maintained),
                repository_bytes=stored_bytes(place.folder),
                faults=test.commands.faults,
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    append(options.results, [line])
    print(told(line), flush=True)
    return 1 if line.faults else 0


if __name__ == "__main__":
    sys.exit(main())
