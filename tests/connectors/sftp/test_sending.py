"""What is sent without asyncssh's own steps: it must be what asyncssh would send, and asyncssh's where it can't be."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import asyncssh
import pytest
from asyncssh.crypto.cipher import GCMCipher
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.connectors.sftp.tools import created
from tests.connectors.test_conformance import MIB

from coffret.connectors.errors import ConnectionLost
from coffret.connectors.sftp import open_url
from coffret.connectors.sftpsending import Sending, send_quickly

if TYPE_CHECKING:
    from pathlib import Path

    from tests.connectors import sshd

    from coffret.connectors.sftp import SFTPConnector
    from coffret.connectors.sftpconnections import Session

pytestmark = pytest.mark.anyio

_DATA = 94


@pytest.fixture
def by_asyncssh(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The types of the packets that asyncssh itself sends from now on."""
    sent: list[int] = []
    send_packet = asyncssh.connection.SSHConnection.send_packet

    def listen(self: Any, kind: int, *parts: bytes, **more: Any) -> None:
        sent.append(kind)
        send_packet(self, kind, *parts, **more)

    monkeypatch.setattr(asyncssh.connection.SSHConnection, "send_packet", listen)
    return sent


def only_session(connector: SFTPConnector) -> Session:
    [session] = connector._connections._sessions
    return session


async def put_and_get(connector: SFTPConnector, size_bytes: int) -> None:
    """Several at a time, of which one is cut in odd places."""
    data = random.Random(size_bytes).randbytes(size_bytes)
    cuts = [0, 1, 2, 40_000, 40_000, size_bytes // 3, size_bytes]
    body = [data[begin:end] for begin, end in pairwise(cuts)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connector.put, "packs/aa/one", body)
        tasks.start_soon(connector.put, "packs/aa/two", [memoryview(data)])
        for number in range(20):
            tasks.start_soon(connector.put, f"index/{number}", [b"%d" % number * number])
    assert await connector.get("packs/aa/one") == await connector.get("packs/aa/two") == data
    for number in range(20):
        assert await connector.get(f"index/{number}") == b"%d" % number * number


async def test_it_is_used(server: sshd.SSHServer, tmp_path: Path, by_asyncssh: list[int]) -> None:
    async with created(server.connector(tmp_path / "r", connections="1")) as connector:
        by_asyncssh.clear()
        await put_and_get(connector, 9 * MIB + 5)
        session = only_session(connector)
        assert session.sending is not None
        assert session._connection._rekey_bytes_sent > 18 * MIB
        assert _DATA not in by_asyncssh


async def test_keys_are_exchanged_meanwhile(server: sshd.SSHServer, tmp_path: Path, by_asyncssh: list[int]) -> None:
    """When so much was sent, or so long ago: asyncssh does that, and what comes meanwhile waits its turn."""
    async with created(server.connector(tmp_path / "r", connections="1")) as connector:
        connection: Any = only_session(connector)._connection
        connection._rekey_bytes = 2 * MIB
        by_asyncssh.clear()
        await put_and_get(connector, 9 * MIB + 5)
        assert by_asyncssh.count(20) >= 4  # SSH_MSG_KEXINIT
        assert _DATA in by_asyncssh
        connection._rekey_bytes, connection._rekey_time = 1 << 30, 0.0
        by_asyncssh.clear()
        await connector.put("packs/aa/three", [bytes(3 * MIB)])
        assert by_asyncssh.count(20) == 1
        assert await connector.get("packs/aa/three") == bytes(3 * MIB)


@pytest.mark.parametrize("line", ["Ciphers aes256-ctr", "Ciphers chacha20-poly1305@openssh.com"])
async def test_where_it_can_not_be(
    own_server: sshd.SSHServer, tmp_path: Path, by_asyncssh: list[int], line: str
) -> None:
    host = f"Host nas\n HostName 127.0.0.1\n Port {own_server.port}\n User {own_server.user}\n"
    (own_server.home.ssh / "config").write_text(f"{host} IdentityFile {own_server.home.key}\n {line}\n")
    async with created(open_url(f"sftp://nas{tmp_path}/r", {"connections": "1"})) as connector:
        by_asyncssh.clear()
        await put_and_get(connector, 5 * MIB + 5)
        assert by_asyncssh.count(_DATA) > 10 * 32


async def test_through_another_program(own_server: sshd.SSHServer, tmp_path: Path, by_asyncssh: list[int]) -> None:
    """What asyncssh reaches one by is not all that a socket is."""
    relay = tmp_path / "relay.py"
    relay.write_text(
        "import os, socket, threading\n"
        f"line = socket.create_connection(('127.0.0.1', {own_server.port}))\n"
        "def up():\n"
        "    while data := os.read(0, 65536): line.sendall(data)\n"
        "    os._exit(0)\n"
        "threading.Thread(target=up, daemon=True).start()\n"
        "while data := line.recv(65536):\n"
        "    while data: data = data[os.write(1, data):]\n"
    )
    (own_server.home.ssh / "config").write_text(
        f"Host nas\n HostName 127.0.0.1\n Port {own_server.port}\n User {own_server.user}\n"
        f" IdentityFile {own_server.home.key}\n ProxyCommand {sys.executable} {relay}\n"
    )
    async with created(open_url(f"sftp://nas{tmp_path}/r", {"connections": "1"})) as connector:
        assert only_session(connector).sending is None
        by_asyncssh.clear()
        await put_and_get(connector, 5 * MIB + 5)
        assert by_asyncssh.count(_DATA) > 10 * 32


async def test_a_version_of_asyncssh_that_is_otherwise(
    server: sshd.SSHServer, tmp_path: Path, by_asyncssh: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coffret.connectors.sftpsending._OF_CHANNEL", ("_no_such_thing",))
    async with created(server.connector(tmp_path / "r", connections="1")) as connector:
        assert only_session(connector).sending is None
        by_asyncssh.clear()
        await put_and_get(connector, 5 * MIB + 5)
        assert by_asyncssh.count(_DATA) > 10 * 32


async def test_writes_of_a_session_that_has_ended(server: sshd.SSHServer, tmp_path: Path) -> None:
    async with created(server.connector(tmp_path / "r", connections="1")) as connector:
        session = only_session(connector)
        session.sftp.exit()
        await session.sftp.wait_closed()
        assert session.sending is not None
        answer = session.sending.begin_write(b"handle", 0, b"data")
        with pytest.raises(ConnectionLost):
            await session.ask(session.sending.written(answer))
        await connector.put("packs/aa/one", [bytes(MIB)])


class Connection:
    """What `Sending` needs of a connection, to see what it sends."""

    _kex_complete = _auth_complete = True
    _compressor = None
    _rekey_bytes, _rekey_bytes_sent, _rekey_seconds, _rekey_time = 1 << 40, 0, 0, 0.0
    _send_seq = 0

    def __init__(self, cipher: Any) -> None:
        self._send_encryption = type("Encryption", (), {"_cipher": cipher})()
        self._transport, self.sent = self, b""

    def is_closing(self) -> bool:
        return False

    def writelines(self, parts: list[bytes]) -> None:
        self.sent += b"".join(parts)


class Channel:
    _send_chan, _send_pktsize = 7, 1000

    def __init__(self) -> None:
        self._send_buf: list[Any] = []
        self._send_buf_len = self._send_window = 0
        self.left: list[type] = []

    def _flush_send_buf(self) -> None:
        self.left = [type(data) for data, _ in self._send_buf]

    def is_closing(self) -> bool:
        return False


class Handler:
    def __init__(self, channel: Channel) -> None:
        self._writer = type("Writer", (), {"channel": channel})()

    def send_packet(self, *parts: Any) -> None:
        raise AssertionError(parts)

    def _send_request(self, *parts: Any) -> None:
        raise AssertionError(parts)

    def _process_status(self, packet: Any) -> None:
        raise AssertionError(packet)


def sending_over(channel: Channel, connection: Connection) -> Sending:
    session: Any = type("SFTP", (), {"_handler": Handler(channel)})()
    over: Any = connection
    sending = send_quickly(session, over)
    assert isinstance(sending, Sending)
    return sending


@pytest.mark.parametrize(
    "state",
    [
        {"_compressor": object()},
        {"_kex_complete": False},
        {"_auth_complete": False},
        {"_transport": None},
        {"_rekey_bytes": 0},
        {"_rekey_seconds": 1},
        {"_send_encryption": None},
    ],
    ids=lambda state: str(*state),
)
def test_what_is_left_to_asyncssh(state: dict[str, Any]) -> None:
    """It gets what waits in a form that it can shorten."""
    channel, connection = Channel(), Connection(GCMCipher("aes128-gcm", b"k" * 16, b"i" * 12))
    sending = sending_over(channel, connection)
    sending.send_request(6, 1, b"before", memoryview(b"data"))
    assert channel.left == [bytes, memoryview]  # there is no room for it yet
    vars(connection).update(state)
    channel._send_window = 1000
    sending.flush()
    assert not connection.sent
    assert channel.left == [bytearray, bytearray]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 2500)), max_size=8), st.binary(min_size=8, max_size=8))
