"""The program on every kind of storage: it works as on a local path, with few requests, and it survives bad days."""

from __future__ import annotations

import os
import random
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from tests.connectors import s3_server, sshd
from tests.fault_harness import Here, cheap_passphrases
from tests.harness import ROOT, Program
from tests.server.program import ServerProcess
from tests.tree_state import describe, differences

from coffret.connectors.errors import ConnectionLost, TransientError
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.sqlite import SQLiteConnector
from coffret.engine.creation import create_repository
from coffret.engine.opening import open_repository
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.slow
MIB = 1 << 20
# What an unchanged backup may ask of a storage, however many files there are; and what it takes to store a page of the
# catalog, where a directory above the source has changed meanwhile.
FEW_REQUESTS, A_PAGE_REQUESTS = 12, 4


@dataclass
class Elsewhere:
    """A storage for the program: where it is, what it needs in the environment, and its server, if it has one."""

    url: str
    environment: Mapping[str, str]
    server: Any = None


def s3(*, tls: bool, server: s3_server.S3Server | None = None) -> Elsewhere:
    server = server or s3_server.shared_server(tls=tls)
    user, password = s3_server.CREDENTIALS
    query = f"?ca={server.ca}" if tls else ""
    url = f"{server.scheme}://127.0.0.1:{server.port}/test-{os.urandom(8).hex()}/prefix{query}"
    return Elsewhere(url, {"S3_REPOSITORY_USER": user, "S3_REPOSITORY_PASSWORD": password}, server)


def sftp(server: sshd.SSHServer | None = None) -> Elsewhere:
    server = server or sshd.shared_server(chroot=False)
    folder = server.root / "data" / os.urandom(8).hex()
    return Elsewhere(f"sftp://{server.user}@127.0.0.1:{server.port}{folder}", {"HOME": str(server.home.path)}, server)


def http(folder: Path) -> Elsewhere:
    server = ServerProcess(folder)
    token = server.token("full")
    server.start()
    return Elsewhere(server.url, {"COFFRET_SERVER_TOKEN": token}, server)


