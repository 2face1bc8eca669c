"""Whatever lies where a repository is expected: one clear line, the right exit code, and nothing stored is lost."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import PosixPath
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests import fault_harness
from tests.fault_harness import PASSPHRASE, Here, make_source, objects, put_in_place
from tests.harness import NOBODY, Program, needs_root, with_mounts

from coffret.engine.records import Config

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bad_input.stage import Stage


def test_wrong_or_no_passphrase(stage: Stage) -> None:
    stage.reset()
    none = Here(stage.home)
    for command in (
        ["ls"],
        ["check"],
        ["backup", str(stage.source)],
        ["restore", "latest", "--to", str(stage.home / "t")],
    ):
        assert "no passphrase was given" in none(*command, codes=(12,)).stderr
        stage.run(*command, codes=(12,), environment={"COFFRET_PASSPHRASE": "another"})
    assert not (stage.home / "t").exists()
    none("check", "--packs")


def test_passphrase_without_encryption(tmp_path: Path) -> None:
    """Somebody believes that the repository is encrypted: nothing is stored in clear."""
    run = fault_harness.create(tmp_path, encrypted=False)
    for name in ("COFFRET_PASSPHRASE", "COFFRET_PASSPHRASE_FILE", "COFFRET_PASSPHRASE_COMMAND"):
        outcome = run("backup", str(tmp_path / "cache"), codes=(2,), environment={name: PASSPHRASE})
        assert "has no encryption" in outcome.stderr
    assert not objects(run.repository, "packs")


def test_nothing_or_something_else_there(tmp_path: Path) -> None:
    run = Here(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "folder2").mkdir()
    (tmp_path / "folder2" / "config").write_text("[core]\n\tbare = false\n")
    for place in ("absent", "folder", "folder/file", "folder2", "folder/file/below"):
        for command in (["ls"], ["check"], ["check", "--packs"], ["backup", "."], ["restore", "latest"]):
            run("at", tmp_path / place, *command, codes=(10,))
    for place in ("folder", "folder/file"):
        outcome = run("at", tmp_path / place, "create", "--no-encryption", codes=(10,))
        assert outcome.stderr.endswith(" (choose a new or an empty place)\n")
    run("at", tmp_path / "folder2", "create", "--no-encryption", codes=(2,))
    assert (tmp_path / "folder" / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path / "folder")) == ["file"]
    assert sorted(os.listdir(tmp_path / "folder2")) == ["config"]
    run("at", "gopher://x/y", "ls", codes=(2,))


def test_no_such_path(stage: Stage) -> None:
    stage.reset()
    outcome = stage.run("backup", stage.home / "nowhere", codes=(1,))
    assert "nowhere" in outcome.stderr
    outcome = stage.run("backup", stage.home / "nowhere", stage.source, "--workers", "1", codes=(3,))
    assert "nowhere" in outcome.stderr
    stage.run("restore", "latest:/nowhere", "--to", stage.home / "target", codes=(2,))
    stage.run("restore", "0123", "--to", stage.home / "target", codes=(1,))
    stage.run("ls", "latest:/nowhere", codes=(2,))


def test_target_in_use(stage: Stage) -> None:
    stage.reset()
    target = stage.home / "target"
    target.write_text("a file")
    stage.run("restore", "latest", "--to", target, codes=(1,))
    stage.run("restore", "latest", "--to", target / "below", codes=(1,))
    assert target.read_text() == "a file"
    target.unlink()
    target.mkdir()
    (target / "large").write_text("mine")
    assert "large is there already" in stage.run("restore", "latest", "--to", target, codes=(1,)).stderr
    assert os.listdir(target) == ["large"]
    assert (target / "large").read_text() == "mine"


def test_what_was_checked(stage: Stage) -> None:
    stage.reset()
    packs = len(objects(stage.run.repository, "packs"))
    outcome = Here(stage.home)("check", "--packs")
    assert outcome.stdout == f"check: the checksums of {packs} packs are right\n"
    short = stage.run("ls").stdout.splitlines()[-1].split()[1]
    once = stage.run("check", "latest").stdout
    assert once == f"check: verification of {short}:{stage.source} completed successfully\n"
    part = f"latest:{stage.source}/second"
    for twice in (["latest", short], [part, "latest", part]):
        assert stage.run("check", *twice).stdout == once
    assert stage.run("check", part, part).stdout.count(short) == 1


def test_no_cache(stage: Stage) -> None:
    """Where the cache can't be kept that is said, and all goes on."""
    stage.reset()
    place = stage.home / "no-folder"
    place.write_text("a file")
    outcome = stage.run("ls", "--cache-dir", place)
    assert re.fullmatch(rf"ls: note: no local cache is kept: {place}/\S+: Not a directory\n", outcome.stderr)
    assert stage.run("ls", "--no-cache").stderr == ""


