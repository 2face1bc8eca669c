"""What begins before the command is imported: it saves time where it can, and changes nothing where it can't."""

from __future__ import annotations

import functools
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
from coffret.engine.derivation import begin_derivation
from coffret.engine.errors import WrongPassphrase
from coffret.engine.opening import open_repository
from coffret.engine.repository import OpenOptions
from coffret.engine.state import likely_slot

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
    derived = derivation.keys(b"right")
    assert derived is not None
    assert derived == kdf.derive(derived.parameters, b"right")
    assert derivation.keys(b"right") is None  # a key is kept no longer than it is needed
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
        ("check", ["--packs"], here),
        ("passphrase", ["add", "--from=recovery"], here),
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


async def test_for_another_passphrase_or_place_it_is_not_used(place: Path) -> None:
    derivation = derive_early("ls", [], Globals(repository=str(place)))
    assert derivation is not None
    assert derivation.keys(b"wrong") is None
    for location, passphrase in ((derivation.location, b"wrong"), ("file:///elsewhere", b"wrong")):
        begun = begin_derivation(location, likely_slot(derivation.location), lambda: b"right")
        with pytest.raises(WrongPassphrase):
            async with open_repository(
                str(place), passphrase=functools.partial(bytes, passphrase), options=OpenOptions(derivation=begun)
            ):
                pass


async def test_where_the_current_directory_is_gone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert derive_early("ls", [], Globals(repository="repository")) is None


async def test_what_goes_wrong_is_told_by_whoever_needs_the_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(kdf, "derive", fail)
    derivation = derive_early("ls", [], Globals(repository=str(place)))
    assert derivation is not None
    assert derivation.keys(b"right") is None


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
