"""Writers that are processes, stopped by SIGSTOP before, between and after their puts, while maintenance runs.

Maintenance runs twice with no grace: once while the writer's lease is fresh, and then, in every second case, once more
when that is so old that the writer counts as dead. Then the writer goes on. COFFRET_TEST_ROUNDS=2 tries each case, and
S3 too.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import pytest
from bench.load_commands import age
from tests.connectors.s3_server import CREDENTIALS, shared_server
from tests.fault_harness import ROUNDS, SEED, Here, contents
from tests.harness import ROOT, TIMEOUT_S, Outcome, Program

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping
    from pathlib import Path

IN_THE_WAY, FAILED = 11, 1
_PIECES = [random.Random(number).randbytes(20_000) for number in range(5)]


@dataclass(frozen=True)
class Storage:
    """Where a repository is. `age` makes the leases there an hour old."""

    url: str
    age: Callable[[], None]
    environment: Mapping[str, str]


def local(home: Path) -> Storage:
    return Storage(str(home / "repository"), partial(age, home / "repository" / "leases"), {})


def s3(_: Path) -> Storage:
    server, bucket = shared_server(tls=False), f"test-{os.urandom(8).hex()}"
    access = dict(zip(("S3_REPOSITORY_USER", "S3_REPOSITORY_PASSWORD"), CREDENTIALS, strict=True))
    url = f"s3+http://127.0.0.1:{server.port}/{bucket}"
    return Storage(url, partial(age, server.buckets / bucket / "leases"), access)


def sqlite(home: Path) -> Storage:
    def age_rows() -> None:
        with closing(sqlite3.connect(home / "repository.db", timeout=10)) as connection, connection:
            connection.execute("update objects set mtime_s = mtime_s - 3600 where name like 'leases/%'")

    return Storage(f"sqlite://{home}/repository.db", age_rows, {})


class Scene:
    """A repository, of which a snapshot is removed and another made in every turn; and what each holds."""

    def __init__(self, home: Path, storage: Storage) -> None:
        self._home, self._tree, self._storage = home, home / "tree", storage
        self._environment = {**storage.environment, "COFFRET_REPOSITORY": storage.url}
        self._here = Here(home, self._environment)
        self._random = random.Random(SEED)
        self._made: dict[str, dict[str, bytes | str]] = {}
        self._tree.mkdir()
        self._here("create", "--no-encryption")
        for _ in range(2):
            self._change()
            self._note(self._here("backup", "--json", self._tree))

    def turn(self, number: int, when: str, *, dead: bool) -> bool:
        """A writer that is stopped at a put; whether it came so far."""
        oldest = next(iter(self._made))
        self._here("restore", "--to", self._home / oldest, oldest)
        assert contents(self._home / oldest) == self._made.pop(oldest)
        self._here("rm", oldest)
        self._change()
        writer = self._start(number, when)
        stopped = writer.poll() is None
        if stopped:
            self._here("maintenance", "--grace", "0s", codes=(0, IN_THE_WAY))
            if dead:
                self._storage.age()
                self._here("maintenance", "--grace", "0s")
            writer.send_signal(signal.SIGCONT)
        out, err = (text.decode() for text in writer.communicate(timeout=TIMEOUT_S))
        outcome = Outcome(("backup",), writer.returncode, out, err)
        assert outcome.code == 0, str(outcome)
        self._note(outcome)
        listed = {item["snapshot_id"] for item in self._here("ls", "--json").of_type("item")}
        assert listed == self._made.keys()
        self._here("check")
        return stopped

    def _start(self, number: int, when: str) -> subprocess.Popen[bytes]:
        """A backup that will stop; returns when it has, or has ended."""
        runner = (sys.executable, "-m", "tests.maintenance.stopping", str(number), when)
        modules = {"PYTHONPATH": f"{ROOT / '.pkg'}{os.pathsep}{ROOT}"}
        program = Program(self._home, environment={**self._environment, **modules}, prefix=runner)
        process = program.start("backup", "--json", self._tree)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return process

    def _change(self) -> None:
        """Some of few pieces, so that what only a removed snapshot has is there again."""
        for number, piece in enumerate(_PIECES):
            path = self._tree / str(number)
            path.unlink(missing_ok=True)
            if self._random.random() < 0.6:
                path.write_bytes(piece)
        (self._tree / "new").write_bytes(self._random.randbytes(20_000))

    def _note(self, outcome: Outcome) -> None:
        self._made[outcome.summary["snapshot_id"]] = contents(self._tree)

    def judge(self) -> None:
        """All that is listed restores to what it has to hold."""
        for snapshot, expected in self._made.items():
            target = self._home / snapshot
            self._here("restore", "--to", target, snapshot)
            assert contents(target) == expected
            shutil.rmtree(target)


KINDS = (local, sqlite, s3) if ROUNDS > 1 else (local, sqlite)


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_stops_at_each_put(kind: Callable[[Path], Storage], tmp_path: Path) -> None:
    scene, tried = Scene(tmp_path, kind(tmp_path)), 0
    # What comes after a put comes before the next: only before the first it is something else.
    for when in ("before", "after") if kind is local or ROUNDS > 1 else ("after",):
        for number in count():
            dead = [True, False] if ROUNDS > 1 else [(number + (when == "after") + SEED) % 2 == 0]
            if not all(scene.turn(number, when, dead=each) for each in dead):
                break
            tried += len(dead)
    scene.judge()
    assert tried >= 4  # lease, pack, index, snapshot
