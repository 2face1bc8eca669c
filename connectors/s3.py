"""Objects in a bucket of an S3 server, AWS or any other: `packs/0f/0f3a…` has the key of that name, below a prefix.

Put-if-absent is `If-None-Match: *`, which AWS, MinIO, Ceph and versitygw hold to. A server that ignores it is found
out by the racing puts that a repository is made with. Large objects go up in parts, several at a time; everything else
is one request, which makes an object whole or not at all.

Times are whole seconds: HEAD knows no finer ones.
"""

from __future__ import annotations

import re
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any

from coffret.connectors.base import NAME, Capabilities, ObjectInfo, checked_range, valid_name, valid_prefix
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    InvalidRange,
    NotFound,
    NotStorage,
    PermissionRefused,
    TransientError,
)
from coffret.connectors.local import FOLDERS
from coffret.connectors.pieces import PieceReader, range_of
from coffret.connectors.s3client import STALL_S, Client
from coffret.connectors.s3errors import NoBucket
from coffret.connectors.s3parts import PART_BYTES, PartsUpload
from coffret.connectors.s3place import parse_location

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from datetime import datetime

    from coffret.connectors.base import Buffer
    from coffret.connectors.httpbody import Watch
    from coffret.connectors.limit import Pace
    from coffret.connectors.s3client import Answer
    from coffret.connectors.s3place import Place

# Packs (32 MiB) go as one request, several at a time: parts would cost each two more round trips.
SINGLE_BYTES = 64 << 20
# How much of an object is taken from the connection at a time.
_READ_BYTES = 1 << 20
_PACED_READ_BYTES = 64 << 10
# The classes for what is seldom read bill at least 128 KiB an object; small ones stay in the bucket's own class.
_CLASS_FROM_BYTES = 128 << 10
# How much of a large object is compared at a time.
_COMPARED_BYTES = 4 << 20


def open_url(url: str, options: Mapping[str, str]) -> S3Connector:
    """The connector for a location as `s3place` describes it.

    :raises InvalidLocation: if the form, or an option, is not known
    """
    return S3Connector(parse_location(url, options))


