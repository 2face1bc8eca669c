"""How an SSH connection is made: host keys are always verified, and a refusal says what to do about it.

`~/.ssh/config` holds, and the agent and the user's keys are tried, as `ssh` would. A password is asked for on a
terminal only, once for all connections.
"""

from __future__ import annotations

import asyncio
import functools
import shlex
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from anyio import to_thread

from coffret.connectors.errors import AccessDenied, ConnectionLost, ConnectorError, InvalidLocation, NotStorage
from coffret.connectors.sftperrors import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncssh

_PORT = 22
# A host that is there answers within this (s), unless ~/.ssh/config says otherwise.
_CONNECT_S = 30
# The server's side of SFTP may be started by a shell that has much to do first (s).
_START_S = 60
# A peer that is gone without a word is given up after four times this (s); each answer begins it anew.
_KEEPALIVE_S, _KEEPALIVES = 15, 3
# How much of what a server sends may be under way on one connection (bytes). asyncssh's 2 MiB are 20 MB/s at a round
# trip of 100 ms; and it gives leave for more only when half of it has come.
_WINDOW_BYTES = 16 << 20
# AES-GCM moves 150 to 170 MiB/s through asyncssh where ChaCha20, its own first choice, moves 115: with AES in the
# processor, as everywhere but in the smallest of ARM boards.
_CIPHERS = [
    "aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com",
    "aes128-ctr", "aes192-ctr", "aes256-ctr",
]  # fmt: skip


class Address(msgspec.Struct, frozen=True):
    """Where an SSH server is; what is None is as ~/.ssh/config or ssh's defaults say."""

    host: str
    port: int | None = None
    user: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    @property
    def as_arguments(self) -> str:
        """For `ssh`."""
        port = f"-p {self.port} " if self.port else ""
        return port + shlex.quote(f"{self.user}@{self.host}" if self.user else self.host)


def ask_on_terminal(prompt: str) -> str | None:
    """Ask for a password; None without a terminal. Blocking."""
    if not sys.stdin or not sys.stdin.isatty():
        return None
    import getpass

    return getpass.getpass(prompt)


class Login(msgspec.Struct):
    """Opens connections to one server, with what was found out by the first: keys, known hosts, a password."""

    address: Address
    ask: Callable[[str], str | None] = ask_on_terminal
    _arguments: dict[str, Any] | None = None
    _passwords: dict[str, str | None] = msgspec.field(default_factory=dict)
    #: What the last attempt went through, for its error.
    tried: list[str] = msgspec.field(default_factory=list)
    key_refusal: str = ""

    def __repr__(self) -> str:
        return f"Login({self.address})"  # passwords never reach a log or a traceback

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("address", self.address)]

    async def connect(self) -> asyncssh.SSHClientConnection:
        """Open a connection.

        :raises AccessDenied: if the host key is not known, or the server refuses this user
        :raises InvalidLocation: if there is no such host
        :raises ConnectionLost: if nobody answers
        """
        reaching = None
        if self._arguments is None:
            reaching = asyncio.get_running_loop().create_task(self._reach())
            try:
                self._arguments = await to_thread.run_sync(self._prepare)
            except BaseException:
                reaching.add_done_callback(_close_reached)
                reaching.cancel()
                raise
        import asyncssh

        self.key_refusal = ""
        try:
            return await asyncssh.connect(
                **self._arguments,
                sock=await reaching if reaching is not None else None,
                client_factory=functools.partial(_client_class(), self),
            )
        except (asyncssh.Error, OSError, EOFError, ValueError) as error:
            raise self._explained(error) from error

    async def _reach(self) -> socket.socket | None:
        """Reach the server while asyncssh is imported (80 ms), if it is clear where that is: at one address.

        What ~/.ssh/config says only asyncssh knows, and of several addresses it finds the one that answers.
        """
        loop = asyncio.get_running_loop()
        if _is_configured():
            return None
        found = await loop.getaddrinfo(self.address.host, self.address.port or _PORT, type=socket.SOCK_STREAM)
        if len(found) != 1:
            return None
        family, kind, protocol, _, where = found[0]
        reached = socket.socket(family, kind, protocol)
        try:
            reached.setblocking(False)
            async with asyncio.timeout(_CONNECT_S):
                await loop.sock_connect(reached, where)
        except BaseException:
            reached.close()
            raise
        return reached

    def _prepare(self) -> dict[str, Any]:
        """The arguments for `asyncssh.connect`. Blocking: it imports, and reads files."""
        import asyncssh

        arguments: dict[str, Any] = {"host": self.address.host}
        if self.address.port is not None:
            arguments["port"] = self.address.port
        if self.address.user is not None:
            arguments["username"] = self.address.user
        try:
            # (): ~/.ssh/config, as `connect` takes it too.
            config = asyncssh.SSHClientConnectionOptions(**arguments, config=(), client_keys=None).config
            arguments |= _identities(config.get("IdentityFile", ()))
            options = asyncssh.SSHClientConnectionOptions(**arguments, config=())
        except (OSError, ValueError) as error:
            raise ConnectorError(f"{self.address}: ~/.ssh: {error}") from error
        if config.get("Ciphers") is None:
            arguments["encryption_algs"] = _CIPHERS
        if not options.keepalive_interval:
            arguments |= {"keepalive_interval": _KEEPALIVE_S, "keepalive_count_max": _KEEPALIVES}
        if options.connect_timeout is None:
            arguments["connect_timeout"] = _CONNECT_S
        arguments["window"] = _WINDOW_BYTES
        # What we send is sealed: it gets no smaller.
        arguments["compression_algs"] = ["none"]
        arguments["known_hosts"] = _known_hosts(config)
        self.tried = [f"the key {_name_of(key)}" for key in options.client_keys or ()]
        self.tried += ["the agent"] if options.agent_path else []
        return arguments

    def password(self, prompt: str) -> str | None:
        """The password that was given before, else asked for now; None if there is none. Blocking."""
        if prompt not in self._passwords:
            self._passwords[prompt] = self.ask(prompt)
        return self._passwords[prompt]

    def _explained(self, error: Exception) -> ConnectorError:
        """The error of the tree for one that happened while connecting, in words for who reads them."""
        import asyncssh

        where = str(self.address)
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return AccessDenied(f"{where}: {self.key_refusal or error.reason}")
        if isinstance(error, asyncssh.PermissionDenied):
            tried = ", ".join(self.tried) or "no key, and there is no agent"
            asked = "a password too" if any(self._passwords.values()) else "no password (there is no terminal)"
            return AccessDenied(
                f"{where}: the server lets nobody in by what was tried: {tried}; {asked}. "
                f"See whether `ssh {self.address.as_arguments}` does; encrypted keys are taken from the agent (ssh-add)"
            )
        if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
            return InvalidLocation(f"{where}: there is no host {self.address.host!r}: {error.strerror}")
        if isinstance(error, ConnectionRefusedError):
            return ConnectionLost(f"{where}: connection refused: no SSH server listens there")
        if isinstance(error, TimeoutError):
            return ConnectionLost(f"{where}: no answer")
        if isinstance(error, OSError) and error.filename is not None:  # a file on this side
            return ConnectorError(f"{where}: {error.filename}: {error.strerror}")
        return kind_of(error)(f"{where}: {error}")

    def refuse_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> None:
        """Remember why a host key was refused."""
        import asyncssh

        assert self._arguments is not None
        known = asyncssh.match_known_hosts(self._arguments["known_hosts"], host, addr, port if port != 22 else None)
        shown = f"{key.get_algorithm()} {key.get_fingerprint()}"
        scanned = shlex.quote(host) if port == 22 else f"-p {port} {shlex.quote(host)}"
        if any(known[:2]):
            self.key_refusal = (
                f"the host key ({shown}) is not the one in known_hosts: either the server was set up anew or somebody "
                f"stands in between. If it is right, remove the old one by `ssh-keygen -R {_known_as(host, port)}` and "
                f"accept the new one by `ssh {self.address.as_arguments}`"
            )
        else:
            self.key_refusal = (
                f"the host key ({shown}) is not known. If it is right, accept it by `ssh {self.address.as_arguments}` "
                f"or `ssh-keyscan {scanned} >> ~/.ssh/known_hosts`"
            )


