"""Servers for tests: in a thread with a loop of its own, on a real socket, over a folder or any other storage."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from typing import TYPE_CHECKING

import anyio
from tests.connectors.s3_server import forgive_uvloop, make_certificates

from coffret.connectors.base import FULL
from coffret.connectors.http import HTTPConnector
from coffret.connectors.httpclient import STALL_S
from coffret.connectors.httpplace import parse_location
from coffret.connectors.local import LocalConnector
from coffret.engine.server.attempts import Attempts
from coffret.engine.server.limits import Limits
from coffret.engine.server.run import Settings, parse_address, serve
from coffret.engine.server.tokens import TokenFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from coffret.connectors.base import Connector
    from coffret.connectors.limit import Pace
    from coffret.engine.server.app import Exchange

_PATIENCE_S = 30.0


class Serving:
    """A server, from `start` (or `with`) to `stop`. Its repository lies at `folder`/repository, its state beside.

    `open_connector` makes the connector to what it serves, if that is not the folder. `notes` and `exchanges` are what
    it said; `tls`: with a certificate that `ca` in `folder` has signed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        open_connector: Callable[[], Connector] | None = None,
        limits: Limits | None = None,
        tls: bool = False,
        needs_token: bool = True,
        listen: str = "127.0.0.1:0",
        pace: Pace | None = None,
    ) -> None:
        self.folder, self.path = folder, folder / "repository"
        self._open = open_connector or (lambda: LocalConnector(self.path))
        self._limits, self._needs_token, self._listen = limits or Limits(), needs_token, listen
        self._pace = pace
        self._certificate = (str(folder / "server.pem"), str(folder / "server.key")) if tls else None
        self.ca = folder / "ca.pem"
        folder.mkdir(parents=True, exist_ok=True)
        if tls and not self.ca.exists():
            make_certificates(folder)
        self.tokens = TokenFile("test://served", folder / "state")
        self.notes: list[str] = []
        self.exchanges: list[Exchange] = []
        self.url = ""
        self.error: BaseException | None = None
        self._made: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    def start(self) -> Self:
        """Start; returns when it listens."""
        self._ready.clear()
        self._thread = threading.Thread(target=self._run, name="server under test")
        self._thread.start()
        assert self._ready.wait(_PATIENCE_S)
        assert self.error is None, self.error
        return self

    def ask_to_stop(self) -> None:
        """As a signal does."""
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        """Stop; returns when it has ended."""
        if self._thread is not None:
            self.ask_to_stop()
            self._thread.join(_PATIENCE_S)
            assert not self._thread.is_alive()
            self._thread = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended by itself."""
        return self._thread is None or not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def token(self, right: str = FULL) -> str:
        """A token with a right; the same each time."""
        if right not in self._made:
            self._made[right] = self.tokens.add(right, f"of the tests, {right}")[1]
        return self._made[right]

    def write(self, name: str, data: bytes) -> None:
        """An object that is there, past the server."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def new_token(self, right: str) -> tuple[str, str]:
        """(id, token), of a fresh token."""
        made, text = self.tokens.add(right, "")
        return made.token_id, text

    def connector(
        self, right: str = FULL, *, token: str | None = None, port: int | None = None, stall_s: float = STALL_S
    ) -> HTTPConnector:
        """A connector that gives a token; `port` is that of a proxy."""
        if self._certificate is not None:
            forgive_uvloop()
        file = self.folder / f"token-{os.urandom(4).hex()}"
        file.write_text((token or self.token(right)) + "\n")
        options = {"token-file": str(file)} | ({"ca": str(self.ca)} if self._certificate else {})
        url = f"{self.url.partition(':')[0]}://127.0.0.1:{port or self.port}/"
        return HTTPConnector(parse_location(url, options), stall_s=stall_s)

    def _run(self) -> None:
        try:
            anyio.run(self._serve)
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        def ready(urls: Sequence[str]) -> None:
            self.url = urls[0]
            self._ready.set()

        async with self._open() as connector:
            settings = Settings(
                parse_address(self._listen),
                self.tokens if self._needs_token else None,
                Attempts(self.tokens.path.with_suffix(".attempts")),
                self._stop,
                on_ready=ready,
                on_note=self.notes.append,
                on_exchange=self.exchanges.append,
                certificate=self._certificate,
                limits=self._limits,
                pace=self._pace,
            )
            await serve(connector, settings)


class Raw:
    """A connection on which anything can be sent."""

    def __init__(self, port: int, *, timeout_s: float = 30.0, buffer_bytes: int = 0) -> None:
        self._socket = socket.socket()
        if buffer_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self._socket.settimeout(timeout_s)
        self._socket.connect(("127.0.0.1", port))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        self._socket.shutdown(socket.SHUT_WR)

    def is_closed(self) -> bool:
        """Whether the other side has closed it; does not wait, and takes nothing."""
        if not select.select([self._socket], [], [], 0)[0]:
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK) == b""
        except ConnectionError:
            return True

    def receive(self, most_bytes: int = 1 << 16) -> bytes:
        """What comes next; b"" at the end, however it ends."""
        try:
            return self._socket.recv(most_bytes)
        except ConnectionError:
            return b""

    def answer(self) -> bytes:
        """All that comes until the server closes the connection."""
        data = b""
        while piece := self.receive():
            data += piece
        return data

    def head(self) -> bytes:
        """What comes, up to the end of the first head."""
        data = b""
        while b"\r\n\r\n" not in data and (piece := self.receive()):
            data += piece
        return data

    def status(self) -> int:
        """The status of the next answer; 0 if there is none."""
        words = self.head().split(b" ", 2)
        return int(words[1]) if len(words) > 1 else 0


def request(method: str, path: str, token: str = "", /, body: bytes = b"", **headers: str) -> bytes:
    """A request as it goes over the wire. Headers' names are written with underscores."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if body or method == "PUT":
        named.setdefault("Content-Length", str(len(body)))
    lines += [f"{name}: {value}" for name, value in named.items() if value]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
