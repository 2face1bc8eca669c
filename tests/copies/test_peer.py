"""The other repository of a command: with a passphrase of its own, and nothing of what was said of the first."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

import anyio
import pytest
from tests.fault_harness import cheap_passphrases

from coffret.commands.line import Globals
from coffret.commands.running import Session
from coffret.engine.creation import create_repository
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from coffret.engine.records import Config

OWN, PEERS = "one of R's", "one of the peer's"


def make(home: Path, name: str, passphrase: str | None) -> Config:
    """A new repository below `home`."""
    options = OpenOptions(state_dir=home / "state" / "coffret")
    given = None if passphrase is None else passphrase.encode()
    with cheap_passphrases():
        return anyio.run(partial(create_repository, str(home / name), passphrase=given, options=options))


def opened(home: Path, environment: Mapping[str, str], given: Globals | None = None, *, both: bool = True) -> list[str]:
    """The ids of what a command opens: R, unless only the peer is asked for, and the peer, `p`."""
    session, ids = Session("sync", given or Globals(repository=str(home / "r"))), []

    async def operation() -> int:
        if not both:
            async with session.peer(str(home / "p")) as peer:
                ids.append(peer.config.repository_id)
            return 0
        async with session.repository() as repository, session.peer(str(home / "p")) as peer:
            ids.extend(found.config.repository_id for found in (repository, peer))
            calls = session.options.calls
            assert session.display.storage_calls is calls[repository.connector.location]
            assert peer.connector.location in calls
        return 0

    variables = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_STATE_HOME": str(home / "state"),
        **environment,
    }
    with mock.patch.dict(os.environ, variables, clear=True):
        code = session.run(operation)
    assert (code == 0) == bool(ids)
    return ids or [str(code)]


@pytest.mark.parametrize("own", [OWN, None], ids=["encrypted", "clear"])
@pytest.mark.parametrize("peers", [PEERS, None], ids=["encrypted-peer", "clear-peer"])
def test_each_by_its_own_passphrase(tmp_path: Path, own: str | None, peers: str | None) -> None:
    ids = [make(tmp_path, "r", own).repository_id, make(tmp_path, "p", peers).repository_id]
    environment = {} if own is None else {"COFFRET_PASSPHRASE": own}
    if peers is not None:
        (tmp_path / "file").write_text(peers)
        environment["COFFRET_PEER_PASSPHRASE_FILE"] = str(tmp_path / "file")
    assert opened(tmp_path, environment) == ids


def test_what_is_said_of_the_first_is_not_said_of_the_peer(tmp_path: Path) -> None:
    first, peer = make(tmp_path, "r", None), make(tmp_path, "p", None)
    location = str(tmp_path / "r")
    given = Globals(repository=location)
    given.expect_id = first.repository_id
    assert opened(tmp_path, {}, given)[1] == peer.repository_id
    # A local repository has no options, and would say so.
    given = Globals(repository=location, options={"region": "x"})
    assert opened(tmp_path, {}, given, both=False) == [peer.repository_id]
    assert opened(tmp_path, {}, given) == ["2"]


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({}, "12", "the peer repository is encrypted and no passphrase was given (set COFFRET_PEER_PASSPHRASE, "),
        ({"COFFRET_PEER_PASSPHRASE": OWN}, "12", "COFFRET_PEER_PASSPHRASE gives another than any of this peer"),
        ({"COFFRET_PEER_PASSPHRASE": ""}, "2", "COFFRET_PEER_PASSPHRASE gives an empty passphrase"),
    ],
)
def test_errors_name_the_peers_variables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], environment: dict[str, str], code: str, words: str
) -> None:
    make(tmp_path, "r", OWN)
    make(tmp_path, "p", PEERS)
    assert opened(tmp_path, {"COFFRET_PASSPHRASE": OWN, **environment}) == [code]
    assert words in capsys.readouterr().err


def test_a_passphrase_for_a_peer_without_encryption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "r", OWN)
    make(tmp_path, "p", None)
    assert opened(tmp_path, {"COFFRET_PASSPHRASE": OWN, "COFFRET_PEER_PASSPHRASE": PEERS}) == ["2"]
    assert "has no encryption" in capsys.readouterr().err
