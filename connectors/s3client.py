"""A client of an S3 server: made at first use, with a deadline that moves along, and bodies that are never held twice.

aiobotocore is imported here alone, in a thread, when the first request is made (280 ms).
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import os
import ssl
from contextlib import AsyncExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from coffret.connectors import s3errors
from coffret.connectors.errors import ConnectionLost, ConnectorError, InvalidLocation, PermissionRefused
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
# How much goes to the connection at a time. It is copied, so that nothing refers to the caller's buffer once a request
# is over, however it ended: 4 % of the time that a put takes over loopback.
_PIECE_BYTES = 256 << 10
_PACED_PIECE_BYTES = 16 << 10
# Connections for all puts with their parts, and gets; those that are not used cost nothing.
_CONNECTIONS = 64
_DEFAULT_REGION = "us-east-1"
# Our own name in botocore's table of signers.
_SIGNER = "coffret-s3v4"


class Watch:
    """The deadline of a request: `stall_s` after the last byte that moved (s)."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self.scope = anyio.CancelScope(deadline=anyio.current_time() + stall_s)

    def moved(self, *, times: int = 1) -> None:
        """Something moved; what comes next may take `times` as long as a stall."""
        self.scope.deadline = anyio.current_time() + times * self._stall_s

    async def outside(self, waiting: Awaitable[None]) -> None:
        """Wait for something that is not the server's."""
        self.scope.deadline = float("inf")
        await waiting
        self.moved()


class Body:
    """A request's body over the caller's buffers, a file for botocore (length, hash), an iterable for aiohttp.

    It goes out once: a request that was repeated below us, after its answer was lost, would find its own object and
    take it for that of somebody else. botocore's `seek` before each request it makes winds it back.
    """

    def __init__(self, views: Sequence[memoryview], watch: Watch, pace: Pace | None, sha256_hex: str | None) -> None:
        self._views, self._size_bytes = list(views), sum(map(len, views))
        self.watch, self.sha256_hex = watch, sha256_hex
        self._pace = pace if pace and pace.upload.limited else None
        self._piece_bytes = _PACED_PIECE_BYTES if self._pace else _PIECE_BYTES
        self._begun = False
        self._index = self._at = self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """To the begin or the end: nothing else is asked for."""
        self._position = self._size_bytes if whence == os.SEEK_END else offset
        self._begun, self._index, self._at = False, 0, 0
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        """All that is left: what botocore would hash if it had to."""
        data = b"".join(self._views)[self._position :]
        self._position = self._size_bytes
        return data

    def release(self) -> None:
        """Let go of the caller's buffers."""
        self._begun, self._index, self._views = True, 0, []

    def __aiter__(self) -> Body:
        if self._begun:
            raise ConnectionResetError("the connection was closed before an answer came")
        return self

    async def __anext__(self) -> bytes:
        while self._index < len(self._views) and self._at == len(self._views[self._index]):
            self._index, self._at = self._index + 1, 0
        self._begun = True
        if self._index == len(self._views):
            self.watch.moved(times=2)
            raise StopAsyncIteration
        piece = bytes(self._views[self._index][self._at : self._at + self._piece_bytes])
        self._at += len(piece)
        if self._pace is not None:
            await self.watch.outside(self._pace.upload.take(len(piece)))
        # A server that refuses early hangs up on the rest. Look for its answer before the next write fails and takes
        # it away.
        await asyncio.sleep(0)
        self.watch.moved()
        return piece


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
        """`ask` with a body."""
        # Over plain HTTP the body is signed: hashing 32 MiB takes 20 to 70 ms, and the loop has other things to do.
        signed = self.place.scheme != "s3"
        digest = await self._threads.run(_sha256_hex, views) if signed else None
        watch = Watch(self.stall_s)
        body = Body(views, watch, self.pace, digest)
        try:
            answer: Answer = await self.ask(operation, where, watch=watch, Body=body, **parameters)
        finally:
            body.release()
        return answer

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

    :raises PermissionRefused: if only one of them is there
    """
    names = ("S3_REPOSITORY_USER", "S3_REPOSITORY_PASSWORD")
    user, password = (os.environ.get(name) or None for name in names)
    if (user is None) != (password is None):
        raise PermissionRefused(f"{names[user is not None]} is not set, but {names[user is None]} is: both are needed")
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
    session = importlib.import_module("aiobotocore.session").get_session()
    # The usual one takes most of the time that a page of a listing costs.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    session.get_component("data_loader").load_service_model("s3", "service-2")
    _add_signer()
    config = importlib.import_module("aiobotocore.config").AioConfig(
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
        parsed: datetime = importlib.import_module("botocore.utils").parse_timestamp(value)
        return parsed


def _add_signer() -> None:
    """Tell botocore of a signer that takes the hash of a body from the body, where it was made in a thread."""
    auth = importlib.import_module("botocore.auth")

    class Signer(auth.S3SigV4Auth):  # type: ignore[misc, name-defined]
        def payload(self, request: Any) -> str:
            return getattr(request.body, "sha256_hex", None) or str(super().payload(request))

    auth.AUTH_TYPE_MAPS.setdefault(_SIGNER, Signer)


def _choose_signer(signature_version: Any, context: Any, **_: Any) -> str | None:
    """Ours for what is signed in botocore's usual way."""
    return _SIGNER if context.get("auth_type") in (None, "v4") and signature_version in ("s3v4", "v4") else None


def _no_expectation(params: Answer, **_: Any) -> None:
    """Don't wait for "100 Continue": it costs a round trip, and some servers never say it."""
    params["headers"].pop("Expect", None)


def _sha256_hex(views: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.hexdigest()
