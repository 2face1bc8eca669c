"""Measure copies of snapshots: `coffret sync` beside `rustic copy`, and to S3 beside a first backup to that S3.

python -m bench.sync                      three rounds
python -m bench.sync --rounds 1 s3        only to S3
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.bars import FIRST_BACKUP, OURS, SYNC, SYNC_S3
from bench.contenders import PASSPHRASE, Place, available
from bench.datasets import default_folder, load
from bench.measure import run, stored_bytes, warm
from bench.remote_ledger import Ledger
from bench.remote_storages import make_place, storages
from bench.remote_table import remote_table
from bench.results import DEFAULT_FILE, append, this_run
from bench.tables import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.contenders import Contender
    from bench.datasets import Dataset
    from bench.remote_storages import RemoteStorage
    from bench.results import Run

PARTS = ("local", "s3")
# The repository in S3.
_THERE = "copied"
_RUSTIC_PROFILE = '[repository]\nrepository = "{repository}"\npassword = "{passphrase}"\nno-cache = false\n'


class SyncBench(Ledger):
    """One run. Each contender has a repository with one snapshot, which every round copies into a new one."""

    def __init__(
        self,
        run_: Run,
        dataset: Dataset,
        folder: Path,
        parts: Sequence[str],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(run_, folder, tell)
        self._dataset, self._parts = dataset, parts
        [ours] = available([OURS])
        peer = {"COFFRET_PEER_PASSPHRASE": PASSPHRASE}
        self._ours = replace(ours, environment={**ours.environment, **peer})
        self._rustic: Contender | None = next(iter(available(["rustic"])), None) if shutil.which("rustic") else None
        self._sources = {name: Place(folder / f"from-{name}") for name in (OURS, "rustic")}
        self._s3: RemoteStorage | None = storages(folder, ("s3",))[0] if "s3" in parts else None

    def prepare(self) -> None:
        """Back up once, with each contender.

        :raises CommandFailed: if one can't
        """
        for contender in filter(None, (self._ours, self._rustic if "local" in self._parts else None)):
            place = self._sources[contender.name]
            contender.make(place)
            command = contender.command(contender.backup, place, source=self._dataset.path, serial=0)
            run(command, self.folder / "prepare.log", sample=False)

    def round(self, number: int) -> None:
        """Copy the snapshot, with each contender."""
        if "local" in self._parts:
            names = [OURS, "rustic"] if self._rustic is not None else [OURS]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                (self._local if name == OURS else self._rustic_copy)()
        if self._s3 is not None:
            for name in (OURS, FIRST_BACKUP) if number % 2 else (FIRST_BACKUP, OURS):
                (self._to_s3 if name == OURS else self._first_to_s3)(self._s3)

    def close(self) -> None:
        """End the server."""
        if self._s3 is not None:
            self._s3.close()

    def _local(self) -> None:
        source, target = self._sources[OURS], Place(self.folder / "to")
        self._ours.make(target)
        warm(source.repository)
        template = ("at", "{repository}", "sync", "to", "{target}", "--json")
        command = self._ours.command(template, source, target=target.repository)
        self.measure(self._dataset, SYNC, OURS, self._ours, command, sync_on=self.folder)
        self.line(self._dataset, SYNC, OURS, self._ours).repository_bytes = stored_bytes(target.repository)
        self._forget(source)
        target.remove()

    def _rustic_copy(self) -> None:
        assert self._rustic is not None
        source, target = self._sources["rustic"], Place(self.folder / "to")
        target.make()
        profiles = source.home / "config" / "rustic"
        profiles.mkdir(parents=True, exist_ok=True)
        profile = _RUSTIC_PROFILE.format(repository=target.repository, passphrase=PASSPHRASE)
        (profiles / "target.toml").write_text(profile)
        # It copies only between repositories of one chunker: this makes one, and copies nothing yet.
        nothing = ("copy", "--init", "--target", "target", "--filter-host", "nobody")
        run(self._rustic.command(nothing, source), self.folder / "prepare.log", sample=False)
        warm(source.repository)
        command = self._rustic.command(("copy", "--target", "target"), source)
        self.measure(self._dataset, SYNC, "rustic", self._rustic, command, sync_on=self.folder)
        self.line(self._dataset, SYNC, "rustic", self._rustic).repository_bytes = stored_bytes(target.repository)
        target.remove()

    def _to_s3(self, storage: RemoteStorage) -> None:
        source, there = self._sources[OURS], self._made_there(storage)
        warm(source.repository)
        template = ("at", "{repository}", "sync", "to", storage.url(_THERE, storage.server.port), "--json")
        self.measure(self._dataset, SYNC_S3, OURS, there, there.command(template, source))
        self._forget(source)
        storage.remove(_THERE)

    def _first_to_s3(self, storage: RemoteStorage) -> None:
        there = self._made_there(storage)
        warm(self._dataset.path)
        values: dict[str, Any] = {"repository": _THERE, "source": self._dataset.path, "serial": 0}
        command = there.command(there.backup, Place(self.folder / "client"), **values)
        self.measure(self._dataset, SYNC_S3, FIRST_BACKUP, there, command)
        storage.remove(_THERE)

    def _made_there(self, storage: RemoteStorage) -> Contender:
        """Coffret, for a new repository in S3."""
        there = storage.coffret(storage.server.port)
        there = replace(there, environment={**there.environment, **self._ours.environment})
        place = Place(self.folder / "client")
        make_place(storage, place)
        for template in there.create:
            run(there.command(template, place, repository=_THERE), self.folder / "prepare.log", sample=False)
        return there

    @staticmethod
    def _forget(source: Place) -> None:
        """Let the next sync know nothing of this one, nor which repository was there."""
        shutil.rmtree(source.home / "state", ignore_errors=True)
        for path in (source.home / "cache").rglob("ids-*.db*"):
            path.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="bench.sync", description="Measure copies of snapshots.")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where data sets lie")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size of the data set")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--no-memory", action="store_true", help="leave out the round that samples memory")
    parser.add_argument("--results", type=Path, default=DEFAULT_FILE, help="file to append lines to")
    parser.add_argument("parts", nargs="*", metavar="PART", help="of " + ", ".join(PARTS))
    options = parser.parse_args(arguments)
    dataset = load("big", options.dir, scale=options.scale)
    run_ = this_run(options.dir)
    work = options.dir / "work" / run_.run
    work.mkdir(parents=True)
    bench = SyncBench(run_, dataset, work, tuple(options.parts or PARTS), lambda text: print(text, flush=True))
    try:
        bench.prepare()
        if not options.no_memory:
            bench.sampled = True
            bench.round(0)
            bench.sampled = False
        for number in range(options.rounds):
            bench.round(number)
    finally:
        append(options.results, bench.measurements)
        bench.close()
        print(remote_table(bench.measurements, plain))
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
