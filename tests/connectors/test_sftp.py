"""What only SFTP has: logins, host keys, connections that break, and servers that know less than OpenSSH's."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC240, ASYNC251 - here nothing else waits for the event loop

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import random
import shutil
import socket
import subprocess
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import asyncssh
import pytest
from tests.connectors import sshd
from tests.connectors import test_conformance as suite
from tests.connectors.proxy import Proxy
from tests.connectors.stores import LocalStore
from tests.connectors.test_conformance import MIB, listed

from coffret.connectors import sftpconnections, sftplogin
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    InvalidLocation,
    InvalidRange,
    NotFound,
    NotStorage,
    PermissionRefused,
    StorageFull,
)
from coffret.connectors.limit import LimitConnector, Pace
from coffret.connectors.local import LocalConnector
from coffret.connectors.retry import RetryConnector
from coffret.connectors.sftp import SFTPConnector, open_url
from coffret.connectors.sftperrors import KINDS, kind_of
from coffret.connectors.sftpfiles import pieces
from coffret.connectors.sftplogin import Address, Login

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from coffret.connectors.base import Buffer, Connector

pytestmark = pytest.mark.anyio


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


@pytest.fixture
def confined() -> Iterator[sshd.SSHServer]:
    """A server whose user is not root, in a folder that is not the user's."""
    server = sshd.shared_server(chroot=True)
    environment = sshd.Environment(server.home)
    yield server
    environment.restore()


