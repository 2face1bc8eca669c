"""A client of an S3 server: made at first use, with a deadline that moves along, and bodies that are never held twice.

aiobotocore is imported here alone, in a thread, when the first request is made (280 ms).
"""

from __future__ import annotations

import os
import ssl
from contextlib import AsyncExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from coffret.connectors import s3errors
from coffret.connectors.errors import AccessDenied, ConnectionLost, ConnectorError, InvalidLocation
from coffret.connectors.httpbody import Body, Watch, crc32_base64, sha256_hex
from coffret.connectors.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from coffret.connectors.limit import Pace
    from coffret.connectors.s3place import Place

T = TypeVar("T")
Answer = dict[str, Any]
# Without a byte moved for so long a connection is given up: half-open ones never say a word. The answer to a body may
# take twice as long: what the kernel still holds of it has to go out, and the server makes it durable.
STALL_S = 60.0
_CONNECT_S = 15.0
# Connections for all puts with their parts, and gets; those that are not used cost nothing.
_CONNECTIONS = 64
_DIGESTED_AT_ONCE_BYTES = 256 << 10
_DEFAULT_REGION = "us-east-1"
# Our own name in botocore's table of signers.
_SIGNER = "coffret-s3v4"


class Client:
    """Requests to one server. Every one ends: in an answer, or in a ConnectorError."""

    def __init__(self, place: Place, credentials: tuple[str, str] | None = None, *, stall_s: float = STALL_S) -> None:
        self.place, self.stall_s = place, stall_s
        self.pace: Pace | None = None
        self._given = credentials
        self._threads = Threads(2, "coffret-s3")
        self._lock = anyio.Lock()
        self._open = AsyncExitStack()
        self._client: Any = None
        self._reached = False
        self._is_tls = place.scheme == "s3"
        self._hashing = False

    async def ask(
        self,
        operation: str,
        where: str,
        *,
        read: Callable[[Answer, Watch], Awaitable[T]] | None = None,
        watch: Watch | None = None,
        patience: int = 1,
        **parameters: Any,
    ) -> Any:
        """The server's answer, or what `read` makes of it while the deadline still counts. `where` is for errors;
        `patience` multiplies the time for an answer.

        :raises ConnectionLost: if nothing moved for too long
        """
        try:
            with s3errors.mapped(where, reached=self._reached):
                client = self._client or await self._connect()
                watch = watch or Watch(self.stall_s)
                with watch.scope:
                    watch.moved(times=patience)
                    answer = await getattr(client, operation)(Bucket=self.place.bucket, **parameters)
                    self._reached = True
                    watch.moved()
                    return answer if read is None else await read(answer, watch)
        except (ConnectionLost, InvalidLocation):
            raise
        except ConnectorError:
            self._reached = True  # a refusal is an answer too
            raise
        raise ConnectionLost(f"{where}: no answer for {self.stall_s:g} s")

    async def send(self, operation: str, where: str, views: Sequence[memoryview], **parameters: Any) -> Answer:
        """`ask` with a body, which the server can tell from a truncated one.

        That is by its signed hash, or over TLS by its CRC: versitygw makes an object of whatever arrived before an
        unsigned body was cut off. A part that was cut off has no tag, so that its upload is never completed.
        """
        hashing = not self._is_tls or self._hashing
        digest = await self._digested(sha256_hex if hashing else crc32_base64, views)
        watch = Watch(self.stall_s)
        body = Body(views, watch, self.pace, digest if hashing else None)
        checksum: Answer = {"ChecksumCRC32": digest} if operation == "put_object" and not hashing else {}
        try:
            answer: Answer = await self.ask(operation, where, watch=watch, Body=body, **checksum, **parameters)
            return answer
        except ConnectorError as error:
            if not checksum or type(error) is not ConnectorError or "checksum" not in str(error).lower():
                raise
            self._hashing = True  # an older server, which does not know the header
        finally:
            body.release()
        return await self.send(operation, where, views, **parameters)

    async def _digested(self, digest: Callable[[Sequence[memoryview]], str], views: Sequence[memoryview]) -> str:
        """In a thread if it takes long: 12 ms (CRC) and 24 ms (hash) for 32 MiB, and more when there is much to do."""
        if sum(map(len, views)) <= _DIGESTED_AT_ONCE_BYTES:
            return digest(views)
        return await self._threads.run(digest, views)

    async def region(self) -> str:
        """The region that requests are signed for."""
        return str((self._client or await self._connect()).meta.region_name)

    async def close(self) -> None:
        """Close all connections."""
        self._threads.close()
        self._client = None
        await self._open.aclose()

    async def _connect(self) -> Any:
        async with self._lock:
            if self._client is None:
                session, config = await self._threads.run(_prepare, self.place)
                user, password = self._given or _credentials()
                client = session.create_client(
                    "s3",
                    region_name=self.place.region or session.get_config_variable("region") or _DEFAULT_REGION,
                    endpoint_url=self.place.endpoint,
                    verify=self.place.ca,
                    aws_access_key_id=user,
                    aws_secret_access_key=password,
                    config=config,
                )
                made = await self._open.enter_async_context(client)
                made.meta.events.register("before-call.s3", _no_expectation)
                for operation in ("PutObject", "UploadPart"):
                    made.meta.events.register_first(f"choose-signer.s3.{operation}", _choose_signer)
                self._client = made
            return self._client