class S3Connector(PieceReader):
    """A repository in a bucket, which `create` makes if need be."""

    # A fourth put at a time was no faster (10.8 to 11.7 s for 1.9 GB) and takes another 32 MiB.
    # Ranges that a restore asks for are of 3 MiB: at 50 ms eight at a time were 200 MB/s at most.
    capabilities = Capabilities(parallel_puts=3, parallel_gets=16, ordered_lists=True)

    def __init__(
        self,
        place: Place,
        *,
        credentials: tuple[str, str] | None = None,
        stall_s: float = STALL_S,
        single_bytes: int = SINGLE_BYTES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.place = place
        self.location = place.location
        self._client = Client(place, credentials, stall_s=stall_s)
        self._single_bytes = single_bytes
        self._parts = PartsUpload(self._client, part_bytes)

    def set_pace(self, pace: Pace) -> bool:
        self._client.pace = pace
        return True

    async def create(self) -> None:
        try:
            names = await self._top_names()
        except NoBucket:
            await self._make_bucket()
            return
        if foreign := sorted(names.difference(FOLDERS, ("config",))):
            raise NotStorage(f"{self.location} holds other objects, {foreign[0]!r} for one: choose another prefix")
        if "config" in names:
            return
        # A creation cut short leaves a key slot and a lease at most. More is a repository that lost its config.
        async for info in self.list(""):
            if not info.name.startswith(("keys/", "leases/")):
                raise NotStorage(f"{self.location} holds objects of a repository without its config")

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        where, key = self._where(name)
        views = [memoryview(part).cast("B") for part in body if len(part)]
        size_bytes = sum(map(len, views))
        options: Answer = {"Key": key}
        condition: Answer = {"IfNoneMatch": "*"} if if_absent else {}
        if self.place.storage_class and size_bytes >= _CLASS_FROM_BYTES:
            options["StorageClass"] = self.place.storage_class
        try:
            if size_bytes <= self._single_bytes:
                await self._client.send("put_object", where, views, **options, **condition)
            else:
                await self._parts.put(where, views, options, condition)
        except ConnectionLost as error:
            # Without a cause it is our own patience that ended: nobody is there to be asked.
            if error.__cause__ is None or not await self._took_effect(name, views, size_bytes, if_absent):
                raise
        finally:
            for view in views:
                view.release()  # whatever still refers to it: the buffer is its owner's

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        data = BytesIO()
        await self._fetch(name, 0, limit_bytes, data.write, at_most=True)
        return data.getvalue()

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        start = self.place.prefix + valid_prefix(prefix)
        page: Answer = {"IsTruncated": True}
        last = ""  # one that is replaced meanwhile some servers (rclone's) list twice in a row
        while page.get("IsTruncated"):
            following = {"ContinuationToken": page["NextContinuationToken"]} if len(page) > 1 else {}
            page = await self._list(Prefix=start, **following)
            for entry in page.get("Contents", ()):
                name = entry["Key"][len(self.place.prefix) :]
                if NAME.fullmatch(name) and name != last:
                    last = name
                    yield _info(name, entry["Size"], entry["LastModified"])

    async def stat(self, name: str) -> ObjectInfo:
        where, key = self._where(name)
        try:
            answer = await self._client.ask("head_object", where, Key=key)
            return _info(name, answer["ContentLength"], answer["LastModified"])
        except TransientError:
            raise
        except ConnectorError:
            # Answers to HEAD have no body: whether it is the object that is missing, the bucket or the user, only
            # another request tells.
            page = await self._list(Prefix=key, MaxKeys=1)
        for entry in page.get("Contents", ()):
            if entry["Key"] == key:
                return _info(name, entry["Size"], entry["LastModified"])
        raise NotFound(f"there is no {where}")

    async def delete(self, name: str) -> None:
        where, key = self._where(name)
        try:
            await self._client.ask("delete_object", where, Key=key)
        except NoBucket:
            raise
        except NotFound:
            pass

    async def close(self) -> None:
        await self._client.close()

    def _where(self, name: str) -> tuple[str, str]:
        """What to call an object in messages, and its key."""
        return f"{self.location}/{valid_name(name)}", self.place.prefix + name

    async def _list(self, **parameters: Any) -> Answer:
        """A page of a listing.

        :raises NotStorage: if it is none: any web server answers something
        """
        page: Answer = await self._client.ask("list_objects_v2", self.location, **parameters)
        if "IsTruncated" not in page:
            raise NotStorage(f"{self.location}: the server does not answer as an S3 server does")
        return page

    async def _top_names(self) -> set[str]:
        """What lies directly below the prefix, objects and folders: all of it if a repository is all there is."""
        prefix = self.place.prefix
        page = await self._list(Prefix=prefix, Delimiter="/", MaxKeys=100)
        keys = [entry["Key"] for entry in page.get("Contents", ())]
        keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        return {key[len(prefix) :].removesuffix("/") for key in keys} - {""}

    async def _make_bucket(self) -> None:
        """Make the bucket, as users of other programs expect.

        :raises PermissionRefused: if that is not allowed
        """
        region = await self._client.region()
        configuration: Answer = {}
        if region != "us-east-1":  # which can't be named
            configuration = {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            with suppress(AlreadyExists):
                await self._client.ask("create_bucket", self.location, **configuration)
        except PermissionRefused as error:
            raise PermissionRefused(
                f"there is no bucket {self.place.bucket!r}, and this key may not make it: make it first ({error})"
            ) from error

    async def _took_effect(self, name: str, views: Sequence[memoryview], size_bytes: int, if_absent: bool) -> bool:
        """Whether a put that was cut off made the object; False also if nobody can tell, or it can just be repeated.

        A server that refuses early hangs up on the rest of the body, and its answer is lost on the way.

        :raises PermissionRefused: if that is what it would have said
        :raises NotFound: likewise, if there is no bucket
        :raises AlreadyExists: if the name was to be absent and is taken by another object
        """
        try:
            there = (await self.stat(name)).size_bytes == size_bytes
            if not if_absent or not size_bytes:
                return False
            if there and await self._is_same(name, views):
                return True
        except NoBucket:
            raise
        except (NotFound, TransientError):
            return False
        raise AlreadyExists(f"{self._where(name)[0]} exists already")

    async def _is_same(self, name: str, views: Sequence[memoryview]) -> bool:
        """Whether an object holds these bytes."""
        offset = 0
        for view in views:
            for at in range(0, len(view), _COMPARED_BYTES):
                piece = view[at : at + _COMPARED_BYTES]
                if await self.get(name, offset=offset, length=len(piece)) != piece:
                    return False
                offset += len(piece)
        return True

    async def _fetch(
        self, name: str, offset: int, length: int | None, write: Callable[[bytes], Any], *, at_most: bool = False
    ) -> None:
        """As for any; with `at_most` the object may end within the range."""
        where, key = self._where(name)
        if offset < 0 or (length is not None and length < 0):
            raise InvalidRange(f"{where}: {length} bytes from {offset}")
        if length == 0:
            checked_range(name, (await self.stat(name)).size_bytes, offset, 0)
            return
        wanted: Answer = {}
        if offset or length is not None:
            wanted = {"Range": range_of(offset, length)}

        pace = self._client.pace.download if self._client.pace and self._client.pace.download.limited else None
        most_bytes = _READ_BYTES if pace is None else _PACED_READ_BYTES

        async def read(answer: Answer, watch: Watch) -> None:
            try:
                left = _checked_answer(answer, where, offset, length, at_most=at_most)
                while left:
                    piece = await answer["Body"].read(min(left, most_bytes))
                    if not piece:
                        raise ConnectionLost(f"{where}: {left} bytes are missing at its end")
                    if pace is not None:
                        await watch.outside(pace.take(len(piece)))
                    watch.moved()
                    write(piece)
                    left -= len(piece)
            finally:
                answer["Body"].close()

        try:
            await self._client.ask("get_object", where, read=read, Key=key, **wanted)
        except InvalidRange:
            # Servers refuse an empty range at the end as well.
            size_bytes = (await self.stat(name)).size_bytes
            if checked_range(name, size_bytes, offset, size_bytes if at_most else length):
                raise


def _checked_answer(answer: Answer, where: str, offset: int, length: int | None, *, at_most: bool) -> int:
    """How many bytes of the body are wanted: those of the range that was asked for, or that there are of it.

    :raises InvalidRange: if it does not lie within the object
    """
    size_bytes, first = answer["ContentLength"], 0
    if found := re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", "")):
        size_bytes, first = int(found[3]), int(found[1])
    if first != offset:
        raise ConnectorError(
            f"{where}: the server sends bytes from {first} on when it is asked for those from {offset}"
        )
    if at_most and length is not None:
        length = min(length, size_bytes - offset)
    wanted = checked_range(where, size_bytes, offset, length)
    if answer["ContentLength"] < wanted:
        raise TransientError(f"{where}: the server sends {answer['ContentLength']} of {wanted} bytes")
    return wanted


def _info(name: str, size_bytes: int, modified: datetime) -> ObjectInfo:
    return ObjectInfo(name, size_bytes, float(int(modified.timestamp())))
