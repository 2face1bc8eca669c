"""What only SFTP has of locations, folders and objects."""

# ruff: noqa: ASYNC240 - here nothing else waits for the event loop

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncssh
import pytest
from tests.connectors.sftp.tools import created
from tests.connectors.stores import files
from tests.connectors.test_conformance import MIB, listed

from coffret.connectors.errors import (
    ConnectionLost,
    ConnectorError,
    InvalidLocation,
    InvalidRange,
    NotFound,
    NotStorage,
)
from coffret.connectors.limit import LimitConnector, Pace
from coffret.connectors.local import LocalConnector
from coffret.connectors.sftp import open_url
from coffret.connectors.sftperrors import KINDS, kind_of
from coffret.connectors.sftpfiles import pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.connectors import sshd

    from coffret.connectors.base import Buffer

pytestmark = pytest.mark.anyio


class TestLocations:
    def test_forms(self) -> None:
        for url, location, root in [
            ("sftp://host/srv/backup", "sftp://host/srv/backup", b"/srv/backup"),
            ("sftp://user@host:2222//srv//backup/", "sftp://user@host:2222/srv/backup", b"/srv/backup"),
            ("SFTP://host/~/back%20up", "sftp://host/~/back%20up", b"back up"),
            ("sftp://host/~", "sftp://host/~", b"."),
            ("sftp://host/~other/x", "sftp://host/~other/x", b"/~other/x"),
            ("sftp://host/", "sftp://host/", b"/"),
            ("sftp://[::1]:22/x%3F%23?connections=8", "sftp://[::1]:22/x%3F%23", b"/x?#"),
        ]:
            connector = open_url(url, {})
            assert (connector.location, connector._root) == (location, root)

    @pytest.mark.parametrize(
        "url",
        ["sftp://host", "sftp:///x", "sftp://u:p@host/x", "sftp://host:0/x", "sftp://host:a/x", "sftp://host/x#a",
         "sftp://host/%00", "sftp://host/x?a=b", "sftp://host/x?connections=0", "sftp://host/x?connections=a"],
    )  # fmt: skip
    def test_what_is_none(self, url: str) -> None:
        with pytest.raises(InvalidLocation):
            open_url(url, {})

    def test_connections(self) -> None:
        assert open_url("sftp://host/x", {}).capabilities.parallel_puts == 4
        assert open_url("sftp://host/x?connections=8", {}).capabilities.parallel_puts == 8
        assert open_url("sftp://host/x?connections=8", {"connections": "2"}).capabilities.parallel_puts == 2


class TestErrors:
    def test_every_error_of_the_library_has_its_kind(self) -> None:
        def below(kind: type[BaseException]) -> Iterator[type[BaseException]]:
            for found in kind.__subclasses__():
                yield found
                yield from below(found)

        classes: set[type[BaseException]] = {asyncssh.DisconnectError, asyncssh.SFTPError, asyncssh.ChannelOpenError}
        classes |= {*below(asyncssh.DisconnectError), *below(asyncssh.SFTPError)}
        assert {kind.__name__ for kind in classes if kind.__module__.startswith("asyncssh")} == KINDS.keys()

    def test_others(self) -> None:
        assert kind_of(ConnectionResetError()) is kind_of(EOFError()) is ConnectionLost
        assert kind_of(ValueError()) is ConnectorError


def test_pieces() -> None:
    body: list[Buffer] = [b"", b"ab", b"cdefgh", memoryview(b"i"), bytearray(), b"jk"]
    for limit in range(1, 13):
        cut = list(pieces(body, limit))
        assert b"".join(piece for _, piece in cut) == b"abcdefghijk"
        assert [offset for offset, _ in cut] == list(range(0, 11, limit))
        assert all(len(piece) == limit for _, piece in cut[:-1])
    assert list(pieces([], 4)) == list(pieces([b""], 4)) == []


