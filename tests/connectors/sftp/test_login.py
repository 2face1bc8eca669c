"""Who is let in where: keys, host keys, configuration, and servers that refuse."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC251 - here nothing else waits for the event loop

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import anyio
import asyncssh
import pytest
from tests.connectors import sshd
from tests.connectors.servers import free_port, missing
from tests.connectors.sftp.tools import created
from tests.connectors.stores import files
from tests.connectors.test_conformance import MIB, listed

from coffret.connectors import sftplogin
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    InvalidLocation,
    NotStorage,
    PermissionRefused,
    StorageFull,
)
from coffret.connectors.local import LocalConnector
from coffret.connectors.sftp import SFTPConnector, open_url
from coffret.connectors.sftplogin import Address, Login

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


pytestmark = pytest.mark.anyio


@pytest.fixture
def confined() -> Iterator[sshd.SSHServer]:
    """A server whose user is not root, in a folder that is not the user's."""
    server = sshd.shared_server(chroot=True)
    environment = sshd.Environment(server.home)
    yield server
    environment.restore()


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
            missing("no ssh-agent")
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
        async with open_url(f"sftp://127.0.0.1:{free_port()}/x", {}) as connector:
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