async def start_sftp(connection: asyncssh.SSHClientConnection, address: Address) -> asyncssh.SFTPClient:
    """The SFTP session of a connection.

    :raises NotStorage: if the server has none
    """
    import asyncssh

    try:
        async with asyncio.timeout(_START_S):
            return await connection.start_sftp_client()
    except (asyncssh.Error, OSError, EOFError) as error:
        # Refused, or a shell that prints a greeting first; not a connection that broke.
        if isinstance(error, (asyncssh.ChannelOpenError, asyncssh.SFTPBadMessage)) and not connection.is_closed():
            raise NotStorage(f"{address}: the server offers no SFTP to this user: {error}") from error
        reason = f"SFTP did not start within {_START_S} s" if isinstance(error, TimeoutError) else error
        raise kind_of(error)(f"{address}: {reason}") from error


def _close_reached(reaching: asyncio.Task[socket.socket | None]) -> None:
    if not reaching.cancelled() and reaching.exception() is None and (reached := reaching.result()) is not None:
        reached.close()


def _is_configured() -> bool:
    return Path("~/.ssh/config").expanduser().exists()


def _identities(files: Any) -> dict[str, Any]:
    """The keys named in ~/.ssh/config that there are; encrypted ones are left to the agent."""
    there = [file for file in files if Path(file).expanduser().exists()]
    return {"client_keys": there, "ignore_encrypted": True} if there else {"ignore_encrypted": True}


def _known_hosts(config: Any) -> list[str]:
    """The files of known host keys. There may be none, but none of the settings turns verification off."""
    own = config.get("UserKnownHostsFile") or ["~/.ssh/known_hosts", "~/.ssh/known_hosts2"]
    common = config.get("GlobalKnownHostsFile") or ["/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"]
    files = [Path(file).expanduser() for file in (*own, *common)]
    return [str(file) for file in files if file.is_file()] or ["/dev/null"]


def _known_as(host: str, port: int) -> str:
    return shlex.quote(host if port == 22 else f"[{host}]:{port}")


def _name_of(key: Any) -> str:
    return str(key.get_comment() or key.get_algorithm())


@functools.cache
def _client_class() -> Callable[[Login], asyncssh.SSHClient]:
    import asyncssh

    class Client(asyncssh.SSHClient):
        """Answers what the server asks while a user logs in."""

        def __init__(self, login: Login) -> None:
            self._login, self._asked = login, False

        def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
            self._login.refuse_key(host, addr, port, key)
            return False

        async def password_auth_requested(self) -> str | None:
            if self._asked:  # it was wrong
                return None
            self._asked = True
            return await to_thread.run_sync(self._login.password, f"{self._login.address}'s password: ")

        def kbdint_auth_requested(self) -> str | None:
            return None if self._asked else ""

        async def kbdint_challenge_received(self, name: str, instructions: str, lang: str, prompts: Any) -> Any:
            answers: list[str] = []
            for prompt, _ in prompts:
                if len(prompts) == 1 and "password" in prompt.lower():
                    answer = await self.password_auth_requested()
                else:
                    self._asked = True
                    answer = await to_thread.run_sync(self._login.password, f"{self._login.address}: {prompt}")
                if answer is None:
                    return None
                answers.append(answer)
            return answers

    return Client
