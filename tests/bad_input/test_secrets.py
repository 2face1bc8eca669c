"""What nobody may see or change unnoticed: secrets, content in clear, an older state."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests import fault_harness
from tests.fault_harness import PASSPHRASE, Here, contents, make_source, objects, put_in_place

from coffret import cli
from coffret.engine.configuration import config_bytes
from coffret.engine.records import Config

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bad_input.stage import Stage


def test_never_in_clear(stage: Stage) -> None:
    """A config that says there is no encryption, its own id or a new one: no upload, whatever else is kept."""
    stage.reset()
    stage.run("backup", stage.source, "--workers", "1")
    config = stage.run.repository / "config"
    original = config.read_bytes()
    decoded = msgspec.json.decode(original, type=Config)
    keys = {"encryption": "none", "id_key": "11" * 32, "chunker_key": "22" * 32}
    same_id = config_bytes(msgspec.structs.replace(decoded, **keys))
    elsewhere = stage.home / "clear"
    elsewhere.mkdir(exist_ok=True)
    clear = fault_harness.create(elsewhere, encrypted=False).repository / "config"
    (stage.source / "secret").write_bytes(b"never in clear" * 1000)
    try:
        for planted in (same_id, clear.read_bytes()):
            put_in_place(config, planted)
            before = len(objects(stage.run.repository, "packs"))
            for environment in ({}, {"COFFRET_PASSPHRASE": PASSPHRASE}):
                Here(stage.home)("backup", stage.source, codes=(1,), environment=environment)
            assert len(objects(stage.run.repository, "packs")) == before
    finally:
        (stage.source / "secret").unlink()
    put_in_place(config, original)
    stage.run("check")


@pytest.mark.parametrize("how", ["rolled back", "swapped for a clone"])
def test_other_state_of_the_repository(tmp_path: Path, how: str) -> None:
    """With the same cache the next backup stores all that this state of the repository lacks."""
    run = fault_harness.create(tmp_path, encrypted=False)
    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    early, late = tmp_path / "early", tmp_path / "late"
    if how.startswith("rolled"):
        run("backup", source, "--workers", "1")
    shutil.copytree(run.repository, early)
    (source / "second").write_bytes(os.urandom(300_000))
    run("backup", source, "--workers", "1")
    (source / "third").write_bytes(os.urandom(300_000))
    run("backup", source, "--workers", "1")
    run.repository.rename(late)
    early.rename(run.repository)
    run("backup", source, "--workers", "1")
    assert len(_missing(run)) == 2
    run("restore", "latest", "--to", tmp_path / "target")
    assert contents(tmp_path / "target") == contents(source)
    # And back again.
    run.repository.rename(early)
    late.rename(run.repository)
    (source / "fourth").write_bytes(os.urandom(300_000))
    run("backup", source, "--workers", "1")
    assert len(_missing(run)) == 1
    run("restore", "latest", "--to", tmp_path / "target2")
    assert contents(tmp_path / "target2") == contents(source)


def _missing(run: Here) -> list[str]:
    """The snapshots that a check misses; it finds nothing else."""
    found = run("check", "--json", codes=(4,)).summary
    assert not (found["damaged_packs"] or found["damaged_objects"] or found["damaged_snapshots"])
    missing: list[str] = found["missing_snapshots"]
    return missing


@pytest.mark.parametrize("level", ["as it is", "with tracebacks"])
def test_secrets_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """An unexpected error deep inside, with tracebacks asked for: neither passphrase nor keys are in the output."""
    from coffret.engine import keys

    run = fault_harness.create(tmp_path)
    found = []
    unlock = keys.unlock

    def broken(*arguments: object) -> object:
        found.append(unlock(*arguments)[1])  # type: ignore[arg-type]
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(keys, "unlock", broken)
    with run._surroundings({} if level == "with tracebacks" else {"COFFRET_TRACEBACK": ""}) as (out, err):
        assert cli.run(["ls"]) == 1
    shown = (out.getvalue() + err.getvalue()).decode()
    assert ("Traceback" in shown) == (level == "with tracebacks")
    for secret in (found[0].data_key, found[0].id_key, found[0].chunker_key):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
    assert PASSPHRASE not in shown


def test_swapped_where_nothing_can_be_remembered(tmp_path: Path) -> None:
    """An encrypted storage swapped for one without encryption, no passphrase in the environment: nothing is written."""
    run = fault_harness.create(tmp_path)
    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    (tmp_path / "no folder").touch()
    shut = {"XDG_STATE_HOME": str(tmp_path / "no folder")}
    run("backup", source, "--workers", "1", environment=shut)
    run.repository.rename(tmp_path / "encrypted")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fault_harness.create(elsewhere, encrypted=False).repository.rename(run.repository)
    before = sorted(run.repository.rglob("*"))
    clear = Here(tmp_path, shut)
    outcome = clear("backup", source, "--workers", "1", codes=(1,))
    assert "--expect-id" in outcome.stderr
    assert "XDG_STATE_HOME" in outcome.stderr
    assert sorted(run.repository.rglob("*")) == before
    clear("ls")  # reading goes on
    repository_id = msgspec.json.decode((run.repository / "config").read_bytes(), type=Config).repository_id
    clear("--expect-id", repository_id, "backup", source, "--workers", "1")
