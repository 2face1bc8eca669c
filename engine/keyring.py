"""`keys/` of a repository: the slots that may be tried, and the log of those removed.

    keys/<id>             a key slot (`engine.keys`), named by the hash of its bytes
    keys/removed-<n>      the n-th removal: every slot removed until then. Put if absent, and never deleted

A slot is *live* while it is there and the last removal does not name it: one that is logged and not deleted yet opens
nothing. How this makes removals safe from each other is told in `engine.ops.passphrases`.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec
from blake3 import blake3

from coffret.connectors.errors import AlreadyExists, ConnectorError, NotFound
from coffret.engine.configuration import utc_now
from coffret.engine.errors import Damaged
from coffret.engine.flow import together
from coffret.engine.keys import MAX_SLOT_BYTES, MAX_SLOTS
from coffret.engine.objects import list_objects
from coffret.engine.records import FORMAT_VERSION

if TYPE_CHECKING:
    from coffret.connectors.base import Connector, ObjectInfo

_FOLDER = "keys/"
_SLOT = re.compile(r"keys/([0-9a-f]{64})")
_REMOVAL = re.compile(r"keys/removed-([1-9][0-9]{0,5})")
# One removal a day for 270 years; each adds 67 bytes to those after it.
_MAX_REMOVALS, MAX_REMOVAL_BYTES = 99_999, 8 << 20
# Slots that vanish while they are read are listed again; a storage that never comes to rest is not obeyed.
_TRIES = 20


class Removal(msgspec.Struct, frozen=True):
    """`keys/removed-<n>`, one line of JSON: all slots removed until then. The nonce makes each put's bytes its own.

    `number`: n; `config`: the hash of the config (hex) of the repository that it belongs to.
    """

    version: int
    created: str
    number: int
    config: str
    nonce: bytes
    removed: list[str]
    checksum: bytes = b""


class Keyring(msgspec.Struct, frozen=True):
    """What `keys/` holds: the bytes of `live` slots by id; slots ever `removed`; those of them that are still there.

    `last` is the number of the last removal. If that can't be read, `removed` is what an earlier one says, and
    `log_damaged` is set: reading goes on, since a damaged log must not lock everybody out; removing does not.
    `log_config` is the hash of the config (hex) that the log belongs to, by itself; "" without a log.
    """

    live: dict[str, bytes]
    removed: frozenset[str]
    undeleted: frozenset[str]
    last: int
    log_damaged: bool
    log_config: str = ""


async def read_keyring(connector: Connector, config_hash: bytes | None = None, *, likely: str = "") -> Keyring:
    """The key slots as they are now; `live` is what `keys.unlock` may try.

    `config_hash`: that of the repository's config: a removal of another repository counts as damaged. `likely`: the id
    of one that may be among them: it is asked for beside the listing.

    :raises Damaged: if there are more slots than any repository has
    """
    guessed: dict[str, bytes] = {}

    async def guess() -> None:
        if _SLOT.fullmatch(slot_name(likely)):
            with contextlib.suppress(ConnectorError):
                guessed[likely] = await connector.peek(slot_name(likely), MAX_SLOT_BYTES + 1)

    for number in range(_TRIES):
        found, _ = await together(
            partial(list_objects, connector, _FOLDER), guess if number == 0 else partial(anyio.sleep, 0)
        )
        slots = {match[1]: info for info in found if (match := _SLOT.fullmatch(info.name))}
        removals = {int(match[1]): info for info in found if (match := _REMOVAL.fullmatch(info.name))}
        last = max(removals, default=0)
        log, intact = await _last_removal(connector, removals, config_hash)
        removed = frozenset(log.removed) if log is not None else frozenset()
        if len(slots.keys() - removed) > MAX_SLOTS:
            raise Damaged(f"the repository has more than {MAX_SLOTS} key slots")
        live = await _fetch(connector, {slot: info for slot, info in slots.items() if slot not in removed}, guessed)
        if len(live) == len(slots.keys() - removed):
            damaged, of = not intact or last > _MAX_REMOVALS, log.config if log is not None else ""
            return Keyring(live, removed, removed & slots.keys(), last, damaged, of)
    raise Damaged("the repository's key slots change without end")


async def put_slot(connector: Connector, slot: str, data: bytes) -> None:
    """Store a slot; if its name is taken, then by the same bytes, since they name it, or by damaged ones."""
    try:
        await connector.put(slot_name(slot), [data], if_absent=True)
    except AlreadyExists:
        # Not found: removed, and deleted, since. A slot that is logged as removed opens nothing, put back or not.
        with contextlib.suppress(NotFound):
            if await connector.get(slot_name(slot)) != data:
                await connector.put(slot_name(slot), [data])


async def log_removal(connector: Connector, keyring: Keyring, slot: str, config_hash: bytes) -> bool:
    """Log that `slot` is removed, if nothing was removed since `keyring` was read; tell whether it is logged.

    `config_hash`: that of the repository's config.
    """
    removed = sorted({*keyring.removed, slot})
    number = keyring.last + 1
    removal = Removal(FORMAT_VERSION, utc_now(), number, config_hash.hex(), os.urandom(16), removed)
    body = msgspec.json.encode(msgspec.structs.replace(removal, checksum=_checksum(removal))) + b"\n"
    try:
        await connector.put(f"{_FOLDER}removed-{number}", [body], if_absent=True)
    except AlreadyExists:
        return False
    return True


def slot_name(slot: str) -> str:
    """The object name of a slot."""
    return f"{_FOLDER}{slot}"


async def _fetch(connector: Connector, slots: dict[str, ObjectInfo], guessed: dict[str, bytes]) -> dict[str, bytes]:
    """The bytes of those slots that are still there; of one that is too long, enough to see that."""
    fetched: dict[str, bytes] = {}

    async def fetch(slot: str, info: ObjectInfo) -> None:
        if len(guessed.get(slot, b"")) == info.size_bytes:
            fetched[slot] = guessed[slot]
            return
        try:
            fetched[slot] = await connector.get(info.name, length=min(info.size_bytes, MAX_SLOT_BYTES + 1))
        except NotFound:
            return

    async with anyio.create_task_group() as group:
        for slot, info in slots.items():
            group.start_soon(fetch, slot, info)
    return fetched


async def _last_removal(
    connector: Connector, removals: dict[int, ObjectInfo], config_hash: bytes | None
) -> tuple[Removal | None, bool]:
    """The last removal that is intact, and of this repository, and whether that is the last of all."""
    intact = True
    for number in sorted(removals, reverse=True):
        info = removals[number]
        try:
            data = await connector.get(info.name, length=min(info.size_bytes, MAX_REMOVAL_BYTES))
        except NotFound:
            data = b""
        removal = parse_removal(data, info.name)
        if removal is not None and (config_hash is None or removal.config == config_hash.hex()):
            return removal, intact
        intact = False
    return None, intact


def _checksum(removal: Removal) -> bytes:
    return blake3(msgspec.json.encode(msgspec.structs.replace(removal, checksum=b""))).digest()


def parse_removal(data: bytes, name: str) -> Removal | None:
    """The removal in an object of this name, or None if it is not what was put there."""
    try:
        removal = msgspec.json.decode(data, type=Removal, strict=True)
    except (ValueError, RecursionError):
        return None
    is_it = name == f"{_FOLDER}removed-{removal.number}" and removal.checksum == _checksum(removal)
    return removal if is_it else None
