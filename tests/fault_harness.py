"""What the tests of faults share: a repository with one object of each kind, damage to it, and commands run here.

A command in a process of its own costs a third of a second; `Here` runs it in this one, with its output and exit code,
so that each kind of damage can meet each command. What must be a process (signals, kills) uses `harness.Program`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import anyio
from tests.harness import Outcome

from coffret import cli
from coffret.engine import keys
from coffret.engine.creation import create_repository
from coffret.engine.kdf import Cost
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PASSPHRASE = "a passphrase to be found nowhere"
# For repositories in memory: no folder in which it is remembered what snapshots were there.
NOTHING_SEEN = OpenOptions(state_dir=Path("nowhere"))
CHEAP = Cost(memory_kib=32, passes=1, lanes=1)
# Longer campaigns: COFFRET_TEST_ROUNDS=20 multiplies what is random, COFFRET_TEST_SEED moves it.
ROUNDS = int(os.environ.get("COFFRET_TEST_ROUNDS", "1"))
SEED = int(os.environ.get("COFFRET_TEST_SEED", "0"))


@dataclass(frozen=True)
class Here:
    """`coffret` in this process: HOME, cache, state and repository are below `home`."""

    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def repository(self) -> Path:
        """The repository that is meant when the command line names none."""
        return self.home / "repository"

    def __call__(
        self, *arguments: str | Path, codes: tuple[int, ...] = (0,), environment: Mapping[str, str] | None = None
    ) -> Outcome:
        """Run a command; its exit code must be one of `codes`, and a failure must be told in one line."""
        words = [os.fspath(argument) for argument in arguments]
        with self._surroundings(environment or {}) as (out, err):
            code = cli.run(words)
        outcome = Outcome(tuple(words), code, out.getvalue().decode(), err.getvalue().decode())
        assert code in codes, str(outcome)
        assert "Traceback" not in outcome.stderr, str(outcome)
        assert "this is a bug" not in outcome.stderr, str(outcome)
        assert PASSPHRASE not in outcome.stdout + outcome.stderr
        if code not in (0, 3, 4):
            last = outcome.stderr.splitlines()[-1]
            assert last.startswith("coffret: ") and "Error" not in last, str(outcome)
            assert outcome.stderr.count("coffret: ") == 1, str(outcome)
        return outcome

    @contextlib.contextmanager
    def _surroundings(self, environment: Mapping[str, str]) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
        out, err = io.BytesIO(), io.BytesIO()
        variables = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "COFFRET_REPOSITORY": str(self.repository),
            "COFFRET_TRACEBACK": "1",
            **self.environment,
            **environment,
        }
        interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
        try:
            with (
                mock.patch.dict(os.environ, variables, clear=True),
                contextlib.redirect_stdout(io.TextIOWrapper(out, write_through=True)) as stdout,
                contextlib.redirect_stderr(io.TextIOWrapper(err, write_through=True)) as stderr,
            ):
                yield out, err
            stdout.detach()
            stderr.detach()
        finally:
            sys.setswitchinterval(interval)
            gc.unfreeze()
            gc.set_threshold(*thresholds)


@contextlib.contextmanager
def cheap_passphrases() -> Iterator[None]:
    """Key slots made meanwhile cost nothing to open."""
    wrap = keys.wrap

    def cheaply(*arguments: object, **options: object) -> tuple[str, bytes]:
        return wrap(*arguments, **{**options, "cost": CHEAP})  # type: ignore[arg-type]

    with mock.patch.object(keys, "wrap", cheaply):
        yield


def create(home: Path, *, encrypted: bool = True) -> Here:
    """A new repository below `home`."""
    options = OpenOptions(cache_dir=home / "cache" / "coffret", state_dir=home / "state" / "coffret")

    async def run() -> None:
        given = PASSPHRASE.encode() if encrypted else None
        await create_repository(str(home / "repository"), passphrase=given, options=options)

    with cheap_passphrases():
        anyio.run(run)
    return Here(home, {"COFFRET_PASSPHRASE": PASSPHRASE} if encrypted else {})


def make_source(root: Path, *, seed: int = 0, files: int = 30, large_bytes: int = 6 << 20) -> Path:
    """A directory of small files, some alike, and of one large file, half of it random."""
    rng = random.Random(seed)
    for number in range(files):
        path = root / f"directory{number % 5}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(2000)) * (number % 7))
    (root / "empty").touch()
    (root / "link").symlink_to("empty")
    (root / "large").write_bytes(rng.randbytes(large_bytes // 2) + bytes(large_bytes // 2))
    return root


def contents(root: Path) -> dict[str, bytes | str]:
    """All files and links below a directory: what they hold."""
    found: dict[str, bytes | str] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            key = os.path.relpath(path, root)
            if os.path.islink(path):
                found[key] = os.readlink(path)
            else:
                with open(path, "rb") as file:  # noqa: PTH123
                    found[key] = file.read()
    return found


def objects(repository: Path, kind: str) -> list[Path]:
    """The files of the objects of a kind: a folder of the repository, or `config`."""
    if kind == "config":
        return [repository / "config"]
    return sorted(path for path in (repository / kind).rglob("*") if path.is_file())


def replace_tree(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, links for files: objects are never changed in place."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target, copy_function=os.link)


def forget_seen(home: Path) -> None:
    """Let this user have seen no snapshots: where a repository is put back as it was, that is no rollback."""
    for path in (home / "state").rglob("seen/*.json"):
        path.unlink()


def put_in_place(path: Path, data: bytes) -> None:
    """Give a name other content, leaving alone what else has the old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
