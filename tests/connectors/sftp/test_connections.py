"""SFTP connections: how many, and how they break."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
from typing import TYPE_CHECKING, Any

import anyio
import asyncssh
import pytest
from tests.connectors import sshd
from tests.connectors.proxy import Proxy
from tests.connectors.sftp.tools import created
from tests.connectors.stores import files
from tests.connectors.test_conformance import MIB, listed

from coffret.connectors import sftpconnections, sftplogin
from coffret.connectors.errors import (
    ConnectionLost,
    ConnectorError,
)
from coffret.connectors.retry import RetryConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coffret.connectors.base import Connector
    from coffret.connectors.sftp import SFTPConnector
    from coffret.connectors.sftpconnections import Session

pytestmark = pytest.mark.anyio


def patient(connector: Connector, told: list[str] | None = None) -> RetryConnector:
    def tell(what: str, error: ConnectorError) -> None:
        if told is not None:
            told.append(f"{what}: {error}")

    return RetryConnector(connector, first_wait_s=0.05, give_up_s=30, on_retry=tell)


class Openings:
    """Openings of connections that wait until it is decided what becomes of them: an error, or none."""

    def __init__(self) -> None:
        self.begun, self.decided = 0, asyncio.Event()
        self._error: Exception | None = None

    async def fate(self) -> None:
        self.begun += 1
        await self.decided.wait()
        if self._error is not None:
            raise self._error

    def decide(self, error: Exception | None) -> None:
        self._error = error
        self.decided.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(60):
            while self.begun < count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def find_session(connector: SFTPConnector, found: list[Session]) -> None:
    """For a call that moves much."""
    found.append(await connector._connections.session(large=True))


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
        datas = {f"packs/aa/{number}": random.Random(number).randbytes(12 * MIB + number) for number in range(10)}
        told: list[str] = []
        async with created(own_server.connector(tmp_path / "r")) as inner:
            connector = patient(inner, told)

            async def kill() -> None:
                for _ in range(3):
                    await asyncio.sleep(0.15)
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
            # On a busy machine an answer that does come may be late, too.
            again = patient(connector)
            await again.put("packs/aa/one", [bytes(4 * MIB)])
            for call in (
                connector.get("packs/aa/one"), connector.put("packs/aa/two", [bytes(4 * MIB)]), listed(connector),
                connector.put("leases/a", [b"1"]),
            ):  # fmt: skip
                await again.stat("packs/aa/one")
                proxy.blackhole = True
                with anyio.fail_after(60), pytest.raises(ConnectionLost, match="no answer"):
                    await call
                proxy.blackhole = False
            assert await listed(again) == ["packs/aa/one"]
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
        monkeypatch.setattr(sftplogin, "_KEEPALIVE_S", 0.5)
        async with Proxy(server.port) as proxy, created(server.connector(tmp_path / "r", port=proxy.port)) as connector:
            await asyncio.sleep(2.5)  # they are answered
            await listed(connector)
            assert proxy.connections == 1
            proxy.blackhole = True
            with anyio.fail_after(60), pytest.raises(ConnectionLost):
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

    async def test_closing_waits_for_what_is_cleared_up_and_not_for_handles(
        self, server: sshd.SSHServer, tmp_path: Path
    ) -> None:
        """The server closes those itself; a temporary file it would not remove."""
        ended = []

        async def work(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            ended.append(name)

        async with created(server.connector(tmp_path / "r")) as connector:
            session = await connector._connections.session(large=False)
            session.release(work("handle", 3600))
            session.later(work("file", 0.05))
            with anyio.fail_after(60):
                await connector.close()
        assert ended == ["file"]

    @pytest.fixture
    async def busy(
        self, server: sshd.SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[tuple[SFTPConnector, Session, Openings]]:
        """A connector whose one session moves much, and what becomes of further openings."""
        openings, open_ = Openings(), sftpconnections.Connections._open

        async def opening(self: sftpconnections.Connections) -> Session:
            await openings.fate()
            return await open_(self)

        async with created(server.connector(tmp_path / "r")) as connector:
            [session] = connector._connections._sessions
            session.large_calls += 1
            monkeypatch.setattr(sftpconnections.Connections, "_open", opening)
            yield connector, session, openings

    async def test_closing_opens_no_other(self, busy: tuple[SFTPConnector, Session, Openings]) -> None:
        """Who waits for one is told, and begins none."""
        connector, _, openings = busy
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                with pytest.raises(ConnectionLost, match="is being closed"):
                    await connector._connections.session(large=True)

            tasks.start_soon(wait)
            await openings.until(1)
            await connector.close()
        assert openings.begun == 1
        assert not connector._connections._opening
        assert not connector._connections._sessions

    @pytest.mark.parametrize("error", [ConnectorError("refused"), ValueError("nonsense")], ids=["refused", "otherwise"])
    async def test_one_that_fails_is_not_tried_again_at_once(
        self, busy: tuple[SFTPConnector, Session, Openings], error: Exception
    ) -> None:
        connector, session, openings = busy
        openings.decide(error)
        for _ in range(3):
            assert await connector._connections.session(large=True) is session
        assert openings.begun == 1
        assert any("no more than 1 connections" in note for note in connector.notes)

    async def test_a_session_that_is_free_again_ends_the_wait(
        self, busy: tuple[SFTPConnector, Session, Openings]
    ) -> None:
        """Whatever becomes of the login; and who waits begins one, not several."""
        connector, session, openings = busy
        found: list[Session] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(find_session, connector, found)
            await openings.until(1)
            for _ in range(5):
                await connector.put("index/a", [b"1"])  # whose end wakes who waits
            session.large_calls -= 1
            connector._connections.changed()
        assert found == [session]
        assert openings.begun == 1

    async def test_sessions_that_break_while_another_is_opened(
        self, busy: tuple[SFTPConnector, Session, Openings]
    ) -> None:
        """There is a new one then; what became of an opening long ago is of no interest."""
        connector, session, openings = busy
        openings.decide(ConnectorError("refused"))
        await connector._connections.session(large=True)
        openings.decided.clear()
        connector._connections._no_more_until = 0.0
        found: list[Session] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(find_session, connector, found)
            await openings.until(2)
            session.abandon("broken")
            connector._connections.changed()
            openings.decide(None)
        assert len(found) == 1
        assert found != [session]

    async def test_latency_is_hidden(
        self, server: sshd.SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Requests do not wait for each other: how often all were answered before the next was made, at 20 ms a way."""
        data, rounds = random.Random(1).randbytes(8 * MIB), 0
        send_request = asyncssh.sftp.SFTPClientHandler._send_request

        def counted(self: asyncssh.sftp.SFTPClientHandler, *arguments: Any) -> None:
            nonlocal rounds
            rounds += not self._requests  # what has not been answered
            send_request(self, *arguments)

        def rounds_before() -> int:
            nonlocal rounds
            before, rounds = rounds, 0
            return before

        monkeypatch.setattr(asyncssh.sftp.SFTPClientHandler, "_send_request", counted)
        async with (
            Proxy(server.port, delay_s=0.02) as proxy,
            server.connector(tmp_path / "r", port=proxy.port) as connector,
        ):
            await connector.create()  # 256 folders
            assert rounds_before() < 30
            await connector.put("leases/a", [b"1"])
            assert rounds_before() < 6
            await connector.put("packs/aa/one", [data])  # 66 requests, and 32 to get it
            assert await connector.get("packs/aa/one") == data
            assert rounds_before() < 20
            assert await listed(connector) == ["leases/a", "packs/aa/one"]
            assert rounds_before() < 30
