"""`coffret sync`: the transcripts that it was made for, its forms, and how it ends."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from tests import terminal
from tests.connectors import s3_server, sshd
from tests.fault_harness import PASSPHRASE, Here, create, make_source
from tests.harness import Program
from tests.test_json import validate_all

if TYPE_CHECKING:
    from pathlib import Path


def peer(home: Path, *, encrypted: bool = True) -> str:
    """Another repository, whose passphrase is the same; its location."""
    (home / "peer").mkdir()
    return str(create(home / "peer", encrypted=encrypted).repository)


@pytest.fixture
def here(tmp_path: Path) -> Here:
    """A repository with a snapshot."""
    made = create(tmp_path / "home")
    make_source(tmp_path / "source", files=10, large_bytes=1 << 20)
    here = Here(made.home, {**made.environment, "COFFRET_PEER_PASSPHRASE": PASSPHRASE})
    here("backup", tmp_path / "source", "--tag", "first")
    return here


def ids(here: Here, location: str = "") -> list[str]:
    place = ("at", location) if location else ()
    return [item["short_id"] for item in here(*place, "ls", "--json").of_type("item")]


def test_three_copies(tmp_path: Path) -> None:
    """The first transcript: a local repository, a copy over SFTP, a copy in S3, each checked by itself."""
    ssh, s3 = sshd.shared_server(chroot=False), s3_server.shared_server(tls=False)
    user, password = s3_server.CREDENTIALS
    environment = {"S3_REPOSITORY_USER": user, "S3_REPOSITORY_PASSWORD": password, "HOME": str(ssh.home.path)}
    program = Program(tmp_path, environment=environment)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    local = str(tmp_path / "backups")
    nas = f"sftp://{ssh.user}@127.0.0.1:{ssh.port}{ssh.root}/data/{os.urandom(8).hex()}"
    bucket = f"s3+http://127.0.0.1:{s3.port}/test-{os.urandom(8).hex()}"
    for location, passphrase in ((local, "one"), (nas, "two"), (bucket, "three")):
        made = terminal.start(program, "at", location, "create")
        for prompt in ("repository passphrase:", "(confirm):"):
            made.expect(prompt)
            made.type(passphrase)
        assert made.end() == 0
    one = program.with_environment(COFFRET_PASSPHRASE="one")
    made_line = one("-v", "at", local, "backup", tmp_path / "etc").stdout.splitlines()[-1]
    [short] = re.findall(r"backup: created unsigned snapshot ([0-9a-f]{8}) of size", made_line)
    listing = one("at", local, "ls").stdout
    # A peer's passphrase is asked for, once.
    run = terminal.start(one, "at", local, "sync", "to", nas)
    run.expect("peer repository passphrase: ")
    run.type("two")
    assert run.end() == 0 and run.text.endswith("sync: synchronized 1 snapshot\r\n")
    three = one.with_environment(COFFRET_PEER_PASSPHRASE="three")
    assert three("at", local, "sync", "to", bucket).stdout == "sync: synchronized 1 snapshot\n"
    for location, passphrase in ((nas, "two"), (bucket, "three")):
        there = program.with_environment(COFFRET_PASSPHRASE=passphrase)
        assert there("at", location, "ls").stdout == listing
        checked = there("-v", "at", location, "check", short).stdout.splitlines()
        assert f"{short}: ✓ {tmp_path}/etc/hosts" in checked
        assert checked[-1] == f"check: verification of {short}:{tmp_path}/etc completed successfully"
    assert three("at", local, "sync", "with", bucket).stdout == "sync: synchronized 0 snapshots\n"


def test_the_form_of_2022(tmp_path: Path) -> None:
    """The second transcript: `~/.coffret`, no encryption, `push`, and `sync` without a direction."""
    program = Program(tmp_path, environment={"COFFRET_REPOSITORY": str(tmp_path / ".coffret")})
    program("create", "-no-encryption")
    program("at", tmp_path / "t1", "create", "-no-encryption")
    source = make_source(tmp_path / "bin", files=3, large_bytes=2000)
    program("push", source)
    assert program("sync", tmp_path / "t1").stdout == "sync: synchronized 1 snapshot\n"
    assert program("on", tmp_path / "t1", "ls").stdout == program("ls").stdout != ""


def test_directions(here: Here, tmp_path: Path) -> None:
    other = peer(tmp_path, encrypted=False)
    unset = {"COFFRET_PASSPHRASE": PASSPHRASE}
    plain = Here(here.home, unset)
    assert plain("sync", "from", other).stdout == "sync: synchronized 0 snapshots\n"
    Here(here.home)("at", other, "backup", tmp_path / "source")
    assert plain("sync", "with", other).stdout == "sync: synchronized 2 snapshots\n"
    assert ids(here) == [item["short_id"] for item in Here(here.home)("at", other, "ls", "--json").of_type("item")]


def test_json_and_dry_run(here: Here, tmp_path: Path) -> None:
    other = peer(tmp_path)
    before = sorted((tmp_path / "peer").rglob("*"))
    for options in (["--dry-run"], []):
        messages = validate_all(here("sync", other, "--json", "-v", *options), "item of sync", "summary of sync")
        assert [message["message_type"] for message in messages if message["message_type"] != "status"] == [
            "item",
            "summary",
        ]
        assert messages[-1]["snapshots"] == 1 and messages[-1]["dry_run"] == bool(options)
        assert (sorted((tmp_path / "peer").rglob("*")) == before) == bool(options)
    assert ids(here, other) == ids(here)


def test_what_is_chosen(here: Here, tmp_path: Path) -> None:
    other = peer(tmp_path)
    source = tmp_path / "source"
    here("backup", source, "--tag", "second", "--host", "elsewhere")
    here("backup", source / "directory1", "--tag", "third")

    def would(*options: str) -> int:
        return int(here("sync", "to", other, "--dry-run", "--json", *options).summary["snapshots"])

    first, second, third = ids(here)
    assert would() == 3
    assert would(first) == would(first, first[:6]) == 1 and would(first, third) == 2 and would("latest") == 1
    assert would("--tag", "first") == 1 and would("--tag", "first", "--tag", "third") == 2
    assert would("--host", "elsewhere") == 1 and would("--host", "nowhere") == 0
    assert would("--path", str(source)) == 2 and would("--path", str(source / "directory1")) == 3
    assert would("--latest", "1") == 3
    assert would("--since", "1d") == 3 and would("--before", "1d") == 0
    assert would("--since", "2020-01-01", "--before", "2021-01-01T12:00") == 0
    here("sync", "to", other, second)
    assert ids(here, other) == [second]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("to",), 2),
        (("to", "/nowhere/at/all"), 10),
        (("to", "{peer}", "ffff"), 1),
        (("to", "{peer}", "--since", "yesterday"), 2),
        (("to", "{peer}", "--latest", "0"), 2),
        (("to", "{own}"), 2),
    ],
)
def test_failures(here: Here, tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    places = {"peer": peer(tmp_path), "own": str(here.repository)}
    here("sync", *(argument.format(**places) for argument in arguments), codes=(code,))


def test_what_can_be_no_peer_is_told_before_any_passphrase_is_wanted(here: Here) -> None:
    without = Here(here.home)
    for own in (here.repository, f"file://{here.repository}", here.repository / ".." / "repository"):
        assert "is the repository itself" in without("sync", own, codes=(2,)).stderr
    assert "not a known kind" in without("sync", "from", "ftp://x/y", codes=(2,)).stderr


def test_passphrase_of_the_peer(here: Here, tmp_path: Path) -> None:
    other = peer(tmp_path)
    wrong = {"COFFRET_PEER_PASSPHRASE": "wrong"}
    assert "COFFRET_PEER_PASSPHRASE gives another" in here("sync", other, codes=(12,), environment=wrong).stderr
    without = Here(here.home, {"COFFRET_PASSPHRASE": PASSPHRASE})
    assert "COFFRET_PEER_PASSPHRASE" in without("sync", other, codes=(12,)).stderr


def test_a_damaged_snapshot(here: Here, tmp_path: Path) -> None:
    """Exit code 3, and the snapshot is named."""
    other, short = peer(tmp_path), ids(here)[0]
    pack = max((here.repository / "packs").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    pack.unlink()
    outcome = here("sync", "to", other, codes=(3,))
    assert outcome.stdout == "sync: synchronized 0 snapshots, 1 damaged snapshot left out\n"
    assert f"sync: {short}: damaged in file://{here.repository}: " in outcome.stderr
    assert ids(here, other) == []
