"""What tests of the SFTP connector share."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.connectors import sshd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import asyncssh

    from coffret.connectors.sftp import SFTPConnector


def run_other(tmp_path: Path, kind: type[asyncssh.SFTPServer], **options: bool) -> Iterator[sshd.OtherSSHServer]:
    root = tmp_path / "other"
    root.mkdir()
    server = sshd.OtherSSHServer(root, kind, **options)
    environment = sshd.Environment(server.home)
    server.start()
    yield server
    server.stop()
    environment.restore()


@asynccontextmanager
async def created(connector: SFTPConnector) -> AsyncIterator[SFTPConnector]:
    async with connector:
        await connector.create()
        yield connector
