"""A real S3 server for the tests: versitygw on a folder, over HTTP or TLS, that can be killed and started again."""

from __future__ import annotations

import asyncio
import atexit
import datetime
import functools
import ipaddress
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench.remote_servers import CREDENTIALS, ServerMissing, Versitygw
from tests.connectors.servers import free_port, missing

from coffret.connectors.s3 import S3Connector
from coffret.connectors.s3place import parse_location

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["CREDENTIALS", "S3Server", "forgive_uvloop", "free_port", "make_certificates", "shared_server"]


class S3Server(Versitygw):
    """One server on a free port of this host, with its objects as files below `folder`/buckets.

    With a `domain` it takes what stands before that in the name of a host for a bucket.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tls: bool = False,
        region: str = "us-east-1",
        objects: Path | None = None,
        domain: str | None = None,
    ) -> None:
        certificate = (folder / "server.pem", folder / "server.key")
        super().__init__(
            folder,
            buckets=objects or folder / "buckets",
            region=region,
            tls=certificate if tls else (),
            more=("--virtual-domain", domain) if domain else (),
        )
        self.host = domain or "127.0.0.1"
        self.scheme = "s3" if tls else "s3+http"
        self.ca = folder / "ca.pem"
        if tls and not self.ca.exists():
            make_certificates(folder)

    def start(self) -> None:
        """Start, or start again, on the same port; returns when it answers. The test is skipped where it can't."""
        try:
            super().start()
        except ServerMissing as error:
            missing(str(error))

    def pause(self, stopped: bool) -> None:
        """Stop it in its tracks, with all connections open, or let it go on."""
        os.kill(self.pid, signal.SIGSTOP if stopped else signal.SIGCONT)

    def connector(
        self,
        bucket: str,
        *,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
        credentials: tuple[str, str] | None = CREDENTIALS,
        **others: Any,
    ) -> S3Connector:
        """A connector to a bucket (and prefix) here; `port` is that of a proxy."""
        if self.scheme == "s3":
            forgive_uvloop()
        options = options if options is not None else {"ca": str(self.ca)} if self.scheme == "s3" else {}
        place = parse_location(f"{self.scheme}://{self.host}:{port or self.port}/{bucket}", options)
        return S3Connector(place, credentials=credentials, **others)


@functools.cache
def shared_server(*, tls: bool, domain: str | None = None) -> S3Server:
    """A server for all tests that don't kill it; each has a bucket of its own."""
    folder = Path(tempfile.mkdtemp(prefix="coffret-test-s3-"))
    server = S3Server(folder, tls=tls, domain=domain)
    # Handlers run the last one first: the server ends before its folder goes.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server.start()
    return server


def forgive_uvloop() -> None:
    """Let uvloop (0.23, at least) fail in the background where asyncio does not.

    When a TLS connection is closed by both sides at once, it writes to the closed one and tells the loop's handler of
    errors. No request is concerned: it was cancelled.
    """
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    if type(loop).__module__.partition(".")[0] != "uvloop" or getattr(before, "forgives", False):
        return

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, RuntimeError) and "the handler is closed" in str(error):
            return
        if before is None:
            loop.default_exception_handler(context)
        else:
            before(loop, context)

    handle.forgives = True  # type: ignore[attr-defined]
    loop.set_exception_handler(handle)


def make_certificates(folder: Path) -> None:
    """A certificate authority (ca.pem) and what it signed for this host (server.pem, server.key)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("Coffret tests"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )

    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    root = (
        builder("Coffret tests", authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(authority, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    leaf = builder("127.0.0.1", own).add_extension(names, critical=False).sign(authority, hashes.SHA256())
    (folder / "ca.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
