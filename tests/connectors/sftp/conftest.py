"""SSH servers for what only SFTP has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.connectors import sshd
from tests.connectors.sftp.tools import run_other

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server() -> Iterator[sshd.SSHServer]:
    """The server that all share; its user is at home."""
    server = sshd.shared_server(chroot=False)
    environment = sshd.Environment(server.home)
    yield server
    environment.restore()


@pytest.fixture
def own_server() -> Iterator[sshd.SSHServer]:
    """A server to kill or to configure."""
    server = sshd.SSHServer()
    environment = sshd.Environment(server.home)
    server.start()
    yield server
    environment.restore()
    server.remove()


@pytest.fixture(params=[sshd.OtherServer, sshd.CarefulServer], ids=["replacing", "careful"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sshd.OtherSSHServer]:
    """A server of another make."""
    yield from run_other(tmp_path, request.param)
