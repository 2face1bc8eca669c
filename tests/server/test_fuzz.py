"""Anything at all on a connection: the server answers as it means to, or hangs up, and logs no traceback.

Requests are made from pieces that are nearly right, so that they get far. A read-only token goes with most of them, and
whatever they are, the repository is as it was.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.connectors.stores import files
from tests.server import sealed
from tests.server.conftest import make_folder
from tests.server.serving import Raw, Serving
from tests.server.test_hostile import QUICK

from coffret.connectors.base import APPEND_ONLY, READ_ONLY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3}) ")
# What the server means to say; 5xx and 100 are not among them.
_MEANT = {200, 204, 206, 400, 401, 403, 404, 405, 408, 409, 411, 412, 413, 416, 417, 429}
TOKEN = "{token}"
GARBAGE = st.binary(max_size=40)
METHODS = st.sampled_from([b"GET", b"HEAD", b"PUT", b"DELETE", b"POST", b"OPTIONS", b"PATCH", b"get", b"\xff", b""])
NAMES = st.sampled_from([
    b"config", b"keys/a", b"packs/00/" + b"0" * 64, b"index/" + b"0" * 32 + b"-0", b"snapshots/" + b"0" * 32,
    b"leases/" + b"0" * 32, b"trash/1", b"removed/x", b"../config", b"%2e%2e/", b"", b"a" * 300, b"tmp/x",
])  # fmt: skip
PATHS = st.one_of(
    st.builds(b"/v1/objects/".__add__, st.one_of(NAMES, GARBAGE)),
    st.builds(b"/v1/objects?prefix=".__add__, st.one_of(NAMES, GARBAGE, st.just(b"packs/"))),
    st.sampled_from([b"/", b"/v1/", b"/v1/create", b"/v1/objects", b"*", b"http://x/v1/", b"/v1/objects?x=y"]),
    GARBAGE,
)
HEADERS = st.lists(
    st.one_of(
        st.sampled_from([
            b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 0",
            b"Content-Length: 1e3", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Host: a",
            b"Range: bytes=0-1", b"Range: bytes=5-", b"Range: bytes=-1", b"Range: bytes=0-999999999999", b"Range: x",
            b"If-None-Match: *", b"If-None-Match: x", b"Expect: 100-continue", b"Expect: x", b"Connection: close",
            b"Connection: Upgrade\r\nUpgrade: websocket", b"Content-Encoding: gzip", b"Authorization: Bearer x",
            b"Authorization: Basic eDp4", b" folded: line", b"Connection: keep-alive", b"Origin: http://x",
        ]),
        st.builds(lambda name, value: name + b": " + value, GARBAGE, GARBAGE),
    ),
    max_size=4,
)  # fmt: skip


def joined(method: bytes, path: bytes, version: bytes, headers: list[bytes], tokens: int, body: bytes) -> bytes:
    """A request of these parts."""
    access = [f"Authorization: Bearer {TOKEN}".encode()] * tokens
    return b"\r\n".join((method + b" " + path + b" " + version, *headers, *access, b"", b"")) + body


REQUESTS = st.builds(
    joined,
    METHODS,
    PATHS,
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2", b""]),
    HEADERS,
    st.integers(0, 4).map(lambda drawn: min(drawn, 1)),
    st.one_of(st.just(b""), st.just(b"12345"), st.just(b"5\r\nabcde\r\n0\r\n\r\n"), GARBAGE),
)
STREAMS = st.one_of(st.lists(REQUESTS, min_size=1, max_size=3).map(b"".join), st.binary(max_size=300))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("fuzz")
    make_folder(folder)
    with Serving(folder, limits=QUICK) as server:
        for name, body in (("config", b"{}"), sealed.pack(), sealed.lease("0" * 32), sealed.snapshot("0" * 32)):
            server.write(name, body)
        yield server
    assert server.error is None


def content(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in files(path)}


@pytest.mark.parametrize("right", [READ_ONLY, APPEND_ONLY])
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(stream=STREAMS)
def test_anything_at_all(target: Serving, right: str, stream: bytes) -> None:
    before, logged = content(target.path), len(target.notes)
    with Raw(target.port) as raw:
        try:
            raw.send(stream.replace(TOKEN.encode(), target.token(right).encode()))
            raw.finish()
        except OSError:
            pass  # it has hung up already
        answer = raw.answer()
    statuses = {int(found) for found in _STATUS.findall(answer)} - {100}
    assert statuses <= _MEANT, (stream, answer)
    assert b"Traceback" not in answer
    assert not any("failed" in note or "Traceback" in note for note in target.notes[logged:]), target.notes[logged:]
    assert content(target.path) == before
