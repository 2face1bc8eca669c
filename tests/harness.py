"""Run the program as its users do, and the engine as a library does, each with folders of its own.

* `Program` runs `coffret` as a subprocess: `program("backup", path)` returns an `Outcome`, and fails the test if the
  exit code is another than the one expected. Its repository, cache and state lie below one folder.
* `repository` opens a repository in this process, without encryption as a rule: a command costs a third of a second,
  and key derivation 0.2 s more.
* `Recorder` is a Progress that remembers what it was told; `scratch` a folder that is removed whatever lies in it.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.tree_state import remove_tree

from coffret.engine.creation import create_repository
from coffret.engine.opening import open_repository
from coffret.engine.progress import Progress
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from coffret.engine.progress import Fault, Item
    from coffret.engine.repository import Repository

ROOT = Path(__file__).parent.parent
IS_ROOT = os.geteuid() == 0
NOBODY = 65534
# Far above what any command here takes; one that hangs is killed, and the test says what it had printed.
TIMEOUT_S = 120.0

needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root may do this")


@contextmanager
def scratch(*, uid: int | None = None, parent: Path | None = None) -> Iterator[Path]:
    """A new folder, by default where temporary files go, that belongs to a user; removed with all that lies in it."""
    path = Path(mkdtemp(prefix="coffret-test-", dir=parent))
    try:
        if uid is not None:
            os.chown(path, uid, uid)
        yield path
    finally:
        remove_tree(path)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, and what it printed."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The objects of `--json`, one a line."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    def of_type(self, message_type: str) -> list[dict[str, Any]]:
        """The objects of `--json` that are of a type."""
        return [message for message in self.messages if message["message_type"] == message_type]

    @property
    def summary(self) -> dict[str, Any]:
        """The summary of `--json`, which is the last line."""
        message = self.messages[-1]
        assert message["message_type"] == "summary", self
        return message

    @property
    def faults(self) -> dict[bytes, str]:
        """Paths that `--json` names as faulty, and why."""
        return {path_of(error): error["reason"] for error in self.of_type("error") if "path" in error}

    def __str__(self) -> str:
        return f"coffret {' '.join(self.arguments)}: exit code {self.code}\n{self.stdout}\n{self.stderr}"


def path_of(message: Mapping[str, Any]) -> bytes:
    """The path in an object of `--json`, whose bytes need not be UTF-8."""
    if "path_b64" in message:
        return base64.b64decode(message["path_b64"])
    return str(message["path"]).encode()


@dataclass(frozen=True)
class Program:
    """`coffret` as a subprocess: HOME, cache, state and repository are below `home`, nothing else is inherited.

    `uid`: run as this user, who must own `home`. `environment` is added to the little there is; `prefix` are the words
    of a program that runs it, such as unshare.
    """

    home: Path
    uid: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()

    @property
    def repository(self) -> Path:
        """The repository that is meant when the command line names none."""
        return self.home / "repository"

    def with_environment(self, **variables: str) -> Program:
        """The same with more environment variables."""
        return replace(self, environment={**self.environment, **variables})

    def __call__(
        self,
        *arguments: str | bytes | Path,
        code: int | None = 0,
        stdin: bytes = b"",
        cwd: Path | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Outcome:
        """Run a command; `code` is the exit code it must have, None for any."""
        process = self.start(*arguments, stdin=subprocess.PIPE, cwd=cwd)
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{arguments} hung, having printed\n{out!r}\n{err!r}")
        words = tuple(os.fsdecode(argument) for argument in arguments)
        decoded = [text.decode("utf-8", "surrogateescape") for text in (out, err)]
        outcome = Outcome(words, process.returncode, *decoded)
        assert code is None or outcome.code == code, str(outcome)
        assert "Traceback" not in outcome.stderr, str(outcome)
        return outcome

    def start(
        self, *arguments: str | bytes | Path, stdin: int = subprocess.DEVNULL, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command, as the leader of a process group of its own, for tests that do something to it."""
        python, search_path = interpreter(self.uid)
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": search_path,
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "COFFRET_REPOSITORY": str(self.repository),
            **self.environment,
        }
        drop: dict[str, Any] = {}
        if self.uid is not None and self.uid != os.geteuid():
            drop = {"user": self.uid, "group": self.uid, "extra_groups": []}
        return subprocess.Popen(
            [*self.prefix, python, "-m", "coffret", *arguments],
            env=environment,
            cwd=cwd or self.home,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **drop,
        )

    def backup(self, *arguments: str | bytes | Path, code: int = 0, **options: Any) -> dict[str, Any]:
        """Back up; return the summary."""
        return self("backup", "--json", *arguments, code=code, **options).summary

    def listing(self, snapshot: str = "latest", path: bytes = b"/") -> dict[bytes, dict[str, Any]]:
        """All that lies below a path of a snapshot, by absolute path."""
        outcome = self("ls", "--json", "-r", os.fsencode(snapshot) + b":" + path)
        return {path_of(item): item for item in outcome.of_type("item")}


@functools.cache
def interpreter(uid: int | None) -> tuple[str, str]:
    """(Python, PYTHONPATH) that run the program as a user; the test is skipped if there is no such Python.

    One in root's home can't be started by anybody else; then a system-wide one of the same version will do.
    """
    paths = [str(ROOT / ".pkg")]
    if uid is None or uid == os.geteuid():
        return sys.executable, os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = [*paths, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for python in (sys.executable, f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        environment = {"PYTHONPATH": os.pathsep.join(packages)}
        try:
            subprocess.run(
                [python, "-m", "coffret", "info", "--help"],
                env=environment,
                cwd="/",
                check=True,
                capture_output=True,
                user=uid,
                group=uid,
                extra_groups=[],
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return python, environment["PYTHONPATH"]
    pytest.skip(f"no {name} with coffret's dependencies that user {uid} may run")


def with_mounts(script: str) -> tuple[str, ...]:
    """A `Program.prefix` that runs the command (as `"$0" "$@"`) from a shell script which may mount what it likes.

    The mounts are in a namespace of their own, and gone with it. The test is skipped if that is not allowed here.
    """
    if not _may_mount():
        pytest.skip("mounting is not allowed here")
    return "unshare", "--mount", "sh", "-ec", script


@functools.cache
def _may_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


class Recorder(Progress):
    """A Progress that remembers faults by path, items by path, and notes."""

    faults: dict[bytes, str] = msgspec.field(default_factory=dict)
    items: dict[bytes, str] = msgspec.field(default_factory=dict)
    notes: list[str] = msgspec.field(default_factory=list)

    def __post_init__(self) -> None:
        self.on_fault, self.on_item, self.on_note = self._take_fault, self._take_item, self.notes.append

    def _take_fault(self, fault: Fault) -> None:
        self.faults[fault.path] = fault.reason

    def _take_item(self, item: Item) -> None:
        self.items[item.path] = item.status


@asynccontextmanager
async def repository(home: Path, *, passphrase: bytes | None = None) -> AsyncIterator[Repository]:
    """The repository of `Program(home)`, made if there is none, opened here with the same cache and state."""
    location = str(home / "repository")
    options = OpenOptions(cache_dir=home / "cache" / "coffret", state_dir=home / "state" / "coffret")
    if not (home / "repository" / "config").exists():
        await create_repository(location, passphrase=passphrase, options=options)
    get = None if passphrase is None else lambda: passphrase
    async with open_repository(location, passphrase=get, options=options) as opened:
        yield opened