def test_packets(steps: list[tuple[int, int]], count: bytes) -> None:
    """Whatever is written, and whenever the window opens: packets that asyncssh's cipher opens, of the same stream."""
    key, iv = b"k" * 16, b"four" + count
    opening = GCMCipher("aes128-gcm", key, iv)
    channel, connection = Channel(), Connection(GCMCipher("aes128-gcm", key, iv))
    sending = sending_over(channel, connection)
    expected, opened = b"", 0
    for size_bytes, window in steps:
        data = random.Random(size_bytes).randbytes(size_bytes)
        sending.send_request(6, 1, b"before", memoryview(data))
        expected += (7 + size_bytes).to_bytes(4, "big") + b"\x06before" + data
        channel._send_window += window
        opened += window
        sending.flush()
    stream, packets, at = b"", 0, 0
    while at < len(connection.sent):
        length = connection.sent[at : at + 4]
        end = at + 4 + int.from_bytes(length, "big")
        packet = opening.verify_and_decrypt(length, connection.sent[at + 4 : end], connection.sent[end : end + 16])
        assert packet is not None
        assert len(packet) % 16 == 0
        assert packet[1:6] == b"\x5e\0\0\0\x07"
        assert packet[0] >= 4
        body = packet[6 : len(packet) - packet[0]]
        assert int.from_bytes(body[:4], "big") == len(body) - 4 <= channel._send_pktsize
        stream, packets, at = stream + body[4:], packets + 1, end + 16
    assert stream == expected[:opened]
    assert channel._send_window == max(0, opened - len(expected))
    assert channel._send_buf_len == len(expected) - len(stream) == sum(len(data) for data, _ in channel._send_buf)
    assert connection._send_seq == packets
    assert connection._send_encryption._cipher._iv == opening._iv
