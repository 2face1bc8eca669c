"""What an append-only token may do: add what is its own, and end nothing and nobody.

It may put packs, whose names prove their content, and index objects, the snapshot and the lease of its own attempts.
What it does not own it can't bring to an end: a tombstone, a mark or a removal would void what others stored, a key
slot or a config would open the repository, or close it.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.connectors.errors import AlreadyExists, NotFound
from coffret.engine.objects import MAX_INDEX_BYTES, MAX_MARK_BYTES, MAX_SNAPSHOT_BYTES
from coffret.engine.records import FORMAT_VERSION
from coffret.engine.sealing import END, HEADER_BYTES, INDEX, LEASE, MAGIC, PACK, SNAPSHOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from coffret.connectors.base import Connector
    from coffret.engine.server.arrival import Arrival
    from coffret.engine.server.attempts import Attempts

_PACK_NAME = re.compile(r"packs/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_OWN_NAME = re.compile(r"(index|snapshots|leases)/([0-9a-f]{32})(-(?:0|[1-9][0-9]{0,8}))?")
_KINDS = {"index": INDEX, "snapshots": SNAPSHOT, "leases": LEASE}
_FOLDERS = ("packs", "index", "snapshots", "leases", "trash", "removed", "keys", "config")
# The largest object of each kind (bytes), and of any that is none; docs/format.md, "Limits".
MAX_PACK_BYTES = 256 << 20
_MAX_LEASE_BYTES = 4 << 20
_MAX_OWN_LEASE_BYTES = 64 << 10
_MAX_BYTES = {
    "packs": MAX_PACK_BYTES,
    "index": MAX_INDEX_BYTES,
    "snapshots": MAX_SNAPSHOT_BYTES,
    "leases": _MAX_LEASE_BYTES,
    "trash": MAX_MARK_BYTES,
    "removed": MAX_MARK_BYTES,
    "keys": 8 << 20,
    "config": 16 << 10,
}
MAX_OBJECT_BYTES = max(_MAX_BYTES.values())
# Hashing so little is faster than waking a thread.
_HASHED_AT_ONCE_BYTES = 256 << 10


class NoRight(Exception):
    """The token does not give the right to do this; the message says what it is for."""


def max_bytes(name: str) -> int:
    """How large an object of this name may be."""
    return _MAX_BYTES.get(name.partition("/")[0], _MAX_LEASE_BYTES)


class Addition(msgspec.Struct, frozen=True):
    """An object that an append-only token may perhaps add: its name, the folder, and whose attempt it is of ("")."""

    name: str
    folder: str
    attempt: str


def addition(name: str) -> Addition:
    """What the put of a name would add.

    :raises NoRight: if it is none of what such a token may add
    """
    if _PACK_NAME.fullmatch(name):
        return Addition(name, "packs", "")
    found = _OWN_NAME.fullmatch(name)
    if found and (found[1] == "index") == (found[3] is not None):
        return Addition(name, found[1], found[2])
    raise _refused(name, "put")


class AppendOnly:
    """The puts and deletes of append-only tokens, on a storage that others use too. `owner`: the token's hash."""

    def __init__(self, connector: Connector, attempts: Attempts) -> None:
        self._connector, self._attempts = connector, attempts

    async def put(self, wanted: Addition, arrival: Arrival, owner: str, *, if_absent: bool) -> None:
        """Add an object that comes in; nothing is ever replaced, but for a lease of one's own unless `if_absent`.

        :raises NoRight: if it is not what its name says, or of somebody else's attempt
        :raises AlreadyExists: if the name is taken, other than by the same pack
        """
        if wanted.folder == "packs":
            await self._put_pack(wanted.name, arrival)
            return
        await arrival.accept()
        body = arrival.view
        self._check_header(wanted, body)
        if wanted.folder == "leases":
            await self._put_lease(wanted, body, owner, if_absent=if_absent)
            return
        await self._check_owner(wanted, owner)
        await self._connector.put(wanted.name, [body], if_absent=True)

    async def delete(self, name: str, owner: str) -> None:
        """Take a lease of one's own away.

        :raises NoRight: if it is anything else
        """
        found = _OWN_NAME.fullmatch(name)
        if not found or found[1] != "leases" or found[3] is not None:
            raise _refused(name, "delete")
        await self._check_owner(Addition(name, "leases", found[2]), owner)
        await self._connector.delete(name)

    async def _put_pack(self, name: str, arrival: Arrival) -> None:
        body = arrival.view
        arrival.check = partial(_check_pack, name, body)
        try:
            await self._connector.put_arriving(name, arrival, if_absent=True)
        except AlreadyExists:
            await arrival.accept()
            try:
                there = (await self._connector.stat(name)).size_bytes
            except NotFound:
                there = -1
            if there != len(body):
                raise AlreadyExists(f"{name} is there, with {there} instead of {len(body)} bytes") from None

    def _check_header(self, wanted: Addition, body: memoryview) -> None:
        """Whether the header in clear says the kind and the attempt that the name says.

        :raises NoRight: if it does not
        """
        header = bytes(body[:HEADER_BYTES])
        if len(header) < HEADER_BYTES or header[:8] != MAGIC or header[8] != FORMAT_VERSION:
            raise NoRight(f"{wanted.name} does not begin as an object of a repository does")
        if wanted.folder == "snapshots" and header[9:10] == END:
            raise NoRight(f"{wanted.name}: this would end an attempt with a tombstone, which takes a full token")
        if header[9:10] != _KINDS[wanted.folder]:
            raise NoRight(f"{wanted.name} is of another kind than its name says")
        if header[12:28].hex() != wanted.attempt:
            raise NoRight(f"{wanted.name} is of another attempt than its name says")
        if wanted.folder == "leases" and len(body) > _MAX_OWN_LEASE_BYTES:
            raise NoRight(f"{wanted.name} has {len(body)} bytes, more than any lease")

    async def _put_lease(self, wanted: Addition, body: memoryview, owner: str, *, if_absent: bool) -> None:
        known = await to_thread.run_sync(self._attempts.owner, wanted.attempt)
        # Nobody's as far as this server knows. It may be of one who writes past the server, or whose token was used
        # long ago: then something of it is there. Or of one who was faster just now.
        if not known and await self._leaves_traces(wanted.attempt):
            await self._check_owner(wanted, owner)
            known = owner
        is_first = not known
        if is_first:
            known = await to_thread.run_sync(self._attempts.bind, wanted.attempt, owner)
        _check_same(wanted, known, owner)
        await self._connector.put(wanted.name, [body], if_absent=if_absent or is_first)

    async def _leaves_traces(self, attempt: str) -> bool:
        for name in (f"leases/{attempt}", f"snapshots/{attempt}"):
            try:
                await self._connector.stat(name)
            except NotFound:
                continue
            return True
        return any([True async for _ in self._connector.list(f"index/{attempt}-")])

    async def _check_owner(self, wanted: Addition, owner: str) -> None:
        """
        :raises NoRight: if the attempt is not this token's
        """
        _check_same(wanted, await to_thread.run_sync(self._attempts.owner, wanted.attempt), owner)


