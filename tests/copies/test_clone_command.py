"""`coffret clone`, as users run it, between all kinds of storage."""

from __future__ import annotations

import base64
import os
import re
import shlex
import signal
import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests import fault_harness, test_storages
from tests.fault_harness import Here, make_source, objects, put_in_place
from tests.harness import ROOT, Program
from tests.server.program import ServerProcess
from tests.test_json import validate_all

if TYPE_CHECKING:
    from pathlib import Path


def stored(folder: Path) -> dict[str, bytes]:
    """The objects of a repository in a folder, but leases."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if not name.startswith("leases/")}


def stored_in_file(file: Path) -> dict[str, bytes]:
    """The same of one in an SQLite file."""
    with closing(sqlite3.connect(file)) as connection:
        rows = connection.execute("select name, body from objects where name not like 'leases/%'").fetchall()
    return dict(rows)


@pytest.fixture
def here(tmp_path: Path) -> Here:
    """An encrypted repository with two snapshots."""
    here = fault_harness.create(tmp_path)
    source = make_source(tmp_path / "source")
    here("backup", source)
    (source / "new").write_bytes(os.urandom(100_000))
    here("backup", source)
    return here


def test_the_first_texts_commands(tmp_path: Path) -> None:
    """The lines that came with the first `clone` of all, in 2022: the repository is ~/.coffret."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "true").write_bytes(os.urandom(5000))
    (tmp_path / "linked").symlink_to("bin")
    program = Program(tmp_path, prefix=("env", "-u", "COFFRET_REPOSITORY"))
    copy = tmp_path / "coffret-copy"
    program("create", "-no-encryption")
    assert (tmp_path / ".coffret" / "config").exists()
    program("push", tmp_path / "linked")
    [line] = program("ls").stdout.splitlines()
    assert line.endswith(f"{tmp_path}/linked")
    outcome = program("clone", copy)
    assert re.fullmatch(rf"clone: cloned repository [0-9a-f]{{8}} to {copy}: \d+ objects, [\d.]+ k?B\n", outcome.stdout)
    assert program("on", copy, "ls").stdout == f"{line}\n"
    assert stored(copy) == stored(tmp_path / ".coffret")


def test_from_kind_to_kind_and_back(here: Here) -> None:
    """Without any passphrase; each copy opens with the original's."""
    original, file, back = stored(here.repository), here.home / "a" / "x.db", here.home / "back"
    bare = Here(here.home)
    bare("clone", "to", f"sqlite://{file}")
    assert stored_in_file(file) == original
    bare("at", f"sqlite://{file}", "clone", back)
    assert stored(back) == original
    listed = here("ls").stdout
    for location in (f"sqlite://{file}", back):
        assert here("at", location, "ls").stdout == listed
        here("at", location, "check")
    # A copy goes on as what it is a copy of.
    here("at", back, "backup", here.home / "source")
    assert len(here("at", back, "ls").stdout.splitlines()) == 3
    assert here("ls").stdout == listed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sftp", "s3"])