@pytest.fixture(params=[sshd.OtherServer, sshd.CarefulServer], ids=["replacing", "careful"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sshd.OtherSSHServer]:
    """A server of another make."""
    yield from run_other(tmp_path, request.param)


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


def patient(connector: Connector, told: list[str] | None = None) -> RetryConnector:
    def tell(what: str, error: ConnectorError) -> None:
        if told is not None:
            told.append(f"{what}: {error}")

    return RetryConnector(connector, first_wait_s=0.05, give_up_s=30, on_retry=tell)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


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


class TestLogin:
    async def test_an_unknown_host_key(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        known = server.home.known_hosts.read_bytes()
        try:
            for content in (b"", None):
                if content is None:
                    server.home.known_hosts.unlink()
                else:
                    server.home.known_hosts.write_bytes(content)
                async with server.connector(tmp_path) as connector:
                    with pytest.raises(PermissionRefused, match=r"SHA256:.* is not known.*ssh -p .*ssh-keyscan -p"):
                        await connector.create()
            for line in ("UserKnownHostsFile none", "StrictHostKeyChecking no", "UserKnownHostsFile /dev/null"):
                (server.home.ssh / "config").write_text(f"{line}\n")
                async with server.connector(tmp_path) as connector:
                    with pytest.raises(PermissionRefused, match="is not known"):
                        await connector.create()
        finally:
            server.home.known_hosts.write_bytes(known)
            (server.home.ssh / "config").unlink(missing_ok=True)
        assert not files(tmp_path)

    async def test_another_host_key(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        known = server.home.known_hosts.read_bytes()
        sshd.make_key(tmp_path / "another")
        try:
            server.home.know(tmp_path / "another.pub")
            async with server.connector(tmp_path) as connector:
                with pytest.raises(PermissionRefused, match=r"not the one in known_hosts.*ssh-keygen -R"):
                    await connector.create()
        finally:
            server.home.known_hosts.write_bytes(known)

    async def test_a_wrong_key(self, own_server: sshd.SSHServer, tmp_path: Path) -> None:
        sshd.make_key(tmp_path / "another")
        own_server.authorize(tmp_path / "another")
        async with own_server.connector(tmp_path) as connector:
            with pytest.raises(PermissionRefused, match=r"the key .*id_ed25519.*no password.*ssh-add"):
                await connector.create()

    async def test_no_key_at_all(self, own_server: sshd.SSHServer, tmp_path: Path) -> None:
        own_server.home.key.unlink()
        async with own_server.connector(tmp_path) as connector:
            with pytest.raises(PermissionRefused, match="no key, and there is no agent"):
                await connector.create()

    async def test_as_the_configuration_says(self, own_server: sshd.SSHServer, tmp_path: Path) -> None:
        home = own_server.home
        home.key.rename(home.ssh / "special")
        (home.ssh / "config").write_text(
            f"Host nas\n HostName 127.0.0.1\n Port {own_server.port}\n User {own_server.user}\n"
            " IdentityFile ~/.ssh/special\n IdentityFile ~/.ssh/missing\n"
            " UserKnownHostsFile ~/.ssh/mine\n Ciphers aes256-ctr\n"
        )
        home.known_hosts.rename(home.ssh / "mine")
        async with created(open_url(f"sftp://nas{tmp_path}/r", {})) as connector:
            await connector.put("keys/a", [b"1"])
            assert connector.location == f"sftp://nas{tmp_path}/r"
        assert (tmp_path / "r" / "keys" / "a").exists()

    async def test_an_encrypted_key_is_taken_from_the_agent(self, own_server: sshd.SSHServer, tmp_path: Path) -> None:
        if not shutil.which("ssh-agent"):
            sshd.missing("no ssh-agent")
        key = own_server.home.key
        agent = tmp_path / "agent"
        process = subprocess.Popen(["ssh-agent", "-D", "-a", agent], stdout=subprocess.DEVNULL)
        try:
            while not agent.exists():
                time.sleep(0.01)
            os.environ["SSH_AUTH_SOCK"] = str(agent)
            subprocess.run(["ssh-add", "-q", key], check=True, capture_output=True)
            subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", key], check=True, capture_output=True)
            async with created(own_server.connector(tmp_path / "r")):
                pass
            del os.environ["SSH_AUTH_SOCK"]
            async with own_server.connector(tmp_path / "r") as connector:
                with pytest.raises(PermissionRefused, match="ssh-add"):
                    await connector.create()
        finally:
            os.environ.pop("SSH_AUTH_SOCK", None)
            process.kill()
            process.wait()

    async def test_no_host_no_server(self, server: sshd.SSHServer, monkeypatch: pytest.MonkeyPatch) -> None:
        async with open_url(f"sftp://127.0.0.1:{sshd.free_port()}/x", {}) as connector:
            with pytest.raises(ConnectionLost, match="connection refused"):
                await connector.get("config")

        def fail(*_: Any, **__: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        async def fail_later(*_: Any, **__: Any) -> Any:
            fail()

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fail_later, raising=False)
        async with open_url("sftp://nowhere.invalid/x", {}) as connector:
            with pytest.raises((InvalidLocation, ConnectionLost), match=r"nowhere\.invalid"):
                await connector.get("config")

    async def test_something_else_listens(self, server: sshd.SSHServer) -> None:
        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        listener = await asyncio.start_server(greet, "127.0.0.1", 0)
        async with listener, open_url(f"sftp://127.0.0.1:{listener.sockets[0].getsockname()[1]}/x", {}) as connector:
            with pytest.raises(ConnectorError, match=r"127\.0\.0\.1"):
                await connector.get("config")

    async def test_a_user_without_sftp(self, tmp_path: Path) -> None:
        server = sshd.SSHServer(more="ForceCommand echo This account is not for you.")
        environment = sshd.Environment(server.home)
        try:
            server.start()
            async with server.connector(tmp_path) as connector:
                with pytest.raises(NotStorage, match="no SFTP"):
                    await connector.create()
        finally:
            environment.restore()
            server.remove()

    async def test_a_broken_configuration(self, own_server: sshd.SSHServer, tmp_path: Path) -> None:
        (own_server.home.ssh / "config").write_text("Port many\n")
        async with own_server.connector(tmp_path) as connector:
            with pytest.raises(ConnectorError, match=r"~/\.ssh"):
                await connector.create()

    @pytest.mark.parametrize("right", [True, False])
    async def test_a_password_is_asked_once(self, tmp_path: Path, right: bool) -> None:
        """asyncssh's server, since sshd would need one in the system's database."""
        sshd.make_key(tmp_path / "host")
        home = sshd.Home(tmp_path / "home")
        home.know(tmp_path / "host.pub")

        class Server(asyncssh.SSHServer):
            def password_auth_supported(self) -> bool:
                return True

            def validate_password(self, username: str, password: str) -> bool:
                return password == "right"

        environment = sshd.Environment(home)
        asked: list[str] = []

        def ask(prompt: str) -> str:
            asked.append(prompt)
            return "right" if right else "wrong"

        listener = await asyncssh.listen(
            "127.0.0.1", 0, server_factory=Server, server_host_keys=[str(tmp_path / "host")], sftp_factory=True
        )
        try:
            address = Address("127.0.0.1", listener.get_port(), "somebody")
            (tmp_path / "r").mkdir()
            path = bytes(tmp_path / "r")
            async with SFTPConnector(address, path, login=Login(address, ask)) as connector:
                if right:
                    await connector.create()
                    async with anyio.create_task_group() as tasks:
                        for number in range(4):
                            tasks.start_soon(connector.put, f"index/{number}", [bytes(2 * MIB)])
                else:
                    for _ in range(2):
                        with pytest.raises(PermissionRefused, match="a password too"):
                            await connector.create()
            assert asked == [f"{address}'s password: "]
            async with SFTPConnector(address, path, login=Login(address, lambda _: None)) as connector:
                with pytest.raises(PermissionRefused, match="no password"):
                    await connector.create()
        finally:
            environment.restore()
            listener.close()
            await listener.wait_closed()

    def test_no_prompt_without_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", None)
        assert sftplogin.ask_on_terminal("?") is None


class TestRefusals:
    async def test_no_permission(self, confined: sshd.SSHServer) -> None:
        folder = confined.root / "theirs"
        shutil.rmtree(folder, ignore_errors=True)
        async with LocalConnector(folder) as local:
            await local.create()
            await local.put("config", [b"1"])
            await local.put("packs/aa/one", [b"1"])
        try:
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            folder.chmod(0o755)
            async with confined.connector(folder) as connector:
                assert await connector.get("config") == b"1"
                assert await listed(connector) == ["config", "packs/aa/one"]
                for call in (
                    connector.put("packs/aa/two", [b"2"]), connector.put("leases/a", [b"2"], if_absent=True),
                    connector.put("packs/aa/one", [bytes(MIB)]), connector.delete("packs/aa/one"),
                ):  # fmt: skip
                    with pytest.raises(PermissionRefused, match="ermission denied"):
                        await call
                (folder / "config").chmod(0o600)
                with pytest.raises(PermissionRefused):
                    await connector.get("config")
                (folder / "tmp").chmod(0o777)
                with pytest.raises(PermissionRefused):
                    await connector.put("leases/a", [b"2"], if_absent=True)
                assert connector.capabilities.exclusive_puts
            async with confined.connector(confined.root / "mine") as connector:
                with pytest.raises(PermissionRefused):
                    await connector.create()
            assert files(folder) == {"config", "packs/aa/one"}
        finally:
            shutil.rmtree(folder)

    async def test_a_full_disk(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount: {done.stderr.strip()}")
        try:
            async with created(server.connector(disk / "r")) as connector:
                await connector.put("packs/aa/one", [bytes(5 * MIB)])
                for if_absent in (False, True):
                    with pytest.raises(StorageFull, match="no space"):
                        await connector.put("packs/aa/two", [bytes(5 * MIB)], if_absent=if_absent)
                    assert files(disk / "r") == {"packs/aa/one"}
                (disk / "rest").write_bytes(bytes(shutil.disk_usage(disk).free))
                with pytest.raises(StorageFull):
                    await connector.put("packs/aa/three", [b"1"])
                assert files(disk / "r") == {"packs/aa/one"}
                (disk / "rest").unlink()
                await connector.put("packs/aa/two", [bytes(MIB)])
        finally:
            subprocess.run(["umount", "-l", disk], check=True)

    async def test_a_folder_of_that_name(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with created(server.connector(tmp_path / "r")) as connector:
            (tmp_path / "r" / "index" / "a" / "b").mkdir(parents=True)
            with pytest.raises(NotStorage, match="folder"):
                await connector.put("index/a", [b"1"])
            with pytest.raises(AlreadyExists):
                await connector.put("index/a", [b"1"], if_absent=True)
            assert files(tmp_path / "r") == set()


class TestConnections:
    @pytest.fixture(autouse=True)
    async def nothing_unretrieved(self) -> AsyncIterator[None]:
        """No error may end where nobody sees it: what the loop then reports fails the test."""
        yield
        gc.collect()

    async def test_they_are_opened_when_needed(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with Proxy(server.port) as proxy:
            async with server.connector(tmp_path / "r", port=proxy.port, connections="3") as connector:
                assert proxy.connections == 0
                await connector.create()
                async with anyio.create_task_group() as tasks:
                    for number in range(20):
                        tasks.start_soon(connector.put, f"index/{number}", [b"1"])
                assert proxy.connections == 1
                for _ in range(2):
                    async with anyio.create_task_group() as tasks:
                        for number in range(12):
                            tasks.start_soon(connector.put, f"packs/aa/{number}", [bytes(3 * MIB)])
                    assert proxy.connections == 3
            assert len(files(tmp_path / "r")) == 32

    async def test_fewer_than_wanted(self, own_server: sshd.SSHServer, tmp_path: Path) -> None:
        async with (
            Proxy(own_server.port) as proxy,
            created(own_server.connector(tmp_path / "r", port=proxy.port)) as connector,
        ):
            proxy.refuse = True
            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(connector.put, f"packs/aa/{number}", [bytes(2 * MIB)])
            assert len(await listed(connector)) == 8
            assert any("no more than 1 connections" in note for note in connector.notes)

    @pytest.mark.parametrize("what", ["sessions", "server", "sftp"])
    async def test_killed_in_the_middle(self, own_server: sshd.SSHServer, tmp_path: Path, what: str) -> None:
        """What was being put comes through, whole, and nothing is left in tmp/ once puts work again."""
        datas = {f"packs/aa/{number}": random.Random(number).randbytes(6 * MIB + number) for number in range(10)}
        told: list[str] = []
        async with created(own_server.connector(tmp_path / "r")) as inner:
            connector = patient(inner, told)

            async def kill() -> None:
                for _ in range(3):
                    await asyncio.sleep(0.25)
                    if what == "sessions":
                        own_server.kill_sessions()
                    elif what == "sftp":
                        sshd._kill(own_server.sessions()[:1])
                    else:
                        own_server.kill()
                        await asyncio.sleep(0.3)
                        own_server.start()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kill)
                for name, data in datas.items():
                    tasks.start_soon(lambda name, data: connector.put(name, [data], if_absent=True), name, data)
            for name, data in datas.items():
                assert hashlib.sha256(await connector.get(name)).digest() == hashlib.sha256(data).digest()
            await connector.put("leases/a", [b"1"])
            assert await listed(connector) == ["leases/a", *sorted(datas)]
        assert told
        assert files(tmp_path / "r") == {"leases/a", *datas}

    async def test_without_retries_it_is_an_error_and_then_works(
        self, own_server: sshd.SSHServer, tmp_path: Path
    ) -> None:
        async with created(own_server.connector(tmp_path / "r")) as connector:
            await connector.put("packs/aa/one", [bytes(MIB)])
            for _ in range(3):
                own_server.kill_sessions()
                with pytest.raises(ConnectionLost):
                    for _ in range(100):
                        await connector.get("packs/aa/one")
                assert len(await connector.get("packs/aa/one")) == MIB
            own_server.kill()
            for _ in range(3):
                with pytest.raises(ConnectionLost):
                    await connector.get("packs/aa/one")
            own_server.start()
            assert len(await connector.get("packs/aa/one")) == MIB

    async def test_cut_at_any_byte(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with created(server.connector(tmp_path / "r")), Proxy(server.port) as proxy:
            body = random.Random(1).randbytes(2 * MIB)
            for cut in (0, 1, 100, 1500, 3000, 4000, 5000, 6000, 50_000, 700_000, 2_000_000, 2_102_000):
                proxy.cut_after_bytes = cut
                async with server.connector(tmp_path / "r", port=proxy.port) as connector:
                    with anyio.fail_after(20):
                        try:
                            await connector.put(f"packs/aa/{cut}", [body])
                        except ConnectionLost:
                            stored = tmp_path / "r" / "packs" / "aa" / f"{cut}"
                            assert not stored.exists() or stored.read_bytes() == body
            async with server.connector(tmp_path / "r", port=proxy.port) as connector:
                proxy.cut_after_bytes = 900_000
                proxied = patient(connector)
                proxy.cut_after_bytes = None
                await proxied.put("packs/aa/last", [body])
                assert await proxied.get("packs/aa/last") == body

    async def test_a_half_open_connection_ends(
        self, server: sshd.SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sftpconnections, "SILENCE_S", 0.8)
        async with Proxy(server.port) as proxy, created(server.connector(tmp_path / "r", port=proxy.port)) as connector:
            await connector.put("packs/aa/one", [bytes(4 * MIB)])
            for call in (
                connector.get("packs/aa/one"), connector.put("packs/aa/two", [bytes(4 * MIB)]), listed(connector),
                connector.put("leases/a", [b"1"]),
            ):  # fmt: skip
                await connector.stat("packs/aa/one")
                proxy.blackhole = True
                with anyio.fail_after(10), pytest.raises(ConnectionLost, match="no answer"):
                    await call
                proxy.blackhole = False
            assert await listed(connector) == ["packs/aa/one"]
            # Whoever cancels does not wait for the dead either.
            monkeypatch.setattr(sftpconnections, "SILENCE_S", 3600)
            monkeypatch.setattr(sftpconnections, "_CLEAR_UP_S", 0.2)
            proxy.blackhole = True
            with anyio.move_on_after(0.1):
                await connector.put("packs/aa/two", [bytes(4 * MIB)])
            proxy.blackhole = False

    async def test_keepalive_notices_too(
        self, server: sshd.SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sftplogin, "_KEEPALIVE_S", 0.2)
        async with Proxy(server.port) as proxy, created(server.connector(tmp_path / "r", port=proxy.port)) as connector:
            await asyncio.sleep(1.5)  # they are answered
            await listed(connector)
            assert proxy.connections == 1
            proxy.blackhole = True
            with anyio.fail_after(10), pytest.raises(ConnectionLost):
                await connector.get("config")
            proxy.blackhole = False

    async def test_closing_does_not_hang(self, server: sshd.SSHServer, tmp_path: Path) -> None:
        async with Proxy(server.port) as proxy:
            connector = server.connector(tmp_path / "r", port=proxy.port)
            await connector.create()
            proxy.blackhole = True
            await connector.close()
        own = server.connector(tmp_path / "r")
        await own.close()

    async def test_latency_is_hidden(
        self, server: sshd.SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Requests do not wait for each other: how often all were answered before the next was made, at 20 ms a way."""
        data, under_way, rounds = random.Random(1).randbytes(8 * MIB), 0, 0
        make_request = asyncssh.sftp.SFTPClientHandler._make_request

        async def counted(self: asyncssh.sftp.SFTPClientHandler, *arguments: Any) -> object:
            nonlocal under_way, rounds
            rounds += under_way == 0
            under_way += 1
            try:
                return await make_request(self, *arguments)
            finally:
                under_way -= 1

        def rounds_before() -> int:
            nonlocal rounds
            before, rounds = rounds, 0
            return before

        monkeypatch.setattr(asyncssh.sftp.SFTPClientHandler, "_make_request", counted)
        async with (
            Proxy(server.port, delay_s=0.02) as proxy,
            server.connector(tmp_path / "r", port=proxy.port) as connector,
        ):
            await connector.create()  # 256 folders
            assert rounds_before() < 30
            await connector.put("leases/a", [b"1"])
            assert rounds_before() < 6
            await connector.put("packs/aa/one", [data])  # 66 requests, and as many to get it
            assert await connector.get("packs/aa/one") == data
            assert rounds_before() < 20
            assert await listed(connector) == ["leases/a", "packs/aa/one"]
            assert rounds_before() < 30


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
        won = []

        async def put(number: int) -> None:
            try:
                await connector.put("snapshots/a", [b"%d" % number], if_absent=True)
            except AlreadyExists:
                return
            won.append(b"%d" % number)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(put, number)
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
