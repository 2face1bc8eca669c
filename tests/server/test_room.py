"""Room and limits: what all clients together may take, and what becomes of them where a storage hangs or fails."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from msgspec.structs import replace
from tests.connectors.stores import files
from tests.server import sealed
from tests.server.conftest import make_folder
from tests.server.serving import Raw, Serving, request

from coffret.connectors.base import APPEND_ONLY, FULL
from coffret.connectors.errors import ConnectorError, PermissionRefused
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.limit import Pace
from coffret.connectors.local import LocalConnector
from coffret.engine.server.limits import Limits, Tries, address_of
from coffret.engine.server.room import NoRoom, Room

if TYPE_CHECKING:
    from pathlib import Path

from tests.server.test_hostile import MIB, SHORT_S


class TestRoom:
    pytestmark = pytest.mark.anyio

    async def test_never_more_than_there_is(self) -> None:
        room, most, done = Room(10 * MIB), 0, 0

        async def use(number: int) -> None:
            nonlocal most, done
            async with room.buffer((number % 5 + 1) * MIB + number, 30) as view:
                most = max(most, room.used_bytes)
                view[:] = bytes([number]) * len(view)
                await anyio.sleep(0.001)
                assert bytes(view) == bytes([number]) * len(view)
                done += 1

        async with anyio.create_task_group() as tasks:
            for number in range(60):
                tasks.start_soon(use, number)
        assert done == 60
        assert 5 * MIB < most <= 10 * MIB
        assert room.used_bytes == 0
        assert 0 < sum(map(len, room._idle)) <= 10 * MIB

    async def test_who_is_cancelled_takes_none(self) -> None:
        room = Room(MIB)
        async with room.taken(MIB, 30):
            with pytest.raises(NoRoom):
                async with room.taken(MIB, 0.01):
                    pass
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(_hold, room)
                await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
            async with room.taken(1000, 0):  # what is small takes none
                pass
        async with room.taken(MIB, 0):
            assert room.used_bytes == MIB

    async def test_a_large_one_is_not_passed_by(self) -> None:
        room, order = Room(4 * MIB), []

        async def use(size_bytes: int) -> None:
            async with room.taken(size_bytes, 30):
                order.append(size_bytes)

        async with anyio.create_task_group() as tasks, room.taken(MIB, 30):
            for size_bytes in (4 * MIB, MIB, 2 * MIB):
                tasks.start_soon(use, size_bytes)
                await anyio.sleep(0.01)
            assert order == []
        assert order == [4 * MIB, MIB, 2 * MIB]


async def _hold(room: Room) -> None:
    async with room.taken(MIB, 30):
        pass


@pytest.mark.anyio
async def test_many_clients_in_little_memory(tmp_path: Path) -> None:
    """Each with a token of its own; what is moved at once fits in the room there is, and leases never wait."""
    make_folder(tmp_path)
    with Serving(tmp_path, limits=replace(Limits(), memory_bytes=8 * MIB)) as server:

        async def back_up() -> None:
            of = sealed.attempt()
            async with server.connector(token=server.new_token(APPEND_ONLY)[1]) as connector:
                await connector.put(sealed.lease(of)[0], [sealed.lease(of)[1]])
                for number in range(3):
                    name, body = sealed.pack(3 * MIB)
                    await connector.put(name, [body])
                    assert await connector.get(name) == body
                    index = sealed.index(of, number)
                    await connector.put(index[0], [index[1]])
                committed = sealed.snapshot(of)
                await connector.put(committed[0], [committed[1]], if_absent=True)
                await connector.delete(f"leases/{of}")

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(back_up)
    stored = files(server.path)
    assert [sum(name.startswith(kind) for name in stored) for kind in ("packs", "index", "snap", "lease")] == [
        24,
        24,
        8,
        0,
    ]


@pytest.mark.anyio
async def test_no_room_is_told_in_time(tmp_path: Path) -> None:
    """A client that holds all the room, and does not move: others are told to come again, and small objects pass."""
    make_folder(tmp_path)
    name, body = sealed.pack(15 * MIB)
    with Serving(tmp_path, limits=replace(Limits(), memory_bytes=16 * MIB, room_wait_s=SHORT_S)) as server:
        with Raw(server.port) as raw:
            headers = {"Content_Length": str(len(body)), "Expect": "100-continue"}
            raw.send(request("PUT", f"/v1/objects/{name}", server.token(FULL), b"", **headers))
            assert raw.status() == 100  # it has the room
            async with server.connector() as connector:
                other = sealed.pack(3 * MIB)
                with pytest.raises(ConnectorError, match="under way") as raised:
                    await connector.put(other[0], [other[1]])
                assert raised.value.retryable
                await connector.put("leases/" + sealed.attempt(), [b"x" * 1000])
        async with server.connector() as connector:  # it has gone, and so has what it held
            await connector.put(other[0], [other[1]])


@pytest.mark.anyio
async def test_a_storage_that_hangs(tmp_path: Path) -> None:
    """Every call ends in time, and says what it is."""
    make_folder(tmp_path)

    async def hang(method: str, name: str) -> None:
        if method != "close":
            await anyio.sleep_forever()

    def hanging() -> FaultyConnector:
        return FaultyConnector(LocalConnector(tmp_path / "repository"), before=hang)

    limits = replace(Limits(), storage_s=SHORT_S, put_s=SHORT_S)
    with Serving(tmp_path, open_connector=hanging, limits=limits) as server:
        async with server.connector() as connector:
            for call in (
                connector.put("index/a", [b"1"]),
                connector.get("index/a"),
                connector.get("index/a", offset=1, length=1),
                connector.stat("index/a"),
                connector.delete("index/a"),
                connector.create(),
                _listed(connector),
            ):
                with pytest.raises(ConnectorError) as raised:
                    await call
                assert raised.value.retryable


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [OSError("disk"), ValueError("a bug"), PermissionRefused("not here")])
async def test_a_storage_that_fails(tmp_path: Path, kind: Exception) -> None:
    """Whatever it raises, the client gets an error of the contract, and the log a line."""
    make_folder(tmp_path)

    async def fail(method: str, name: str) -> None:
        if method != "close":
            raise kind

    def failing() -> FaultyConnector:
        return FaultyConnector(LocalConnector(tmp_path / "repository"), before=fail)

    with Serving(tmp_path, open_connector=failing) as server:
        async with server.connector() as connector:
            for call in (connector.put("index/a", [b"1"]), connector.get("index/a"), _listed(connector)):
                with pytest.raises(ConnectorError):
                    await call
    assert all("\n" not in note for note in server.notes)


async def _listed(connector: object) -> list[str]:
    return [info.name async for info in connector.list("")]  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_tries_are_counted_by_address() -> None:
    tries = Tries()
    assert [tries.failed("a") for _ in range(20)].count(True) >= 9
    assert not tries.failed("b")
    for number in range(5000):
        tries.failed(str(number))
    assert len(tries._until) <= 4096


def test_addresses() -> None:
    assert address_of(("10.1.2.3", 5)) == "10.1.2.3"
    assert address_of(("::ffff:10.1.2.3", 5, 0, 0)) == "10.1.2.3"
    assert address_of(("2001:db8:1:2:3:4:5:6", 5, 0, 0)) == address_of(("2001:db8:1:2:ffff::1", 5, 0, 0))
    assert address_of(("2001:db8:1:2::", 5, 0, 0)) != address_of(("2001:db8:1:3::", 5, 0, 0))
    assert address_of(("fe80::1%eth0", 5, 0, 2)).startswith("fe80")
    assert address_of(None) == address_of(os.devnull) == ""


@pytest.mark.anyio
async def test_limits_hold_all_clients_together(tmp_path: Path) -> None:
    """They wait, however long it takes, though nobody may be silent for so long."""
    make_folder(tmp_path)
    begin = time.monotonic()
    limits = replace(Limits(), stall_s=SHORT_S, put_s=SHORT_S * 5)
    with Serving(tmp_path, limits=limits, pace=Pace(2e6, 2e6)) as server:

        async def move() -> None:
            name, body = sealed.pack(600_000)
            async with server.connector(token=server.new_token(APPEND_ONLY)[1]) as connector:
                await connector.put(name, [body])
                assert await connector.get(name) == body

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(move)
    assert time.monotonic() - begin > 0.5  # 1.8 MB each way, less what is let through at once