class TestLayout:
    async def test_it_is_that_of_a_local_repository(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with created(server.connector(tmp_path / "a" / "remote")) as connector:
            await connector.put("config", [b"{}"], if_absent=True)
            await connector.put("packs/0f/one", [b"1"])
            async with LocalConnector(tmp_path / "a" / "remote") as local:
                await local.create()
                await local.put("snapshots/two", [b"2"])
                assert await local.get("packs/0f/one") == b"1"
            assert await connector.get("snapshots/two") == b"2"
        async with LocalConnector(tmp_path / "local") as local:
            await local.create()

        def tree(path: Path) -> set[tuple[str, int]]:
            return {(str(below.relative_to(path)), below.stat().st_mode) for below in path.rglob("*") if below.is_dir()}

        assert tree(tmp_path / "local") == tree(tmp_path / "a" / "remote")
        assert (tmp_path / "a" / "remote" / "packs" / "0f" / "one").stat().st_mode & 0o777 == 0o600

    async def test_from_the_home_folder(self, server: sshd.SSHServer) -> None:
        name = f"coffret-test-{os.urandom(8).hex()}"
        home = Path(f"~{server.user}").expanduser()  # sshd goes by the user database
        if not os.access(home, os.W_OK):
            pytest.skip("no home folder to write to")
        try:
            async with created(open_url(f"sftp://127.0.0.1:{server.port}/~/{name}", {})) as connector:
                await connector.put("keys/a", [b"1"])
                assert (home / name / "keys" / "a").read_bytes() == b"1"
        finally:
            shutil.rmtree(home / name, ignore_errors=True)

    async def test_something_else_is_there(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "letter").write_text("")
        (tmp_path / "lost" / "packs" / "aa").mkdir(parents=True)
        (tmp_path / "lost" / "packs" / "aa" / "one").write_text("")
        (tmp_path / "file").write_text("")
        for name, reason in (("full", "letter"), ("lost", "without its config"), ("file", "not a folder")):
            async with server.connector(tmp_path / name) as connector:
                with pytest.raises(NotStorage, match=reason):
                    await connector.create()
        assert files(tmp_path) == {"full/letter", "lost/packs/aa/one", "file"}

    async def test_a_repository_that_is_not_there(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with server.connector(tmp_path / "none") as connector:
            for call in (
                connector.get("config"), connector.stat("config"), connector.delete("config"), listed(connector),
                listed(connector, "packs/"), connector.put("leases/a", [b""]),
            ):  # fmt: skip
                with pytest.raises(NotFound):
                    await call
        assert not (tmp_path / "none").exists()

    async def test_missing_folders_are_made(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with server.connector(tmp_path) as connector:
            await connector.put("packs/aa/one", [b"1"])
            await connector.put("a/b/c/d", [b"2"], if_absent=True)
            assert await listed(connector) == ["a/b/c/d", "packs/aa/one"]
        assert files(tmp_path) == {"a/b/c/d", "packs/aa/one"}


class TestObjects:
    async def test_many_in_order(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with created(server.connector(tmp_path / "r")) as connector:
            names = {f"index/{number:x}" for number in range(2500)}
            names |= {f"packs/{number % 256:02x}/{number}" for number in range(1500)}
            names |= {"a-b", "a/x", "a.b", "a0", "packs/0a-", "packs/0a.x", "z/a/b-", "z/a/b/c", "z/a-/b"}
            for name in names:
                (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "r" / name).write_bytes(b"")
            assert [info.name async for info in connector.list("")] == sorted(names)
            below = sorted(name for name in names if name.startswith("packs/0"))
            assert [info.name async for info in connector.list("packs/0")] == below

    async def test_what_is_no_object_is_not_listed(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with created(server.connector(tmp_path / "r")) as connector:
            index = tmp_path / "r" / "index"
            (index / "link").symlink_to("/etc/hostname")
            (index / "Upper").write_text("")
            (index / "é").write_text("")
            os.mkfifo(index / "pipe")
            (tmp_path / "r" / "tmp" / "left").write_text("")
            assert await listed(connector) == []

    async def test_large(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        data = random.Random(1).randbytes(64 * MIB + 12345)
        async with created(server.connector(tmp_path / "r")) as connector:
            await connector.put("packs/aa/one", [memoryview(data)[: 9 * MIB + 1], memoryview(data)[9 * MIB + 1 :]])
            assert (tmp_path / "r" / "packs" / "aa" / "one").read_bytes() == data
            buffer = bytearray(len(data))
            await connector.get_into("packs/aa/one", 0, memoryview(buffer))
            assert buffer == data
            with pytest.raises(InvalidRange):
                await connector.get_into("packs/aa/one", 1, memoryview(buffer))

    async def test_temporary_files_of_the_dead_alone_are_swept(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        old, new, other = "0" * 32, "1" * 32, "notes"
        async with created(server.connector(tmp_path / "r")):
            pass
        for name in (old, new, other):
            (tmp_path / "r" / "tmp" / name).write_text("")
        for name in (old, other):
            os.utime(tmp_path / "r" / "tmp" / name, (time.time() - 25 * 3600,) * 2)
        async with server.connector(tmp_path / "r") as connector:
            await connector.put("leases/a", [b""])
        assert files(tmp_path / "r") == {f"tmp/{new}", f"tmp/{other}", "leases/a"}

    async def test_pace(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with created(server.connector(tmp_path / "r")) as connector:
            pace = Pace()
            taken = {"upload": 0, "download": 0}

            def count(way: str) -> Callable[[int], Any]:
                async def take(size_bytes: int) -> None:
                    taken[way] += size_bytes
                    assert size_bytes <= 256 << 10

                return take

            pace.upload.take, pace.download.take = count("upload"), count("download")  # type: ignore[assignment, method-assign]
            assert connector.set_pace(pace)
            for size_bytes in (10, MIB):
                await connector.put("packs/aa/one", [bytes(size_bytes)])
                await connector.get("packs/aa/one")
                await connector.get("packs/aa/one", offset=1, length=5)
                await connector.get_into("packs/aa/one", 0, memoryview(bytearray(size_bytes)))
            assert taken == {"upload": 10 + MIB, "download": 2 * (10 + MIB) + 10}
            limited = LimitConnector(connector, upload=2 * MIB)
            limited._pace.upload.take = count("upload")  # type: ignore[assignment, method-assign]
            await limited.put("packs/aa/two", [bytes(MIB)])
            assert taken["upload"] == 10 + 2 * MIB
