"""What the program says where a token gives no right to a command: one line, before anything is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.harness import Program
from tests.server.program import ServerProcess

from coffret.connectors.base import APPEND_ONLY, FULL, READ_ONLY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = {
    "COFFRET_PASSPHRASE": "a passphrase",
    "COFFRET_PEER_PASSPHRASE": "a passphrase",
    "COFFRET_NEW_PASSPHRASE": "another",
}


class World:
    """A served repository with a snapshot in it, one like it here, and the program as who has a token runs it."""

    def __init__(self, folder: Path) -> None:
        self.server = ServerProcess(folder / "host")
        tokens = {right: self.server.token(right) for right in (READ_ONLY, APPEND_ONLY, FULL)}
        self.server.start()
        self.places = {"URL": self.server.url, "HERE": str(folder / "here"), "SOURCE": str(folder / "source")}
        (folder / "source").mkdir()
        (folder / "source" / "file").write_bytes(b"content")
        self.programs = {}
        for right, token in tokens.items():
            (folder / right).mkdir()
            environment = {**SECRET, "COFFRET_SERVER_TOKEN": token, "COFFRET_REPOSITORY": self.server.url}
            self.programs[right] = Program(folder / right, environment=environment)
        owner = self.programs[FULL]
        owner("create")
        owner("backup", folder / "source")
        owner("at", folder / "here", "create")
        owner("at", folder / "here", "backup", folder / "source")

    @property
    def stored(self) -> dict[str, bytes]:
        """All that lies in the served repository."""
        folder = self.server.root / "repository"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("refusals"))
    yield world
    world.server.kill()


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (APPEND_ONLY, "create"),
        (APPEND_ONLY, "rm latest"),
        (APPEND_ONLY, "prune --keep-last 1 --group-by host"),
        (APPEND_ONLY, "maintenance --grace 0"),
        (APPEND_ONLY, "maintenance --exclusive"),
        (APPEND_ONLY, "repair index --all"),
        (APPEND_ONLY, "repair snapshots --forget"),
        (APPEND_ONLY, "passphrase add"),
        (APPEND_ONLY, "passphrase change"),
        (APPEND_ONLY, "passphrase rm 0"),
        (READ_ONLY, "backup SOURCE"),
        (READ_ONLY, "rm latest"),
        (READ_ONLY, "repair index"),
        (READ_ONLY, "at HERE sync to URL"),
        (READ_ONLY, "at HERE sync with URL"),
    ],
)
def test_a_command_that_takes_more(world: World, right: str, words: str) -> None:
    if words.startswith("prune"):
        world.programs[APPEND_ONLY]("backup", world.places["SOURCE"])  # so that there is something to remove
    before = world.stored
    outcome = world.programs[right]("-q", *(world.places.get(word, word) for word in words.split()), code=1)
    (line,) = outcome.stderr.splitlines()
    assert f"token is {right}" in line
    assert "a full one" in line
    assert line.endswith("(use a token that gives the right to it, or run the command where the server runs)")
    assert world.stored == before


@pytest.mark.parametrize("right", [READ_ONLY, APPEND_ONLY])
def test_a_place_that_is_to_become_a_copy(tmp_path: Path, right: str) -> None:
    server = ServerProcess(tmp_path / "host")
    owner = Program(tmp_path, environment={"COFFRET_SERVER_TOKEN": server.token(right)})
    owner("create", "--no-encryption")
    server.start()
    try:
        outcome = owner("-q", "clone", server.url, code=1)
        (line,) = outcome.stderr.splitlines()
        assert f"the token is {right}; a clone takes a full one" in line
        assert not (server.root / "repository").exists()
    finally:
        server.kill()


def test_what_changes_nothing_takes_no_more(world: World) -> None:
    """A dry run, or a command that finds nothing to do."""
    before = world.stored
    for words in ("rm latest --dry-run", "maintenance --dry-run", "repair index --dry-run", "repair snapshots"):
        world.programs[READ_ONLY](*words.split())
    assert world.stored == before