async def _check_pack(name: str, body: memoryview) -> None:
    """
    :raises NoRight: if it is no pack, or one of another name
    """
    digest: Callable[[], str] = partial(_hash, body)
    found = digest() if len(body) <= _HASHED_AT_ONCE_BYTES else await to_thread.run_sync(digest)
    if found != name.rpartition("/")[2]:
        raise NoRight(f"{name} is not the hash of what was sent: it was changed on the way, or is no pack")
    if body[:8] != MAGIC or len(body) < HEADER_BYTES or body[9:10] != PACK:
        raise NoRight(f"{name} does not begin as a pack does")


def _hash(body: memoryview) -> str:
    return blake3(body).hexdigest()


def _check_same(wanted: Addition, known: str, owner: str) -> None:
    if known != owner:
        raise _others(wanted)


def _others(wanted: Addition) -> NoRight:
    return NoRight(f"{wanted.name} is of an attempt that this append-only token did not begin")


def _refused(name: str, what: str) -> NoRight:
    folder = name.partition("/")[0]
    kind = f"{folder}/" if folder in _FOLDERS and folder != "config" else name
    return NoRight(
        f"an append-only token may not {what} {name if what == 'delete' else kind}: it adds packs, and index objects,"
        " snapshots and leases of its own attempts, and takes nothing away; that takes a full token"
    )
