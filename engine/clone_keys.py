"""What lies in `keys/`, copied as it is: the slots that are live, and the log of those removed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from coffret.connectors.errors import AlreadyExists, NotFound
from coffret.engine.copier import used_by_itself
from coffret.engine.errors import CoffretError, Damaged
from coffret.engine.keyring import MAX_REMOVAL_BYTES, parse_removal, put_slot, read_keyring, slot_name
from coffret.engine.keys import parse_slot
from coffret.engine.objects import list_objects, put_once, read_listed

if TYPE_CHECKING:
    from coffret.connectors.base import Connector
    from coffret.engine.copier import Copier

# Passphrases that change meanwhile are read again; a storage that never comes to rest is not obeyed.
_TRIES = 20
_RECOVER = "put the key slots back from a recovery file: `coffret at REPO passphrase add --from FILE`"


async def copy_keys(source: Connector, target: Connector, copier: Copier) -> None:
    """Copy what opens a repository, so that both open by the same passphrases, as of one moment.

    A slot that is logged as removed is not copied, though it may still be there: it opens nothing.

    :raises Damaged: if there is no slot that could open the copy
    :raises UsageError: if the log of removed slots is another in the copy
    """
    known = {info.name for info in await list_objects(target, "keys/")}
    for _ in range(_TRIES):
        keyring = await read_keyring(source)
        slots = {slot: data for slot, data in keyring.live.items() if _is_whole(slot, data, copier)}
        if not slots:
            raise Damaged("the repository is encrypted, and none of its key slots is whole", remedy=_RECOVER)
        for slot, data in slots.items():
            if slot_name(slot) not in known:
                await put_slot(target, slot, data)
                copier.count(slot_name(slot), len(data))
                known.add(slot_name(slot))
        removals = await _removals(source, copier)
        for name, data in removals.items():
            if name not in known:
                await _put_removal(target, name, data)
                copier.count(name, len(data))
                known.add(name)
        after = await read_keyring(source)
        if (after.live.keys(), after.last) == (keyring.live.keys(), keyring.last):
            return
    raise Damaged("the repository's key slots change without end")


async def check_removals(source: Connector, target: Connector) -> None:
    """See that the logs of removed slots agree as far as both go.

    :raises UsageError: if they don't: each is numbered, and passphrases were removed here and there
    """
    theirs = {info.name: info for info in await list_objects(target, "keys/removed-")}
    for info in await list_objects(source, "keys/removed-"):
        with suppress(NotFound, Damaged):  # what is damaged is told when it is copied
            if info.name not in theirs:
                continue
            mine = await read_listed(source, info, MAX_REMOVAL_BYTES)
            differs = mine != await read_listed(target, theirs[info.name], MAX_REMOVAL_BYTES)
            if differs and parse_removal(mine, info.name) is not None:
                raise used_by_itself(target, info.name)


def _is_whole(slot: str, data: bytes, copier: Copier) -> bool:
    try:
        parse_slot(slot, data)
    except CoffretError as error:
        copier.report(slot_name(slot), str(error))
        return False
    return True


async def _removals(source: Connector, copier: Copier) -> dict[str, bytes]:
    """The log, oldest first, as far as it is whole."""
    found: dict[str, bytes] = {}
    listed = await list_objects(source, "keys/removed-")
    for info in sorted(listed, key=lambda info: (len(info.name), info.name)):
        try:
            data = await read_listed(source, info, MAX_REMOVAL_BYTES)
        except NotFound:
            continue
        except Damaged as error:
            copier.report(info.name, str(error).removeprefix(f"{info.name}: "))
            continue
        if parse_removal(data, info.name) is None:
            copier.report(info.name, "the log of removed key slots is not what was stored")
        else:
            found[info.name] = data
    return found


async def _put_removal(target: Connector, name: str, data: bytes) -> None:
    try:
        await put_once(target, name, data)
    except AlreadyExists:
        raise used_by_itself(target, name) from None
