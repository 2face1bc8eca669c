"""How often the SFTP connector waits for a server: a round trip is paid once, however many requests it holds."""

from __future__ import annotations

import asyncio
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.connectors import sshd

from coffret.connectors import sftpfiles, sftpscan
from coffret.connectors.errors import AlreadyExists, ConnectorError, NotFound, StorageFull
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


TURNS = [("trash/",), ("index/",), ("snapshots/", "removed/")]


async def test_three_turns_of_lists_take_four(connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    with round_trips(monkeypatch) as found:
        assert await connector.list_turns(TURNS) == {prefix: [] for turn in TURNS for prefix in turn}
    # A folder is opened behind the last request for the one before.
    assert len(found) <= 7 and sum(found) == 4 * (2 + 16 + 1), found


@pytest.mark.parametrize("large", ["trash", "index", "snapshots", ""])
async def test_each_turn_is_as_it_is_after_the_one_before(
    connector: SFTPConnector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    """What is put while a folder is read is in those that come after it, also where reading it takes many answers."""
    for number in range(2000 if large else 0):
        (tmp_path / "r" / large / f"{number:04}").write_bytes(b"")
    order: list[str] = []
    scanned = sftpscan._read_in_order

    async def slowly(files: Files, folder: str, *options: Any) -> Any:
        result = await scanned(files, folder, *options)
        order.append(folder)
        for prefix in ("trash", "index", "snapshots", "removed"):  # those that are read again must have it
            (tmp_path / "r" / prefix / f"after-{folder}-{order.count(folder)}").write_bytes(b"")
        return result

    monkeypatch.setattr(sftpscan, "_read_in_order", slowly)
    found = await connector.list_turns(TURNS)
    names = {prefix: [info.name.partition("/")[2] for info in infos] for prefix, infos in found.items()}
    for number, turn in enumerate(TURNS):
        for prefix in turn:
            assert sum(name.isdigit() for name in names[prefix]) == (2000 if prefix == f"{large}/" else 0)
            # Whatever was found behind a folder that took more than one go was found after it was read.
            if large and f"{large}/" in {each for earlier in TURNS[:number] for each in earlier}:
                assert f"after-{large}-1" in names[prefix]


async def test_further_ranges_of_a_pack_take_one(connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays open, on a connection, and alone what is large, named by its content and read in parts."""
    await connector.put("packs/aa/pack", [bytes(1000)])
    with round_trips(monkeypatch) as found:
        for offset in range(3):
            assert await connector.get("packs/aa/pack", offset=offset, length=10) == bytes(10)
        await connector.get_into("packs/aa/pack", 100, memoryview(bytearray(10)))
    assert found == [1] * 5
    await asyncio.sleep(0.1)
    await connector.put("index/a", [bytes(100)])
    with round_trips(monkeypatch) as found:
        await connector.get("index/a", length=10)
    assert found[:2] == [1, 1]
    assert [*connector._connections._sessions[0].handles._kept] == ["packs/aa/pack"]


async def test_who_asks_at_once_opens_it_once(connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(1).randbytes(5000)
    await connector.put("packs/aa/pack", [data])
    with round_trips(monkeypatch) as found:
        gets = [connector.get("packs/aa/pack", offset=at, length=50) for at in range(0, 5000, 50)]
        assert b"".join(await asyncio.gather(*gets)) == data
    assert sum(found) == 101


async def test_few_packs_are_kept_open(connector: SFTPConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than some, however many are read at a time, and each is closed once nobody reads it."""
    opened = closed = 0
    open_, close = Files.open, sftpfiles.OpenFile.close_later

    async def counted(self: Files, name: str) -> sftpfiles.OpenFile:
        nonlocal opened
        opened += 1
        return await open_(self, name)

    def closing(self: sftpfiles.OpenFile) -> None:
        nonlocal closed
        closed += 1
        close(self)

    monkeypatch.setattr(Files, "open", counted)
    monkeypatch.setattr(sftpfiles.OpenFile, "close_later", closing)
    names = [f"packs/aa/{number}" for number in range(30)]
    for name in names:
        await connector.put(name, [name.encode()])
    for _ in range(2):
        gets = [connector.get(name, offset=at, length=8) for name in names for at in (0, 1)]
        found = await asyncio.gather(*gets)
        assert found == [name.encode()[at : at + 8] for name in names for at in (0, 1)]
    handles = connector._connections._sessions[0].handles
    assert 0 < len(handles._kept) <= 4
    async with asyncio.timeout(60):
        while opened - closed != len(handles._kept):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_pack_that_is_kept_open_is_what_it_was(connector: SFTPConnector, tmp_path: Path) -> None:
    """What this client changes is seen at once; what another deletes may be read on for a while, as it was."""
    name, place = "packs/aa/pack", tmp_path / "r" / "packs/aa/pack"
    await connector.put(name, [b"first"])
    assert await connector.get(name, length=5) == b"first"
    await connector.put(name, [b"other"])
    assert await connector.get(name, length=5) == b"other"
    place.unlink()
    assert await connector.get(name, length=5) == b"other"
    # What does not fit is looked at anew.
    with pytest.raises(NotFound):
        await connector.get(name, length=6)
    with pytest.raises(NotFound):
        await connector.get(name, length=5)
    await connector.put(name, [b"once more"])
    assert await connector.get(name, length=9) == b"once more"
    await connector.delete(name)
    with pytest.raises(NotFound):
        await connector.get(name, length=5)
    await connector.put(name, [b"short"])
    assert await connector.get(name, length=5) == b"short"
    place.unlink()
    place.write_bytes(b"longer")
    assert await connector.get(name, length=6) == b"longer"


async def test_the_age_of_what_is_kept_open_is_bounded(
    connector: SFTPConnector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await connector.put("packs/aa/pack", [b"first"])
    assert await connector.get("packs/aa/pack", length=5) == b"first"
    (tmp_path / "r" / "packs/aa/pack").unlink()
    monkeypatch.setattr("coffret.connectors.sftphandles._AGE_S", -1.0)
    with pytest.raises(NotFound):
        await connector.get("packs/aa/pack", length=5)


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

    begin_write = OpenFile.begin_write

    def failing(self: OpenFile, piece: Any, offset: int) -> asyncio.Future[Any]:
        answer = begin_write(self, piece, offset)
        if offset:
            answer = asyncio.get_running_loop().create_future()
            answer.set_exception(Refusal(StorageFull, "no space left"))
        return answer

    monkeypatch.setattr(OpenFile, "begin_write", failing)
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


async def test_connections_are_made_ready(tmp_path: Path) -> None:
    """All there may be, behind the first, for who says so; nobody waits for them."""
    server = sshd.shared_server(chroot=False)
    environment = sshd.Environment(server.home)
    try:
        async with server.connector(tmp_path / "r", connections="3") as connector:
            connector.expect_transfers()
            assert not connector._connections._sessions
            await connector.create()
            async with asyncio.timeout(60):
                while len(connector._connections._sessions) < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await connector.put("index/a", [b"1"])
            assert len(connector._connections._sessions) == 3
            assert not connector.notes
    finally:
        environment.restore()


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
