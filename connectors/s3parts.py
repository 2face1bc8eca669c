"""Large objects of S3: sent in parts, several at a time, and whole once the upload is completed.

An upload that fails or is cancelled is given up, so that its parts are not paid for; those of killed processes are
found by a later run.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import anyio

from coffret.connectors.errors import ConnectionLost, ConnectorError, PermissionRefused
from coffret.connectors.s3errors import NoUpload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coffret.connectors.s3client import Client

PART_BYTES = 16 << 20
_PARALLEL_PARTS = 4
_MAX_PARTS = 10_000
_ABORT_WAITS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
# No put takes as long as this: an upload so old is that of a process that was killed.
_ABANDONED_AFTER_S = 24 * 3600.0


class PartsUpload:
    """Puts of objects in parts of `part_bytes`, or of more where there would be too many."""

    def __init__(self, client: Client, part_bytes: int = PART_BYTES) -> None:
        self._client, self._part_bytes = client, part_bytes
        self._swept = False

    async def put(
        self, where: str, views: Sequence[memoryview], options: dict[str, Any], condition: dict[str, Any]
    ) -> None:
        """Make an object; `options` belong to it (its key, for one), `condition` to its completion."""
        await self._sweep()
        upload = {"Key": options["Key"], "UploadId": await self._begin(where, options)}
        try:
            part_bytes = max(self._part_bytes, -(-sum(map(len, views)) // _MAX_PARTS))
            etags = await self._send_parts(where, _cut(views, part_bytes), upload)
            parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
            # Some servers copy the parts together.
            await self._client.ask(
                "complete_multipart_upload", where, patience=5, MultipartUpload={"Parts": parts}, **condition, **upload
            )
        except BaseException:
            await self._abort(where, upload, times=3)
            raise

    async def _begin(self, where: str, options: dict[str, Any]) -> str:
        """Begin an upload; when cancelled, none is left behind either."""
        request = asyncio.ensure_future(self._client.ask("create_multipart_upload", where, **options))
        try:
            return str((await asyncio.shield(request))["UploadId"])
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True), suppress(ConnectorError):
                await self._abort(where, {"Key": options["Key"], "UploadId": (await request)["UploadId"]})
            raise

    async def _send_parts(
        self, where: str, parts: Iterator[list[memoryview]], upload: dict[str, Any]
    ) -> dict[int, str]:
        """Send parts, some at a time; their tags by number, from 1 on."""
        etags: dict[int, str] = {}
        numbered = enumerate(parts, 1)

        async def send_some() -> None:
            for number, part in numbered:
                try:
                    answer = await self._client.send("upload_part", where, part, PartNumber=number, **upload)
                finally:
                    for view in part:
                        view.release()
                etags[number] = answer["ETag"]

        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(_PARALLEL_PARTS):
                    tasks.start_soon(send_some)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        return etags

    async def _abort(self, where: str, upload: dict[str, Any], *, times: int = 1) -> None:
        """Give an upload up. If the server can't be told, a later run does it.

        Parts may still come in on connections that we have closed: servers fail at it then, or have the upload again
        afterwards. `times` is how often it has to be gone.
        """
        with anyio.CancelScope(shield=True):
            for wait_s in _ABORT_WAITS_S:
                try:
                    await self._client.ask("abort_multipart_upload", where, **upload)
                    times -= 1
                except NoUpload:
                    times -= 1
                except (ConnectionLost, PermissionRefused):
                    return
                except ConnectorError:
                    pass
                if times <= 0:
                    return
                await anyio.sleep(wait_s)

    async def _sweep(self) -> None:
        """Give up what killed processes left, once; by the server's clock."""
        if self._swept:
            return
        self._swept = True
        place = self._client.place
        with suppress(ConnectorError):
            answer = await self._client.ask("list_multipart_uploads", place.location, Prefix=place.prefix)
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            for upload in answer.get("Uploads", ()):
                if (now - upload["Initiated"]).total_seconds() > _ABANDONED_AFTER_S:
                    await self._abort(place.location, {"Key": upload["Key"], "UploadId": upload["UploadId"]})


def _cut(views: Sequence[memoryview], part_bytes: int) -> Iterator[list[memoryview]]:
    """The same bytes in parts of that size, and a last one."""
    part: list[memoryview] = []
    room = part_bytes
    for view in views:
        at = 0
        while at < len(view):
            piece = view[at : at + room]
            part.append(piece)
            at, room = at + len(piece), room - len(piece)
            if not room:
                yield part
                part, room = [], part_bytes
    if part:
        yield part
