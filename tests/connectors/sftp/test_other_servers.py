"""SFTP servers that know less than OpenSSH's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncssh
import pytest
from tests.connectors import sshd
from tests.connectors import test_conformance as suite
from tests.connectors.sftp.tools import created, run_other
from tests.connectors.stores import LocalStore, files
from tests.connectors.test_conformance import race

from coffret.connectors.errors import (
    AlreadyExists,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coffret.connectors.base import Connector

pytestmark = pytest.mark.anyio


class OtherStore(LocalStore):
    """A server of another make, by its folder."""

    def __init__(self, server: sshd.OtherSSHServer, folder: Path) -> None:
        super().__init__(folder)
        self._server = server

    def connector(self) -> Connector:
        return self._server.connector(self.path)


class TestOtherServers:
    """A server without links, fsync, replacing renames and large requests: all of the suite but the exclusive puts."""

    @pytest.fixture
    def store(self, other: sshd.OtherSSHServer, tmp_path: Path) -> OtherStore:
        return OtherStore(other, tmp_path)

    @pytest.fixture
    async def connector(self, store: OtherStore) -> AsyncIterator[Connector]:
        async with store.connector() as connector:
            await connector.create()
            yield connector

    class TestPutAndGet(suite.TestPutAndGet):
        pass

    class TestRanges(suite.TestRanges):
        pass

    class TestAbsence(suite.TestAbsence):
        pass

    class TestList(suite.TestList):
        pass

    class TestCancellation(suite.TestCancellation):
        pass

    class TestCreate(suite.TestCreate):
        pass

    async def test_a_taken_name(self, store: OtherStore, connector: Connector) -> None:
        await suite.TestPutIfAbsent().test_a_taken_name(store, connector)

    async def test_whether_names_are_exclusive_is_found_out(self, store: OtherStore, connector: Connector) -> None:
        careful = store._server._kind is sshd.CarefulServer
        assert connector.capabilities.exclusive_puts is careful
        await connector.put("config", [b"1"])
        assert any("several hosts" in note for note in connector.notes) is not careful
        assert any("power loss" in note for note in connector.notes)
        async with store.connector() as another:
            await another.get("config")
            assert another.capabilities.exclusive_puts is careful
        assert store.raw_names() == {"config"}

    async def test_of_racing_puts_of_one_process_one_wins(self, store: OtherStore, connector: Connector) -> None:
        won = await race([connector])
        assert [store.raw_get("snapshots/a")] == won
        assert store.raw_names() == {"snapshots/a"}

    async def test_replacing(self, store: OtherStore, connector: Connector) -> None:
        for number in range(3):
            await connector.put("leases/a", [b"%d" % number])
        assert store.raw_get("leases/a") == b"2"
        assert store.raw_names() == {"leases/a"}
        in_steps = any("in one step" in note for note in connector.notes)
        assert in_steps is (store._server._kind is sshd.CarefulServer)


class Pretender(sshd.OtherServer):
    """Offers links, fsync and replacing renames, and then knows none of them."""

    def link(self, oldpath: bytes, newpath: bytes) -> None:
        raise asyncssh.SFTPOpUnsupported("no links")

    def fsync(self, file_obj: object) -> None:
        raise asyncssh.SFTPOpUnsupported("no fsync")

    def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
        raise asyncssh.SFTPOpUnsupported("no renaming")


class WithoutLinks(asyncssh.SFTPServer):
    """Knows links, but its file system has none."""

    def link(self, oldpath: bytes, newpath: bytes) -> None:
        raise asyncssh.SFTPPermissionDenied("Operation not permitted")


@pytest.mark.parametrize("kind", [Pretender, WithoutLinks])
async def test_what_is_offered_may_not_work(tmp_path: Path, kind: type[asyncssh.SFTPServer]) -> None:
    for server in run_other(tmp_path, kind, extensions=True):
        async with created(server.connector(tmp_path / "r")) as connector:
            await connector.put("snapshots/a", [b"1"], if_absent=True)
            with pytest.raises(AlreadyExists):
                await connector.put("snapshots/a", [b"2"], if_absent=True)
            assert not connector.capabilities.exclusive_puts
            assert any("several hosts" in note for note in connector.notes)
            await connector.put("leases/a", [b"1"])
            await connector.put("leases/a", [b"2"])
            assert await connector.get("leases/a") == b"2"
        assert files(tmp_path / "r") == {"snapshots/a", "leases/a"}