def _credentials() -> tuple[str | None, str | None]:
    """User and password from the environment; None leaves it to the AWS chain.

    :raises AccessDenied: if only one of them is there
    """
    names = ("S3_REPOSITORY_USER", "S3_REPOSITORY_PASSWORD")
    user, password = (os.environ.get(name) or None for name in names)
    if (user is None) != (password is None):
        raise AccessDenied(f"{names[user is not None]} is not set, but {names[user is None]} is: both are needed")
    return user, password


def _prepare(place: Place) -> tuple[Any, Any]:
    """A session of aiobotocore and its configuration; what takes long: imports, and reading the description of S3.

    :raises InvalidLocation: if the CA file is missing or holds no certificate
    """
    if place.ca is not None:
        try:
            ssl.create_default_context(cafile=place.ca)
        except OSError as error:
            raise InvalidLocation(f"-o ca={place.ca}: {error.strerror or error}") from error
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    session = get_session()
    # The usual one takes most of the time that a page of a listing costs.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    session.get_component("data_loader").load_service_model("s3", "service-2")
    _add_signer()
    config = AioConfig(
        ignore_configured_endpoint_urls=True,  # the location says it
        connect_timeout=_CONNECT_S,
        read_timeout=None,  # the watch does it, while a body is sent as well
        max_pool_connections=_CONNECTIONS,
        retries={"total_max_attempts": 1, "mode": "standard"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={
            "addressing_style": "path" if place.path_style else "virtual",
            "payload_signing_enabled": place.scheme != "s3",
        },
    )
    return session, config


def _timestamp(value: Any) -> datetime:
    """A time as S3 writes it: ISO 8601 in a body, RFC 9110 in a header."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        from botocore.utils import parse_timestamp

        parsed: datetime = parse_timestamp(value)
        return parsed


def _add_signer() -> None:
    """Tell botocore of a signer that takes the hash of a body from the body, where it was made in a thread."""
    from botocore import auth

    class Signer(auth.S3SigV4Auth):  # type: ignore[misc]
        def payload(self, request: Any) -> str:
            return getattr(request.body, "sha256_hex", None) or str(super().payload(request))

    auth.AUTH_TYPE_MAPS.setdefault(_SIGNER, Signer)


def _choose_signer(signature_version: Any, context: Any, **_: Any) -> str | None:
    """Ours for what is signed in botocore's usual way."""
    return _SIGNER if context.get("auth_type") in (None, "v4") and signature_version in ("s3v4", "v4") else None


def _no_expectation(params: Answer, **_: Any) -> None:
    """Don't wait for "100 Continue": it costs a round trip, and some servers never say it."""
    params["headers"].pop("Expect", None)
