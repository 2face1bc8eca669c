"""What comes from clients that mean ill, or are broken: it is refused without harm, and others don't notice."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace
from tests.connectors.stores import files
from tests.server import sealed
from tests.server.conftest import make_folder
from tests.server.serving import Raw, Serving, request

from coffret.connectors.base import APPEND_ONLY, FULL, READ_ONLY
from coffret.connectors.memory import MemoryConnector
from coffret.engine.server.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
# Short enough to be waited for, and long enough for a busy machine where something is to be in time.
SHORT_S = 0.4
QUICK = replace(
    Limits(), header_s=SHORT_S, keepalive_s=SHORT_S, stall_s=SHORT_S, slowest_bytes_per_s=1 << 30, room_wait_s=SHORT_S,
    linger_s=SHORT_S, memory_bytes=16 * MIB,
)  # fmt: skip


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Serving]:
    """A server without patience."""
    make_folder(tmp_path)
    with Serving(tmp_path, limits=QUICK) as server:
        yield server
    assert server.error is None


def is_well(server: Serving) -> bool:
    """Whether the server does what it should, for somebody else."""
    name, body = sealed.pack()
    with Raw(server.port) as raw:
        raw.send(request("PUT", f"/v1/objects/{name}", server.token(FULL), body=body))
        put = raw.status()
        raw.send(request("DELETE", f"/v1/objects/{name}", server.token(FULL)))
        return (put, raw.status()) == (204, 204)


def await_state(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestSlow:
    @pytest.mark.parametrize(
        "beginning",
        [b"", b"G", b"GET /v1/ HTTP/1.1\r\n", b"GET /v1/ HTTP/1.1\r\nHost: x\r\nA: ", b"\r\n\r\n\r\n"],
    )
    def test_heads_that_never_end(self, quick: Serving, beginning: bytes) -> None:
        with Raw(quick.port) as raw:
            if beginning:
                raw.send(beginning)
            assert raw.answer() == b""
        assert is_well(quick)

    def test_a_head_that_drips(self, quick: Serving) -> None:
        """Each byte in time, and yet it is over in time."""
        with Raw(quick.port) as raw:
            end = time.monotonic() + 30
            try:
                for byte in request("GET", "/v1/", "x" * 4000):
                    assert time.monotonic() < end
                    raw.send(bytes([byte]))
                    time.sleep(SHORT_S / 20)
            except OSError:
                pass
            else:
                pytest.fail("the server waits for ever")
        assert is_well(quick)

    def test_a_body_that_never_ends(self, quick: Serving) -> None:
        name, body = sealed.pack(2 * MIB)
        for sent in (0, 1, MIB):
            with Raw(quick.port) as raw:
                raw.send(
                    request("PUT", f"/v1/objects/{name}", quick.token(FULL), body=body)[: -len(body)] + body[:sent]
                )
                assert raw.status() == 408
                assert raw.answer().count(b"HTTP/") == 0  # and it is closed
        assert is_well(quick)
        assert files(quick.path) == set()

    def test_a_body_that_drips(self, quick: Serving) -> None:
        name, body = sealed.pack(2 * MIB)
        with Raw(quick.port) as raw:
            raw.send(request("PUT", f"/v1/objects/{name}", quick.token(FULL), body=body)[: -len(body)])
            end = time.monotonic() + 30
            with pytest.raises(OSError):
                for at in range(len(body)):
                    assert time.monotonic() < end
                    raw.send(body[at : at + 1])
                    time.sleep(SHORT_S / 20)
        assert files(quick.path) == set()

    def test_a_reader_that_does_not_read(self, quick: Serving) -> None:
        name, body = sealed.pack(15 * MIB)
        quick.write(name, body)
        with Raw(quick.port, buffer_bytes=4096) as raw:
            raw.send(request("GET", f"/v1/objects/{name}", quick.token(READ_ONLY)))
            await_state(lambda: any(e.path.endswith(name) for e in quick.exchanges))
            assert len(raw.answer()) < len(body)
        assert is_well(quick)

    def test_a_listing_that_is_not_read(self, tmp_path: Path) -> None:
        storage = MemoryConnector()
        storage._objects |= {f"trash/{number:0150d}": (b"", 0.0) for number in range(60_000)}
        with Serving(tmp_path, limits=QUICK, open_connector=lambda: storage) as server:
            with Raw(server.port, buffer_bytes=4096) as raw:
                raw.send(request("GET", "/v1/objects?prefix=trash/", server.token(READ_ONLY)))
                await_state(lambda: any("trash" in e.path for e in server.exchanges))
                assert b'"end"' not in raw.answer()
            assert is_well(server)

    def test_a_connection_that_does_nothing_more(self, quick: Serving) -> None:
        with Raw(quick.port) as raw:
            raw.send(request("GET", "/v1/", quick.token(FULL)))
            assert raw.answer().startswith(b"HTTP/1.1 200 ")


class TestTooMuch:
    def test_objects_larger_than_any_of_their_kind(self, shared: Serving) -> None:
        """Refused by what they say they are, before a byte of them is read."""
        sizes = {
            "config": 16 << 10,
            "keys/a": 8 * MIB,
            "trash/1": MIB,
            "snapshots/a": 64 * MIB,
            "packs/aa/a": 256 * MIB,
        }
        for name, most_bytes in sizes.items():
            for size in (most_bytes + 1, 10**17, 10**30):
                with Raw(shared.port) as raw:
                    head = request("PUT", f"/v1/objects/{name}", shared.token(FULL), Content_Length=str(size))
                    raw.send(head)
                    assert raw.status() in ((411, 413, 400) if size > 10**18 else (413,)), (name, size)
        assert is_well(shared)

    def test_a_range_larger_than_any_object(self, shared: Serving) -> None:
        (shared.path / "config").write_bytes(b"{}")
        with Raw(shared.port) as raw:
            for last in (2, 10**9, 10**17):
                raw.send(request("GET", "/v1/objects/config", shared.token(FULL), Range=f"bytes=0-{last}"))
                assert raw.status() in (413, 416)

    @pytest.mark.parametrize("token", ["", "wrong"])
    def test_bodies_of_strangers_are_not_read(self, quick: Serving, token: str) -> None:
        """They are thrown away for a while, so that the answer arrives; then it is over, however fast they come."""
        with Raw(quick.port) as raw:
            raw.send(request("PUT", "/v1/objects/packs/aa/a", token, Content_Length=str(10**15)))
            assert raw.status() == 401
            end = time.monotonic() + 30
            with pytest.raises(ConnectionError):
                while True:
                    assert time.monotonic() < end
                    raw.send(bytes(MIB))
        [exchange] = quick.exchanges
        assert (exchange.status, exchange.received_bytes) == (401, 0)
        assert is_well(quick)

    def test_heads(self, shared: Serving) -> None:
        for head in (
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /v1/ HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
            b"GET /v1/ HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
        ):
            with Raw(shared.port) as raw:
                raw.send(head)
                assert raw.status() in (0, 400)
        assert is_well(shared)

    def test_connections_of_strangers(self, tmp_path: Path) -> None:
        """They take no more than their share; those who are known are not concerned."""
        make_folder(tmp_path)
        limits = replace(Limits(), unknown_connections=5, connections=20)
        with Serving(tmp_path, limits=limits) as server:
            with ExitStack() as stack:
                known = stack.enter_context(Raw(server.port))
                known.send(request("GET", "/v1/", server.token(FULL)))
                assert known.status() == 200
                strangers = [stack.enter_context(Raw(server.port)) for _ in range(12)]
                # Which of them are let in depends on whose connection the server hears of first.
                await_state(lambda: sum(raw.is_closed() for raw in strangers) == 7)
                known.send(request("GET", "/v1/objects?prefix=", server.token(FULL)))
                received = b""
                while b'{"end":true}' not in received:
                    received += (more := known.receive())
                    assert more
            await_state(lambda: _welcome(server))

    def test_wrong_tokens(self, shared: Serving) -> None:
        """After some of them their sender is told to wait; who has a good one is not concerned."""
        found = []
        for _ in range(30):
            with Raw(shared.port) as raw:
                raw.send(request("GET", "/v1/", "wrong"))
                found.append(raw.status())
        assert 429 in found
        assert found == sorted(found)
        assert is_well(shared)
        assert len([note for note in shared.notes if "wrong token" in note]) < 25
        assert not any("wrong\n" in note for note in shared.notes)


def _welcome(server: Serving) -> bool:
    with Raw(server.port) as raw:
        raw.send(request("GET", "/v1/", server.token(FULL)))
        return raw.status() == 200


class TestMalformed:
    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
            b"GARBAGE\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET /v1/ HTTP/9.9\r\n\r\n",
            b"GET /v1/ HTTP/1.1\r\nHost x\r\n\r\n",
            b"GET /v1/ HTTP/1.1\r\n\x00: b\r\n\r\n",
            b"PUT /v1/objects/config HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"PUT /v1/objects/config HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"PUT /v1/objects/a HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"CONNECT example.com:80 HTTP/1.1\r\nHost: example.com\r\n\r\n",
        ],
    )  # fmt: skip
    def test_no_request_at_all(self, quick: Serving, data: bytes) -> None:
        data = data.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {quick.token(FULL)}\r\n\r\n".encode(), 1)
        with Raw(quick.port) as raw:
            raw.send(data)
            answer = raw.answer()
        assert answer == b"" or answer.split(b" ")[1] in (b"400", b"405", b"411", b"404"), answer
        assert b"Traceback" not in answer
        assert is_well(quick)
        assert files(quick.path) == set()
        assert not any("Traceback" in note for note in quick.notes)

    @pytest.mark.parametrize(
        "name",
        [
            *(
                "",
                "/",
                "..",
                "../x",
                "a/../b",
                "%2e%2e/x",
                "a%2fb",
                "A",
                "a//b",
                "tmp",
                "tmp/a",
                ".a",
                "a/b/c/d/e",
                "a%00",
            ),
            *("a" * 201, "packs/", "a?b", "a#b", "*", "\\x", "%"),
        ],
    )
    def test_names(self, shared: Serving, name: str) -> None:
        before = files(shared.path)
        for method in ("GET", "HEAD", "PUT", "DELETE"):
            with Raw(shared.port) as raw:
                raw.send(request(method, f"/v1/objects/{name}", shared.token(FULL), body=b"x" * (method == "PUT")))
                assert raw.status() == 400, method
        assert files(shared.path) == before

    @pytest.mark.parametrize("prefix", ["..", "../", "/", "A", "tmp", "tmp/", "%2e", "a b", "a&prefix=b"])
    def test_prefixes(self, shared: Serving, prefix: str) -> None:
        with Raw(shared.port) as raw:
            raw.send(request("GET", f"/v1/objects?prefix={prefix}".replace(" ", "+"), shared.token(FULL)))
            assert raw.status() == 400

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/", 404), ("GET", "/v1", 404), ("GET", "/v2/", 404), ("GET", "/v1/objects", 404),
            ("GET", "http://localhost/v1/", 404), ("PUT", "/v1/", 405), ("GET", "/v1/create", 405),
            ("POST", "/v1/objects/config", 405), ("PATCH", "/v1/objects/config", 405),
            ("DELETE", "/v1/objects?prefix=", 405),
            ("OPTIONS", "/v1/objects/config", 405), ("TRACE", "/v1/", 405), ("GET", "/v1/objects?suffix=x", 400),
            ("GET", "/v1/objects?", 400),
        ],
    )  # fmt: skip
    def test_routes(self, shared: Serving, method: str, path: str, status: int) -> None:
        with Raw(shared.port) as raw:
            raw.send(request(method, path, shared.token(FULL)))
            assert raw.status() == status

    @pytest.mark.parametrize(
        "wanted", ["bytes=1-0", "bytes=-5", "bytes=0-1,2-3", "bytes=a-b", "items=0-1", "bytes=0--1", "bytes= 0-1"]
    )
    def test_ranges(self, shared: Serving, wanted: str) -> None:
        (shared.path / "config").write_bytes(b"0123456789")
        with Raw(shared.port) as raw:
            raw.send(request("GET", "/v1/objects/config", shared.token(FULL), Range=wanted))
            assert raw.status() == 416

    def test_conditions_that_are_not_known(self, shared: Serving) -> None:
        with Raw(shared.port) as raw:
            raw.send(request("PUT", "/v1/objects/index/x", shared.token(FULL), body=b"x", If_None_Match='"a"'))
            assert raw.status() == 400

    def test_a_body_without_a_length(self, shared: Serving) -> None:
        with Raw(shared.port) as raw:
            head = request(
                "PUT", "/v1/objects/index/x", shared.token(FULL), Content_Length="", Transfer_Encoding="chunked"
            )
            raw.send(head + b"1\r\na\r\n0\r\n\r\n")
            assert raw.status() == 411
        assert not (shared.path / "index" / "x").exists()

    def test_an_older_http(self, shared: Serving) -> None:
        with Raw(shared.port) as raw:
            raw.send(request("GET", "/v1/objects?prefix=", shared.token(FULL)).replace(b"HTTP/1.1", b"HTTP/1.0"))
            assert raw.status() == 400

    def test_requests_behind_each_other(self, shared: Serving) -> None:
        """All in one go: each is answered, in order, and what is refused ends it."""
        (shared.path / "config").write_bytes(b"0123456789")
        get = request("GET", "/v1/objects/config", shared.token(READ_ONLY))
        with Raw(shared.port) as raw:
            raw.send(get * 50 + request("GET", "/v1/", "wrong") + get)
            answer = raw.answer()
        assert answer.count(b"HTTP/1.1 200 OK") == 50
        assert answer.count(b"HTTP/1.1 4") == 1

    def test_the_whole_body_is_asked_for_when_there_is_room(self, shared: Serving) -> None:
        with Raw(shared.port) as raw:
            raw.send(
                request("PUT", "/v1/objects/index/y", shared.token(FULL), Content_Length="3", Expect="100-continue")
            )
            assert raw.status() == 100
            raw.send(b"abc")
            assert raw.status() == 204
        assert (shared.path / "index" / "y").read_bytes() == b"abc"


class TestGone:
    """Clients that go away."""

    def test_amid_a_put(self, server: Serving) -> None:
        name, body = sealed.pack(3 * MIB)
        for right, sent in ((FULL, 0), (FULL, 1), (APPEND_ONLY, 2 * MIB), (FULL, len(body) - 1)):
            with Raw(server.port) as raw:
                raw.send(
                    request("PUT", f"/v1/objects/{name}", server.token(right), body=body)[: -len(body)] + body[:sent]
                )
        await_state(lambda: len(server.exchanges) == 4)
        assert is_well(server)
        assert files(server.path) == set()
        assert server.notes == []

    def test_amid_a_get(self, server: Serving) -> None:
        name, body = sealed.pack(8 * MIB)
        server.write(name, body)
        for _ in range(5):
            with Raw(server.port, buffer_bytes=4096) as raw:
                raw.send(request("GET", f"/v1/objects/{name}", server.token(FULL)))
                raw.receive(100)
        await_state(lambda: len(server.exchanges) == 5)
        assert is_well(server)
        assert server.notes == []


class TestOnThisMachine:
    """A server that wants no token."""

    @pytest.fixture
    def open_server(self, tmp_path: Path) -> Iterator[Serving]:
        make_folder(tmp_path)
        with Serving(tmp_path, needs_token=False) as server:
            yield server

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 200), ({"Host": "127.0.0.1:1234"}, 200), ({"Host": "[::1]:80"}, 200), ({"Host": "LocalHost"}, 200),
            ({"Host": "evil.example"}, 403), ({"Host": "localhost.evil.example"}, 403), ({"Host": "10.0.0.1"}, 403),
            ({"Host": ""}, 400), ({"Origin": "http://localhost"}, 403),
        ],
    )  # fmt: skip
    def test_pages_in_a_browser_are_refused(self, open_server: Serving, headers: dict[str, str], status: int) -> None:
        host = headers.pop("Host", "localhost")
        data = request("GET", "/v1/", "", b"", **headers)
        data = data.replace(b"Host: localhost\r\n", f"Host: {host}\r\n".encode() if host else b"")
        with Raw(open_server.port) as raw:
            raw.send(data)
            assert raw.status() == status

    def test_everybody_else_may_do_everything(self, open_server: Serving) -> None:
        assert is_well(open_server)
