"""The servers of the remote scenarios, on free ports of this host: versitygw for S3, OpenSSH's sshd for SFTP.

`tests/connectors` has its servers from here too, and adds what only tests do to them.
"""

from __future__ import annotations

import atexit
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CREDENTIALS = ("coffret-test", "a secret of the tests")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
_HOST = "127.0.0.1"
# Below those that the system gives to whoever asks for any: a server that is started again finds its own still free.
_PORTS = range(20_000, 32_000)
_INSTALL = Path(__file__).parents[1] / "tests" / "tools" / "install-versitygw"
_INSTALL_S = 280.0
_START_S = 20.0
_SSHD_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
MaxSessions 100
# Not a program of its own, which would be started by the user's shell, with whatever that does first.
Subsystem sftp internal-sftp
{more}
"""


class ServerMissing(Exception):
    """A server is not installed here."""


class Server:
    """A process that listens on `port` of this host, and writes to `log`."""

    def __init__(self, log: Path) -> None:
        self.log, self.port = log, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        """What to start."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Its environment."""
        return dict(os.environ)

    def start(self) -> None:
        """Start, or start again, on the same port; returns when it answers.

        :raises ServerMissing: if it is not installed
        :raises RuntimeError: if it does not answer
        """
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command(), env=self.environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        atexit.register(self.kill)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError), socket.create_connection((_HOST, self.port), timeout=1):
                return
            time.sleep(0.02)
        text = self.log.read_text(errors="replace")[-1000:]
        raise RuntimeError(f"{self.command()[0]} does not start: {text}")

    @property
    def pid(self) -> int:
        """Of the process that listens."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """As a power cut."""
        if self._process is not None:
            stop(self.pid)  # or what it makes meanwhile would go on listening
            kill_below(self.pid)
            self._process.kill()
            self._process.wait()
            self._process = None
        atexit.unregister(self.kill)


class Versitygw(Server):
    """versitygw on the folder `buckets`; `tls` are a certificate and its key."""

    def __init__(
        self,
        folder: Path,
        *,
        buckets: Path,
        region: str = "us-east-1",
        tls: Sequence[Path] = (),
        more: Sequence[str] = (),
    ) -> None:
        super().__init__(folder / "log")
        self.folder, self.buckets = folder, buckets
        self._region, self._tls, self._more = region, tls, more
        for each in (folder, buckets):
            each.mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str]:
        certificate = [str(part) for pair in zip(("--cert", "--key"), self._tls, strict=False) for part in pair]
        return [
            versitygw(), "--port", f"{_HOST}:{self.port}", "--region", self._region, "--quiet", "--keep-alive",
            *certificate, *self._more, "posix", *self._sidecar(), str(self.buckets),
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return os.environ | dict(zip(("ROOT_ACCESS_KEY_ID", "ROOT_SECRET_ACCESS_KEY"), CREDENTIALS, strict=True))

    def _sidecar(self) -> tuple[str, ...]:
        """Where the file system has no extended attributes, the server keeps its own notes elsewhere."""
        try:
            os.setxattr(self.buckets, "user.coffret-test", b"1")
            os.removexattr(self.buckets, "user.coffret-test")
        except OSError:
            (self.folder / "notes").mkdir(exist_ok=True)
            return ("--sidecar", str(self.folder / "notes"))
        return ()


class Home:
    """A home folder with an SSH key, and with the host key of a server among those it knows."""

    def __init__(self, path: Path) -> None:
        self.path, self.ssh = path, path / ".ssh"
        self.ssh.mkdir(parents=True, exist_ok=True)
        self.key, self.known_hosts = self.ssh / "id_ed25519", self.ssh / "known_hosts"
        if not self.key.exists():
            make_key(self.key)

    def know(self, public: Path) -> None:
        """Trust a host key for 127.0.0.1, whatever the port: proxies have others."""
        self.known_hosts.write_text(f"{_HOST} {public.read_text()}")


class Sshd(Server):
    """OpenSSH's sshd for the user who starts it, with its keys, and a home for clients, in `folder`."""

    def __init__(self, folder: Path, *, more: str = "") -> None:
        if SSHD is None:
            raise ServerMissing("no sshd: install openssh-server")
        super().__init__(folder / "log")
        self.folder, self.home, self.user = folder, Home(folder / "home"), getpass.getuser()
        make_key(folder / "host")
        self.home.know(folder / "host.pub")
        self.authorize(self.home.key)
        (folder / "config").write_text(_SSHD_CONFIG.format(port=self.port, folder=folder, more=more))

    def authorize(self, key: Path) -> None:
        """Let in who has this key, and nobody else."""
        authorized = self.folder / "authorized"
        authorized.write_text(key.with_suffix(".pub").read_text())
        authorized.chmod(0o644)

    def command(self) -> Sequence[str]:
        return [SSHD or "", "-D", "-e", "-f", str(self.folder / "config")]

    def start(self) -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        super().start()


def versitygw() -> str:
    """The path of versitygw, built if there is Go.

    :raises ServerMissing: if it can't be
    """
    folders = os.pathsep.join((os.environ.get("PATH", ""), str(Path("~/go/bin").expanduser())))
    if found := shutil.which("versitygw", path=folders):
        return found
    built = subprocess.run([_INSTALL], capture_output=True, text=True, timeout=_INSTALL_S)
    if built.returncode == 0:
        return built.stdout.strip()
    raise ServerMissing(f"no versitygw: {built.stderr.strip().splitlines()[-1]}")


def free_port() -> int:
    """A port that nobody listens on at the moment.

    :raises OSError: if none is found
    """
    for port in random.SystemRandom().sample(_PORTS, 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind((_HOST, port))
            return port
    raise OSError("no port is free")


def make_key(path: Path) -> None:
    """Make a pair of SSH keys."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", path], check=True)


def children_of(pid: int) -> list[int]:
    """The processes below one, children before their parents."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [found for child in children for found in (*children_of(child), child)]


def kill_below(pid: int) -> None:
    """End the processes below one as a crash does, those too that they make meanwhile."""
    found: set[int] = set()
    while more := set(children_of(pid)) - found:
        found |= more
        for child in more:
            stop(child)
    kill(found)


def stop(pid: int) -> None:
    """Stop a process, and return when it stands still, or is no more."""
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TtZX":
            time.sleep(0.001)


def kill(pids: Iterable[int]) -> None:
    """End processes as a crash does, those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