def test_no_room_to_create(tmp_path: Path) -> None:
    program = Program(tmp_path, prefix=with_mounts(f'mount -t tmpfs -o nr_inodes=50 none {tmp_path}; exec "$0" "$@"'))
    [line] = program("create", "--no-encryption", code=13).stderr.splitlines()
    assert "No space left on device" in line
    assert line.endswith("(free some space and run the command again)")


@needs_root
@pytest.mark.skipif(subprocess.run(["unshare", "--user", "true"]).returncode != 0, reason="no user namespaces here")
def test_target_of_another(tmp_path: Path) -> None:
    """A target whose own metadata can't be set has a name, too."""
    program, target = Program(tmp_path), tmp_path / "target"
    (tmp_path / "source").mkdir()
    program("create", "--no-encryption")
    program("backup", tmp_path / "source")
    target.mkdir()
    os.chown(target, NOBODY, NOBODY)
    target.chmod(0o777)
    without_privileges = replace(program, prefix=("unshare", "--user"))
    reason = "mode not set: Operation not permitted"
    outcome = without_privileges("restore", "latest", "--to", target, code=3)
    assert f"restore: {tmp_path}/source: {reason}" in outcome.stderr.splitlines()
    outcome = without_privileges("restore", "--json", "latest", "--to", target, code=3)
    assert outcome.faults[os.fsencode(tmp_path / "source")].endswith("Operation not permitted")


@needs_root
def test_not_permitted() -> None:
    """As a user who may not write: to the repository, to the target, and who may not read it either."""
    from tests.harness import scratch

    with scratch(uid=NOBODY) as home:
        run = Program(home, uid=NOBODY)
        run("create", "--no-encryption")
        source = home / "source"
        make_source(source, large_bytes=1 << 20)
        source.chmod(0o755)
        run("backup", source)
        shut = home / "shut"
        shut.mkdir(mode=0o755)
        run("restore", "latest", "--to", shut / "target", code=1)
        for folder, _, _ in os.walk(run.repository):
            os.chown(folder, 0, 0)
            os.chmod(folder, 0o755)
        outcome = run("backup", source, code=1)
        assert "permission" in outcome.stderr.lower()
        run("restore", "latest", "--to", home / "target", code=3 if os.geteuid() else 0)
        run.repository.chmod(0o700)
        outcome = run("ls", code=1)
        assert "permission" in outcome.stderr.lower()


@pytest.mark.parametrize(("version", "told"), [(7, "newer version of coffret"), (0, "before the first release")])
def test_another_version(stage: Stage, version: int, told: str) -> None:
    stage.reset()
    config = stage.run.repository / "config"
    data = config.read_bytes().replace(b'"version":1', b'"version":%d' % version)
    put_in_place(config, data.replace(b'"hash"', b'"later":[1],"hash"'))
    for command in (["ls"], ["check"], ["check", "--packs"], ["backup", str(stage.source)]):
        outcome = stage.run(*command, codes=(1,))
        assert f"version {version}" in outcome.stderr
        assert told in outcome.stderr


def test_config_of_absurd_size(stage: Stage) -> None:
    stage.reset()
    config = stage.run.repository / "config"
    head = config.read_bytes()[:50]
    put_in_place(config, head)
    os.truncate(config, 1 << 40)
    stage.run("ls", codes=(1,))


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service, say: it is told what to do, and no directory called "~" is made."""
    run = fault_harness.create(tmp_path, encrypted=False)
    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    for folder in ("state", "cache"):
        monkeypatch.setattr(f"platformdirs.user_{folder}_path", lambda *_, **__: PosixPath("~/folder"))
    monkeypatch.chdir(tmp_path)
    homeless = Here(tmp_path)
    outcome = homeless("backup", source, "--workers", "1", codes=(1,))
    assert "--expect-id" in outcome.stderr
    assert "XDG_STATE_HOME" in outcome.stderr
    assert not objects(run.repository, "packs")
    repository_id = msgspec.json.decode((run.repository / "config").read_bytes(), type=Config).repository_id
    homeless("--expect-id", repository_id, "backup", source, "--workers", "1")
    assert not (tmp_path / "~").exists()
