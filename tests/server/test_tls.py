"""Certificates of a server: which can be used, and that a renewed one is taken while it runs."""

from __future__ import annotations

import shutil
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
from tests.connectors.s3_server import make_certificates
from tests.server.conftest import make_folder
from tests.server.serving import Serving
from tests.server.test_hostile import await_state

from coffret.engine.errors import UsageError
from coffret.engine.server import run
from coffret.engine.server.run import load_certificate, parse_address

if TYPE_CHECKING:
    from pathlib import Path


def shakes_hands(port: int, ca: Path, **versions: ssl.TLSVersion) -> bool:
    context = ssl.create_default_context(cafile=ca)
    for name, version in versions.items():
        setattr(context, name, version)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
            context.wrap_socket(raw, server_hostname="localhost"),
        ):
            return True
    except ssl.SSLError:
        return False


def test_a_certificate_that_was_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_RENEWED_S", 0.05)
    make_folder(tmp_path)
    (tmp_path / "fresh").mkdir()
    make_certificates(tmp_path / "fresh")
    with Serving(tmp_path, tls=True) as server:
        assert shakes_hands(server.port, server.ca)
        assert not shakes_hands(server.port, tmp_path / "fresh" / "ca.pem")
        shutil.copy(tmp_path / "fresh" / "server.key", tmp_path / "server.key")  # the other half comes later
        await_state(lambda: any("can't be used" in note for note in server.notes))
        assert shakes_hands(server.port, server.ca)
        shutil.copy(tmp_path / "fresh" / "server.pem", tmp_path / "server.pem")
        await_state(lambda: shakes_hands(server.port, tmp_path / "fresh" / "ca.pem"))
        assert not shakes_hands(server.port, server.ca)


def test_old_versions_of_tls(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with Serving(tmp_path, tls=True) as server:
        assert shakes_hands(server.port, server.ca, maximum_version=ssl.TLSVersion.TLSv1_2)
        assert shakes_hands(server.port, server.ca, minimum_version=ssl.TLSVersion.TLSv1_3)
    assert load_certificate((str(tmp_path / "server.pem"), str(tmp_path / "server.key"))).minimum_version == (
        ssl.TLSVersion.TLSv1_2
    )


def test_files_that_can_t_be_used(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    make_certificates(tmp_path)
    (tmp_path / "other").mkdir()
    make_certificates(tmp_path / "other")
    key = serialization.load_pem_private_key((tmp_path / "server.key").read_bytes(), None)
    (tmp_path / "locked.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    (tmp_path / "garbage").write_text("nothing\n")
    for certificate, name in (
        ("server.pem", "other/server.key"), ("server.pem", "locked.key"), ("server.pem", "garbage"),
        ("garbage", "server.key"), ("server.pem", "none"), ("none", "server.key"), (".", "."),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="--tls-cert"):
            load_certificate((str(tmp_path / certificate), str(tmp_path / name)))


@pytest.mark.parametrize(
    ("text", "host", "port", "is_loopback"),
    [
        ("127.0.0.1:8471", "127.0.0.1", 8471, True), ("[::1]:1", "::1", 1, True), ("0.0.0.0:0", "0.0.0.0", 0, False),
        ("127.0.0.1", "127.0.0.1", 8471, True), ("[::]:5", "::", 5, False), ("localhost:7", "localhost", 7, True),
    ],
)  # fmt: skip
def test_addresses(text: str, host: str, port: int, is_loopback: bool) -> None:
    address = parse_address(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, is_loopback)


@pytest.mark.parametrize(
    "text", ["", ":", ":80", "a:b", "1.2.3.4:", "::1:80", "[::1", "http://x:1", "a b:1", "x:123456"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)
