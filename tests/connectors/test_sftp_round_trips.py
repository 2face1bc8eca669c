"""How often the SFTP connector waits for a server: a round trip is paid once, however many requests it holds."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.connectors import sshd

from coffret.connectors.errors import AlreadyExists, ConnectorError, StorageFull
from coffret.connectors.sftpconnections import Connections, Session
from coffret.connectors.sftperrors import Refusal
from coffret.connectors.sftpfiles import Files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from coffret.connectors.sftp import SFTPConnector

pytestmark = pytest.mark.anyio
MIB = 1 << 20


@pytest.fixture
async def connector(tmp_path: Path) -> AsyncIterator[SFTPConnector]:
    server = sshd.shared_server(chroot=False)
    environment = sshd.Environment(server.home)
    try:
        async with server.connector(tmp_path / "r") as connector:
            await connector.create()
            await connector.put("leases/first", [b"a first put sweeps tmp/"])
            await asyncio.sleep(0.2)
            yield connector
    finally:
        environment.restore()


@contextmanager
def round_trips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The requests of each round trip: those that were sent before an answer to the first of them came."""
    found: list[int] = []
    ask, answered = Session.ask, True

    async def counted(self: Session, request: Any) -> Any:
        nonlocal answered
        if answered:
            found.append(0)
            answered = False
        found[-1] += 1
        try:
            return await ask(self, request)
        finally:
            answered = True

    with monkeypatch.context() as patch:
        patch.setattr(Session, "ask", counted)
        yield found


def refuse_links(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Let the server refuse to link, so many times, as one whose file system has no links."""
    refused: list[str] = []
    link = Files.link

    async def refusing(self: Files, source: str, target: str) -> None:
        if len(refused) < times:
            refused.append(target)
            raise Refusal(ConnectorError, "Failure")
        await link(self, source, target)

    monkeypatch.setattr(Files, "link", refusing)
    return refused


async def test_a_small_put_takes_three(connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    for if_absent in (True, False):
        with round_trips(monkeypatch) as found:
            await connector.put(f"snapshots/{if_absent}".lower(), [b"small"], if_absent=if_absent)
        assert found == [1, 3, 2 if if_absent else 1]


async def test_a_list_takes_two(connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    with round_trips(monkeypatch) as found:
        assert [info.name async for info in connector.list("leases/")] == ["leases/first"]
    assert found == [1, 5]  # the folder, and all that may be needed of it


async def test_the_folders_of_packs_are_read_together(connector: SFTPConnector, tmp_path: Path) -> None:
    names = [f"packs/{number:02x}/{number % 7}" for number in range(256)]
    names += [f"packs/aa/{number:04}" for number in range(450)]  # more than five answers of one folder
    for name in names:
        (tmp_path / "r" / name).write_text(name)
    assert [info.name async for info in connector.list("packs/")] == sorted(names)


async def test_a_folder_of_packs_takes_four(connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    await connector.put("packs/aa/pack", [b"1"])
    with round_trips(monkeypatch) as found:
        assert [info.name async for info in connector.list("packs/")] == ["packs/aa/pack"]
    # The answers to so many come one by one, and closing a folder waits for nobody: only the first two can be told.
    assert found[:2] == [1, 5]


async def test_a_name_that_is_refused_is_not_lost_with_its_file(
    connector: SFTPConnector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is removed together with the refused link, and so written again."""
    refused = refuse_links(monkeypatch, 1)
    body = [b"x" * (MIB + 1), b"y"]
    await connector.put("snapshots/a", body, if_absent=True)
    assert refused == ["snapshots/a"]
    assert await connector.get("snapshots/a") == b"".join(body)
    with pytest.raises(AlreadyExists):
        await connector.put("snapshots/a", body, if_absent=True)
    await connector.put("snapshots/b", [b"b"], if_absent=True)
    assert await connector.get("snapshots/b") == b"b"
    assert list((tmp_path / "r" / "tmp").iterdir()) == []
    assert connector.capabilities.exclusive_puts


async def test_a_server_that_never_links_is_told_of(
    connector: SFTPConnector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch, 100)
    for name in ("snapshots/a", "snapshots/b"):
        await connector.put(name, [name.encode()], if_absent=True)
        assert await connector.get(name) == name.encode()
        with pytest.raises(AlreadyExists):
            await connector.put(name, [b"other"], if_absent=True)
    assert not connector.capabilities.exclusive_puts
    assert list((tmp_path / "r" / "tmp").iterdir()) == []


async def test_what_fails_in_the_middle_is_the_error(
    connector: SFTPConnector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests behind it are sent already: nothing of them counts, and no file is left open or behind."""
    from coffret.connectors.sftpfiles import OpenFile

    write = OpenFile.write

    async def failing(self: OpenFile, piece: Any, offset: int) -> None:
        if offset:
            raise Refusal(StorageFull, "no space left")
        await write(self, piece, offset)

    monkeypatch.setattr(OpenFile, "write", failing)
    with pytest.raises(StorageFull):
        await connector.put("packs/aa/full", [bytes(9 * MIB)])
    monkeypatch.undo()
    assert list((tmp_path / "r" / "tmp").iterdir()) == []
    await connector.put("packs/aa/full", [b"1"])
    assert await connector.get("packs/aa/full") == b"1"


async def test_who_reads_does_not_wait_for_a_login(connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    body = bytes(2 * MIB)
    await connector.put("packs/aa/pack", [body])
    allowed, begun, opened = asyncio.Event(), 0, Connections._open

    async def slow(self: Connections) -> Session:
        nonlocal begun
        begun += 1
        await allowed.wait()
        return await opened(self)

    monkeypatch.setattr(Connections, "_open", slow)
    async with asyncio.timeout(60):
        gets = [connector.get("packs/aa/pack", offset=0, length=len(body)) for _ in range(4)]
        assert await asyncio.gather(*gets) == [body] * 4
    assert begun
    allowed.set()


async def test_a_login_under_way_ends_with_the_connector(
    connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    await connector.put("packs/aa/pack", [bytes(2 * MIB)])

    async def never(self: Connections) -> Session:
        await asyncio.sleep(3600)
        raise AssertionError

    monkeypatch.setattr(Connections, "_open", never)
    await asyncio.gather(*(connector.get("packs/aa/pack", offset=0, length=2 * MIB) for _ in range(3)))
    async with asyncio.timeout(60):
        await connector.close()