@pytest.fixture(params=["sqlite", "sftp", "s3", "s3-tls", "http"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Elsewhere]:
    if request.param == "sqlite":
        yield Elsewhere(f"sqlite://{tmp_path}/home/repository.db", {})
    elif request.param == "http":
        served = http(tmp_path / "host")
        yield served
        served.server.kill()
    else:
        yield sftp() if request.param == "sftp" else s3(tls=request.param == "s3-tls")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def program_for(elsewhere: Elsewhere, home: Path, **environment: str) -> Program:
    chosen = {"COFFRET_REPOSITORY": elsewhere.url, "COFFRET_PASSPHRASE": "correct horse", **elsewhere.environment}
    return Program(home, environment={**chosen, **environment})


def created(elsewhere: Elsewhere, home: Path) -> Program:
    """The program for a new repository, the passphrase of which costs nothing to check."""
    program = program_for(elsewhere, home)
    with cheap_passphrases():
        Here(home, program.environment)("create")
    return program


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Some small files, one of several chunks, a link."""
    source = tmp_path / "source"
    chance = random.Random(1)
    for number in range(300):
        folder = source / f"{number // 30}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}").write_bytes(chance.randbytes(number * 7))
    (source / "large").write_bytes(chance.randbytes(6 * MIB))
    (source / "link").symlink_to("large")
    for path in source.rglob("*"):  # so that nothing is racy
        os.utime(path, (1, 1), follow_symlinks=False)
    return source


def settle(source: Path) -> None:
    """Wait until a change could not hide behind the times that the files have now."""
    newest_ns = max(path.lstat().st_ctime_ns for path in [source, *source.parents, *source.rglob("*")])
    time.sleep(max(0.0, newest_ns / 1e9 + 2.1 - time.time()))


def check_few_requests(summary: dict[str, Any]) -> None:
    """That an unchanged backup has asked for little."""
    calls = sum(calls["calls"] for calls in summary["storage"].values())
    assert calls <= FEW_REQUESTS + A_PAGE_REQUESTS * (summary["directories_changed"] > 0), summary


def test_all_works_as_on_a_local_path(elsewhere: Elsewhere, home: Path, source: Path, tmp_path: Path) -> None:
    program = created(elsewhere, home)
    settle(source)
    first = program.backup(source)
    assert first["files"] == 301
    unchanged = program.backup(source)
    assert (unchanged["new"], unchanged["changed"], unchanged["files_read"]) == (0, 0, 0)
    if elsewhere.server is not None:
        check_few_requests(unchanged)
    (source / "new").write_bytes(b"new")
    program.backup(source)
    assert [item["files"] for item in program("ls", "--json").of_type("item")] == [301, 301, 302]
    assert os.fsencode(source / "new") in program.listing()
    program("check")
    program("check", "--fast")
    program("check", "--packs")
    program("restore", "latest", "--to", tmp_path / "restored")
    assert not differences(describe(source), describe(tmp_path / "restored"))
    program("restore", f"latest:{source}/large", "--to", tmp_path / "one")
    assert (tmp_path / "one" / "large").read_bytes() == (source / "large").read_bytes()
    program.with_environment(COFFRET_NEW_PASSPHRASE="another")("passphrase", "add")
    other = program.with_environment(COFFRET_PASSPHRASE="another")
    assert len(other("passphrase", "list", "--json").of_type("item")) == 2
    assert program("info", "--json").summary["snapshots"] == 3
    assert "already" in program("create", code=2).stderr
    program.with_environment(COFFRET_PASSPHRASE="wrong")("ls", code=12)


def test_a_new_machine_knows_what_is_stored(elsewhere: Elsewhere, home: Path, source: Path, tmp_path: Path) -> None:
    """Without anything kept locally: nothing is read, sent or stored again."""
    program = created(elsewhere, home)
    settle(source)
    program.backup(source)
    fresh = program_for(elsewhere, home, XDG_CACHE_HOME=str(tmp_path / "fresh"))
    again = fresh.backup(source)
    assert (again["new"], again["changed"], again["files_read"]) == (0, 0, 0)
    assert again["storage"]["put"]["size_bytes"] < 100_000
    if elsewhere.server is not None:
        check_few_requests(fresh.backup(source))


def test_the_limits_reach_the_storage(elsewhere: Elsewhere, home: Path, source: Path) -> None:
    program = program_for(elsewhere, home)
    program("create", "--connections", "2")
    program.backup(source, "--limit-upload", "100M", "--connections", "3")
    program("check", "--limit-download", "100M", "--connections", "1")
    for wrong in ("much", "0", "10"):
        program("backup", source, "--limit-upload", wrong, code=2)


def test_the_repository_s_own_file_is_left_out(tmp_path: Path, home: Path) -> None:
    program = program_for(Elsewhere(f"sqlite://{home}/repository.db", {}), home)
    program("create")
    (home / "kept").write_bytes(b"kept")
    program.backup(home)
    below = os.fsencode(home)
    names = {path.removeprefix(below) for path in program.listing() if path.startswith(below)}
    assert b"/kept" in names
    assert not [name for name in names if b"repository.db" in name]


def test_the_readme_s_commands(tmp_path: Path, home: Path) -> None:
    """Those that make a repository elsewhere run as they stand, with other places."""
    readme = (ROOT / "README.md").read_text()
    places = {
        "sftp://backup@nas.example/srv/backups": sftp(),
        "s3://s3.example/bucket/prefix": s3(tls=False),
        "sqlite:///media/stick/backups.db": Elsewhere(f"sqlite://{tmp_path}/backups.db", {}),
    }
    for location, place in places.items():
        command, *others = re.findall(rf"^coffret at {re.escape(location)} (\w+)$", readme, re.MULTILINE)
        assert {command, *others} == {"create"}  # in the section on copies too
        program_for(place, home)("at", place.url, command)
        assert program_for(place, home)("info", "--json").summary["snapshots"] == 0


@pytest.fixture(params=["sftp", "s3", "http"])
def mortal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Elsewhere]:
    """A storage whose server may be killed."""
    if request.param == "sftp":
        server = sshd.SSHServer()
        server.start()
        yield sftp(server)
        server.remove()
    elif request.param == "http":
        served = http(tmp_path / "host")
        yield served
        served.server.kill()
    else:
        other = s3_server.S3Server(tmp_path / "s3")
        other.start()
        yield s3(tls=False, server=other)
        other.kill()


def packs_of(elsewhere: Elsewhere) -> int:
    """How many packs the server has, whole or not."""
    server = elsewhere.server
    root = server.buckets if hasattr(server, "buckets") else server.root
    return sum(path.is_file() and path.parent.parent.name == "packs" for path in root.rglob("*"))


def test_a_server_that_is_killed_and_comes_back(mortal: Elsewhere, home: Path, tmp_path: Path) -> None:
    """The backup goes on where it was; nothing is lost."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6):
        (source / str(number)).write_bytes(os.urandom(24 * MIB))
    program = created(mortal, home)
    running = program.start("backup", "--json", "--limit-upload", "60M", source)
    deadline = time.monotonic() + 60
    while not packs_of(mortal) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    assert running.poll() is None
    mortal.server.kill()
    time.sleep(1)
    mortal.server.start()
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, (out, err)
    program("check")
    program("restore", "latest", "--to", tmp_path / "restored")
    assert not differences(describe(source), describe(tmp_path / "restored"))


def test_a_server_that_is_not_there_is_one_clear_line(
    mortal: Elsewhere, home: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coffret.connectors.retry.FIRST_GIVE_UP_S", 0.5)
    run = Here(home, created(mortal, home).environment)
    mortal.server.kill()
    (line,) = run("-q", "backup", source, codes=(1,)).stderr.splitlines()
    assert "127.0.0.1" in line


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(3))
async def test_one_request_in_a_hundred_fails(
    seed: int, home: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the whole run, before or after its effect. Ten times as many here, so that there are enough of them."""
    chance = random.Random(seed)
    failures = 0

    async def fail(method: str, name: str) -> None:
        nonlocal failures
        if method != "close" and chance.random() < 0.05:
            failures += 1
            raise chance.choice([ConnectionLost, TransientError])(f"{method} {name}: 503 SlowDown")

    def bad(url: str, options: Mapping[str, str]) -> FaultyConnector:
        return FaultyConnector(SQLiteConnector(url), before=fail, after=fail)

    monkeypatch.setattr("coffret.connectors.registry.open_connector", bad)
    monkeypatch.setattr("coffret.connectors.retry.FIRST_WAIT_S", 0.001)
    options = OpenOptions(cache_dir=home / "cache", state_dir=home / "state")
    location = str(home / "repository.db")
    await create_repository(location, passphrase=b"x", options=options)
    async with open_repository(location, passphrase=lambda: b"x", options=options) as opened:
        for number in range(12):
            (source / f"new-{number}").write_bytes(os.urandom(1000))
            made = await opened.backup([os.fsencode(source)])
            assert not made.counts.errors
        assert (await opened.check()).clean
        snapshot = (await opened.commits()).snapshots[-1]
        assert not (await opened.restore(snapshot, os.fsencode(tmp_path / "restored"))).errors
    assert not differences(describe(source), describe(tmp_path / "restored"))
    assert failures >= 5