def test_to_a_server_and_back(here: Here, kind: str) -> None:
    elsewhere = test_storages.sftp() if kind == "sftp" else test_storages.s3(tls=False)
    remote = Here(here.home, {**here.environment, **elsewhere.environment})
    remote("clone", "to", elsewhere.url)
    (here.home / "source" / "newer").write_bytes(os.urandom(100_000))
    here("backup", here.home / "source")
    assert "were there already" in remote("clone", elsewhere.url).stdout
    remote("at", elsewhere.url, "check")
    remote("at", elsewhere.url, "clone", here.home / "back")
    assert stored(here.home / "back") == stored(here.repository)
    again = remote("clone", elsewhere.url, "--json").summary
    assert (again["objects"], again["size_bytes"]) == (0, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    """Nothing that calls itself a repository is left; the next run takes up what is there."""
    fault_harness.create(tmp_path, encrypted=False)
    program, copy = Program(tmp_path), tmp_path / "copy"
    for index in range(4):
        (tmp_path / str(index)).write_bytes(os.urandom(6 << 20))
        program("backup", tmp_path / str(index))
    process = program.start("clone", copy, "--limit-upload", "6M")
    deadline = time.monotonic() + 60
    while not objects(copy, "packs") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.decode().splitlines()[-1].startswith("coffret: interrupted; what was stored is kept")
    there = objects(copy, "packs")
    assert there
    outcome = program("at", copy, "ls", code=10)
    assert "if it is a clone that was interrupted, run that again" in outcome.stderr
    summary = program("clone", copy, "--json").summary
    assert summary["kept"] >= len(there)
    assert {name for name in stored(copy) if not name.startswith("tmp/")} == stored(program.repository).keys()
    program("at", copy, "check")


def test_the_readme_s_commands(here: Here) -> None:
    """Those of "Copies" run as they stand, with other places."""
    _, _, section = (ROOT / "README.md").read_text().partition("\n## Copies\n")
    lines = re.findall(r"^coffret (.*clone .*|.*--like .*|at sqlite.*ls)$", section, re.MULTILINE)
    assert len(lines) >= 5
    places = {
        "/var/backups": here.repository,
        "/media/stick": here.home / "stick",
        "/srv/restored": here.home / "restored",
        "/srv/second": here.home / "second",
    }
    for line in lines:
        words = shlex.split(line, comments=True)
        for place, path in places.items():
            words = [word.replace(place, str(path)) for word in words]
        outcome = here(*words, environment={"COFFRET_PEER_PASSPHRASE": fault_harness.PASSPHRASE})
        assert len(outcome.stdout.splitlines()) == (2 if "ls" in words else 1)
    assert stored(here.home / "restored") == stored(here.repository)


def test_json(here: Here) -> None:
    copy = os.fsencode(here.home) + b"/copy \xff"
    outcome = here("clone", "to", os.fsdecode(copy), "--json", "-v")
    messages = validate_all(outcome, "item of backup, check, restore and clone", "summary of clone")
    items = [message for message in messages if message["message_type"] == "item"]
    summary = messages[-1]
    assert len(items) == summary["objects"] == len(stored(here.repository))
    assert {item["status"] for item in items} == {"copied"}
    assert sum(item["size_bytes"] for item in items) == summary["size_bytes"]
    assert base64.b64decode(summary["destination_b64"]) == copy


def test_damage_is_told(here: Here) -> None:
    """The exit code says that it is not all there."""
    pack = objects(here.repository, "packs")[0]
    name = pack.relative_to(here.repository).as_posix()
    put_in_place(pack, pack.read_bytes()[:-1] + b"?")
    outcome = here("clone", here.home / "copy", codes=(3,))
    assert outcome.stderr.splitlines()[-1] == f"clone: {name}: its bytes are not those of its name"
    assert "; not copied: 1 damaged object: run `coffret at REPO check`" in outcome.stdout
    assert here("clone", here.home / "copy", "--json", codes=(3,)).summary["damaged_objects"] == [name]
    here("at", here.home / "copy", "check", codes=(4,))


def test_where_it_can_not_be(here: Here) -> None:
    home = here.home
    (home / "docs").mkdir()
    (home / "docs" / "letter").write_text("mine")
    (home / "file").write_text("mine")
    for words, code, said in (
        (["clone"], 2, "clone wants one DEST"),
        (["clone", "to"], 2, "clone wants one DEST"),
        (["clone", "a", "b"], 2, "clone wants one DEST"),
        (["clone", home / "docs"], 10, "holds other files, 'letter' for one (choose a new or an empty place)"),
        (["clone", home / "file"], 10, "Not a directory (choose a new or an empty place)"),
        (["clone", f"sqlite://{home}/file"], 10, "(choose a new or an empty place)"),
        (["clone", here.repository], 2, "lies in the repository itself"),
        (["clone", here.repository / "packs" / "x"], 2, "lies in the repository itself"),
        (["clone", "ftp://x/y"], 2, "not a known kind"),
        (["at", home / "none", "clone", home / "x"], 10, "no repository"),
        (["clone", home / "x", "--expect-id", "0" * 64], 1, "not the one expected"),
        (["clone", home / "x", "-o", "region=x"], 2, "has no option"),
    ):
        assert said in here(*words, codes=(code,)).stderr, words
    assert [path.name for path in (home / "docs").iterdir()] == ["letter"]
    assert not (home / "x").exists()
    other = home / "other"
    Here(home)("at", other, "create", "--no-encryption")
    assert "sync to" in here("clone", other, codes=(2,)).stderr


def test_it_is_no_copy_of_itself(here: Here) -> None:
    """Whatever the location: nobody must think that there is a copy."""
    server = ServerProcess(here.home, "--no-auth")
    server.start()
    try:
        before = stored(here.repository)
        assert "is the repository itself" in here("clone", server.url, codes=(2,)).stderr
        assert "is the repository itself" in here("at", server.url, "clone", here.repository, codes=(2,)).stderr
        passphrase = {"COFFRET_PEER_PASSPHRASE": fault_harness.PASSPHRASE}
        assert "or they are one repository" in here("sync", "to", server.url, environment=passphrase).stderr
    finally:
        server.kill()
    assert stored(here.repository) == before
    assert not objects(here.repository, "leases")


def test_a_passphrase_for_a_repository_without_encryption(tmp_path: Path) -> None:
    """As everywhere: whoever gives one does not expect this repository."""
    here = fault_harness.create(tmp_path, encrypted=False)
    for variable, code in (("COFFRET_PASSPHRASE", 2), ("COFFRET_PEER_PASSPHRASE", 0)):
        here("clone", tmp_path / f"copy {code}", environment={variable: "x"}, codes=(code,))
