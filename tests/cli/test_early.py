"""What begins before the command is imported: it saves time where it can, and changes nothing where it can't."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from tests.fault_harness import cheap_passphrases
from tests.harness import Program

from coffret.commands.early import derive_early
from coffret.commands.line import Globals
from coffret.connectors.local import LocalConnector
from coffret.engine import kdf
from coffret.engine.creation import create_repository

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that this user has made; the passphrase is at hand."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COFFRET_PASSPHRASE", "right")
    place = tmp_path / "repository"
    with cheap_passphrases():
        await create_repository(str(place), passphrase=b"right")
    return place


async def test_the_keys_of_a_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derivation = derive_early("backup", ["."], Globals(repository=str(place)))
    assert derivation is not None
    assert derivation.location == LocalConnector(place).location
    derived = derivation.keys()
    assert derived is not None
    assert derived == kdf.derive(derived.parameters, b"right")
    monkeypatch.chdir(place.parent)
    (place.parent / "link").symlink_to(place)
    for name in ("repository", "./link", str(place / "..") + "/repository/"):
        again = derive_early("ls", [], Globals(repository=name))
        assert again is not None
        assert again.location == derivation.location


async def test_nothing_begins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no key is needed, nothing is known, or somebody would have to be asked."""
    here = Globals(repository=str(place))
    for command, arguments, globals_ in (
        ("create", [], here),
        ("backup", ["--help"], here),
        ("ls", ["-h"], here),
        ("ls", [], Globals(repository=str(place.parent / "other"))),
        ("ls", [], Globals(repository=f"file://{place}")),
        ("ls", [], Globals(repository="s3://host/bucket")),
        ("ls", [], Globals(repository="a\0b")),
        ("ls", [], Globals(repository=str(place), options={"key": "value"})),
    ):
        assert derive_early(command, arguments, globals_) is None, (command, arguments, globals_)
    monkeypatch.setenv("COFFRET_PASSPHRASE_COMMAND", "cat /dev/tty")
    assert derive_early("ls", [], here) is None
    monkeypatch.delenv("COFFRET_PASSPHRASE_COMMAND")
    monkeypatch.setenv("COFFRET_PASSPHRASE", "")  # what is wrong with it is told when it is needed
    assert derive_early("ls", [], here) is None
    monkeypatch.delenv("COFFRET_PASSPHRASE")
    assert derive_early("ls", [], here) is None


async def test_without_another_thread(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert derive_early("ls", [], Globals(repository=str(place))) is None


def test_the_passphrase_may_be_wrong(tmp_path: Path) -> None:
    program = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "right"})
    program("create")
    program("ls")
    wrong = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "wrong"})("ls", code=12)
    assert wrong.stderr.startswith("coffret: the passphrase opens none of the repository's 1 key slots")


def test_another_slot_may_have_taken_its_place(tmp_path: Path) -> None:
    """What is remembered goes for a slot that is gone."""
    program = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "right"})
    program("create")
    elsewhere = Program(
        tmp_path, environment={"COFFRET_PASSPHRASE": "right", "XDG_STATE_HOME": str(tmp_path / "other")}
    )
    new = {"COFFRET_NEW_PASSPHRASE": "right"}
    Program(tmp_path, environment={**elsewhere.environment, **new})("passphrase", "change")
    program("ls")
    program("ls")
