"""Read and write whole objects: never more than an object of its kind can have, and never twice for a lost answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.connectors.errors import AlreadyExists, InvalidRange, NotFound, TransientError
from coffret.engine.errors import Damaged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from coffret.connectors.base import Connector, ObjectInfo

# Folders of objects that are listed.
SNAPSHOTS, REMOVED, INDEX, TRASH, LEASES = "snapshots/", "removed/", "index/", "trash/", "leases/"
# How leases begin that are put by who has no keys: the racing puts that try a storage, and a clone at work. That they
# are there is what counts; a crash leaves them as it does others.
PROBE, CLONE = b"probe ", b"clone "
# The largest object of each kind, as stored (bytes); see docs/format.md, "Limits". Nothing near is ever written: an
# index object has some 36 bytes for each of 100,000 chunks, a snapshot at most 10,000 faults.
MAX_MARK_BYTES, MAX_SNAPSHOT_BYTES, MAX_INDEX_BYTES = 1 << 20, 64 << 20, 256 << 20
# Objects are fetched together up to so many bytes.
_TOGETHER_BYTES = 64 << 20


async def read_listed(connector: Connector, info: ObjectInfo, limit_bytes: int) -> bytes:
    """A whole object, as large as it was listed.

    :raises Damaged: if it is larger than any of its kind, or not as large as it was listed
    :raises NotFound: if it is gone
    """
    if info.size_bytes > limit_bytes:
        raise Damaged(f"{info.name}: has {info.size_bytes} bytes, more than any object of its kind")
    try:
        return await connector.get(info.name, length=info.size_bytes)
    except InvalidRange as error:
        raise Damaged(f"{info.name}: {error}") from None


def batches(infos: Iterable[ObjectInfo], at_once: int) -> Iterator[list[ObjectInfo]]:
    """Parts of a listing to be fetched together: at most so many, and few if they are large."""
    batch: list[ObjectInfo] = []
    size_bytes = 0
    for info in infos:
        if batch and (len(batch) == at_once or size_bytes + info.size_bytes > _TOGETHER_BYTES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(info)
        size_bytes += info.size_bytes
    if batch:
        yield batch


async def put_once(connector: Connector, name: str, body: bytes | memoryview) -> None:
    """Put an object if absent. If the answer is lost, or the name is taken, what stands there decides.

    :raises AlreadyExists: if the name is taken by other bytes: no two bodies are equal, each holds a nonce
    :raises TransientError: if it could not be put
    """
    try:
        await connector.put(name, [body], if_absent=True)
    except (AlreadyExists, TransientError) as error:
        try:
            same = await _holds(connector, name, body)
        except NotFound:
            raise error from None
        if not same:
            raise AlreadyExists(f"{name} is taken") from None


async def _holds(connector: Connector, name: str, body: bytes | memoryview) -> bool:
    if (await connector.stat(name)).size_bytes != len(body):
        return False
    return await connector.get(name) == body


async def list_objects(connector: Connector, prefix: str) -> list[ObjectInfo]:
    """The objects there are of a kind, given by its folder."""
    return [info async for info in connector.list(prefix)]


async def list_leases(connector: Connector) -> dict[str, ObjectInfo]:
    """The leases there are, by attempt (hexadecimal); none that is held all the while is left out."""
    leases: dict[str, ObjectInfo] = {}
    for _ in range(2):  # some servers replace a lease by removing the old one first: it may be missing for a moment
        leases |= {info.name.partition("/")[2]: info for info in await list_objects(connector, LEASES)}
    return leases
