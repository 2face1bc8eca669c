"""A server that lets few folders be open at a time."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.connectors import sshd

pytestmark = pytest.mark.anyio


async def test_many_folders(own_server: sshd.SSHServer, tmp_path: Path) -> None:
    """A listing has no more of them open than the server offers."""
    resource.prlimit(own_server.pid, resource.RLIMIT_NOFILE, (40, 40))
    names = [f"packs/{number:02x}/{number:064x}" for number in range(200)]
    for name in names:
        place = tmp_path / "repository" / name
        place.parent.mkdir(parents=True)
        place.write_bytes(b"x")
    (tmp_path / "repository" / "config").write_bytes(b"x")
    async with own_server.connector(tmp_path / "repository") as connector:
        assert [info.name async for info in connector.list("packs/")] == names
