"""SSH servers for the tests: OpenSSH's sshd, plain or confined to SFTP in a folder, and one of another make."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import pwd
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import asyncssh
import asyncssh.sftp
from bench.remote_servers import SSHD, Home, Sshd, children_of, kill_below, make_key
from bench.remote_servers import kill as _kill
from tests.connectors.servers import free_port, missing

from coffret.connectors.sftp import SFTPConnector, open_url

__all__ = ["Environment", "Home", "OtherSSHServer", "SSHServer", "_kill", "free_port", "make_key", "shared_server"]
_CHROOT = "ForceCommand internal-sftp\nChrootDirectory {0}\nAllowTcpForwarding no"


class SSHServer(Sshd):
    """An sshd on a free port of this host, for the user that runs the tests or, confined to `chroot`, for nobody."""

    def __init__(self, *, chroot: bool = False, more: str = "") -> None:
        if SSHD is None:
            missing("no sshd: install openssh-server")
        # Not in pytest's folders, which only their owner can enter.
        folder = Path(tempfile.mkdtemp(prefix="coffret-test-ssh-"))
        folder.chmod(0o755)
        self.root = folder
        if chroot:
            self.root = self._make_chroot()
            more += _CHROOT.format(self.root)
        super().__init__(folder, more=more)
        if chroot:
            self.user = "nobody"

    def _make_chroot(self) -> Path:
        if os.getuid() != 0:
            missing("only root can confine another user")
        # sshd wants each folder above to be root's alone.
        root = Path(tempfile.mkdtemp(prefix="coffret-test-ssh-", dir="/run"))
        root.chmod(0o755)
        (root / "data").mkdir()
        nobody = pwd.getpwnam("nobody")
        os.chown(root / "data", nobody.pw_uid, nobody.pw_gid)
        return root

    def sessions(self) -> list[int]:
        """The process ids of those that serve somebody, children before their parents."""
        return children_of(self.pid)

    def kill_sessions(self) -> None:
        """End all connections as a crash does; the server goes on listening."""
        kill_below(self.pid)

    def remove(self) -> None:
        """Kill it, and leave nothing behind."""
        self.kill()
        for folder in {self.folder, self.root}:
            shutil.rmtree(folder, ignore_errors=True)

    def connector(self, path: Path | str, *, port: int | None = None, **options: str) -> SFTPConnector:
        """A connector to a folder, given as it is seen on this host; `port` is that of a proxy."""
        path = Path(path)
        if self.root != self.folder:
            path = Path("/") / path.relative_to(self.root)
        return open_url(f"sftp://{self.user}@127.0.0.1:{port or self.port}{path}", options)


class OtherServer(asyncssh.SFTPServer):
    """An SFTP server without exclusive creation: a rename replaces what is there, and so does creating a file."""

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
        if pflags & asyncssh.FXF_EXCL:
            pflags = pflags & ~asyncssh.FXF_EXCL | asyncssh.FXF_TRUNC
        return super().open(path, pflags, attrs)

    def rename(self, oldpath: bytes, newpath: bytes) -> None:
        os.replace(self.map_path(oldpath), self.map_path(newpath))


class CarefulServer(asyncssh.SFTPServer):
    """One that refuses to rename to a taken name, as SFTP 3 wants it."""


class OtherSSHServer:
    """A server of another make than OpenSSH, in a thread: plain SFTP 3 with no extension, 16 KiB a request."""

    def __init__(self, root: Path, kind: type[asyncssh.SFTPServer] = OtherServer, *, extensions: bool = False) -> None:
        self.root, self._kind, self._extensions = root, kind, extensions
        self.home = Home(root / "home")
        self._host = root / "host"
        make_key(self._host)
        self.home.know(root / "host.pub")
        self.port = free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._known = asyncssh.sftp.SFTPServerHandler._extensions
        if not self._extensions:
            asyncssh.sftp.SFTPServerHandler._extensions = []
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def stop(self) -> None:
        asyncssh.sftp.SFTPServerHandler._extensions = self._known
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def connector(self, path: Path, **options: str) -> SFTPConnector:
        return open_url(f"sftp://somebody@127.0.0.1:{self.port}{path}", options)

    async def _listen(self) -> None:
        self._server = await asyncssh.listen(
            "127.0.0.1",
            self.port,
            server_host_keys=[str(self._host)],
            authorized_client_keys=str(self.home.key.with_suffix(".pub")),
            sftp_factory=self._kind,
        )

    async def _close(self) -> None:
        self._server.close()
        await self._server.wait_closed()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=5)


class Environment:
    """Makes a folder the user's home, without an agent, until `restore`."""

    def __init__(self, home: Home) -> None:
        names = ("HOME", "SSH_AUTH_SOCK")
        self._before = {name: os.environ.pop(name) for name in names if name in os.environ}
        os.environ["HOME"] = str(home.path)

    def restore(self) -> None:
        del os.environ["HOME"]
        os.environ.update(self._before)


@functools.cache
def shared_server(*, chroot: bool) -> SSHServer:
    """A server for all tests that don't kill it."""
    server = SSHServer(chroot=chroot)
    atexit.register(server.remove)
    server.start()
    return server
