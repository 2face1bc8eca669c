"""The passphrases of a repository: listed, added, changed and removed, by any number of hosts at once.

Removing never leaves none. Whoever removes a slot reads the keyring, with the last removal n, and decides by that; then
the name `keys/removed-<n+1>` goes to one remover alone, so what it decided by was still so. All others find the name
taken, and decide anew. The slot is deleted after it is logged; if a remover dies in between, the slot is no longer
accepted, and the next removal deletes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from anyio import to_thread

from coffret.engine.configuration import config_hash
from coffret.engine.errors import Damaged, LeaseLost, UnsupportedVersion, UsageError
from coffret.engine.keyring import log_removal, put_slot, read_keyring, slot_name
from coffret.engine.keys import MAX_SLOTS, endorsed, parse_slot, wrap

if TYPE_CHECKING:
    from coffret.connectors.base import Connector
    from coffret.engine.kdf import Cost
    from coffret.engine.keyring import Keyring
    from coffret.engine.sealing import Secrets

# Half of what is read: hosts that add at the same time can't lock everybody out.
_ENOUGH_SLOTS = MAX_SLOTS // 2
# Every lost race is another host's success: this many in a row mean that something else is wrong.
_TRIES = 100


class SlotInfo(msgspec.Struct, frozen=True):
    """A live slot, for users. `fault`: why it can't be used, or "" if all is well with it."""

    slot_id: str
    label: str = ""
    created: str = ""
    fault: str = ""


async def list_slots(connector: Connector, config: bytes, secrets: Secrets) -> list[SlotInfo]:
    """The live slots, oldest first, with what is wrong with each. `config` is the stored object."""
    live = (await read_keyring(connector, config_hash(config))).live
    infos = [describe_slot(slot, data, secrets, config) for slot, data in live.items()]
    return sorted(infos, key=lambda info: (info.created, info.slot_id))


async def add(
    connector: Connector, config: bytes, secrets: Secrets, passphrase: bytes, *, label: str, cost: Cost | None = None
) -> str:
    """Let `passphrase` open the repository too; return the new slot's id.

    :raises UsageError: if the repository has no encryption, the passphrase is empty, or there are too many already
    """
    if not secrets.data_key:
        raise UsageError("the repository has no encryption, and so no passphrase", remedy="")
    if len((await read_keyring(connector, config_hash(config))).live) >= _ENOUGH_SLOTS:
        raise UsageError(f"the repository has {_ENOUGH_SLOTS} passphrases already", remedy="remove one of them first")
    slot, data = await to_thread.run_sync(
        lambda: wrap(secrets, passphrase, config_hash(config), label=label, cost=cost)
    )
    await put_slot(connector, slot, data)
    return slot


async def change(
    connector: Connector,
    config: bytes,
    secrets: Secrets,
    old: str,
    passphrase: bytes,
    *,
    label: str,
    cost: Cost | None = None,
    exclusive: bool = False,
) -> str:
    """Put a slot for `passphrase` in the place of slot `old`; return the new one's id. Interrupted, both open.

    :raises UsageError: as `add` and `remove` do
    """
    _check_storage(connector, exclusive)
    slot = await add(connector, config, secrets, passphrase, label=label, cost=cost)
    await remove(connector, config, secrets, old, exclusive=exclusive)
    return slot


async def remove(connector: Connector, config: bytes, secrets: Secrets, slot: str, *, exclusive: bool = False) -> None:
    """Make a slot open nothing any more; no error if another remover was first.

    Of those left, one at least is endorsed by the repository's keys: a slot that the storage planted does not count.
    `exclusive`: the user vouches that no one else removes, where the storage can't tell.

    :raises UsageError: if there is no such slot, or it is the last
    :raises Damaged: if what was removed before can't be read
    :raises LeaseLost: if others are always first
    """
    _check_storage(connector, exclusive)
    for _ in range(_TRIES):
        keyring = await read_keyring(connector, config_hash(config))
        if keyring.log_damaged:
            raise Damaged(f"keys/removed-{keyring.last} is damaged: what was removed before can't be told")
        if slot not in keyring.removed:
            _check_removable(keyring, slot, secrets, config)
            if not await log_removal(connector, keyring, slot, config_hash(config)):
                continue
        for name in sorted({*keyring.undeleted, slot}):
            await connector.delete(slot_name(name))
        return
    raise LeaseLost("other hosts are removing passphrases without end")


def find_slot(keyring: Keyring, prefix: str) -> str:
    """The id of the one live slot that starts with `prefix`.

    :raises UsageError: if there is none, or more than one
    """
    found = [slot for slot in keyring.live if slot.startswith(prefix.lower())]
    if len(found) != 1:
        several = "more than one key slot starts" if found else "no key slot starts"
        raise UsageError(f"{several} with {prefix!r}", remedy="see `coffret at REPO passphrase list`")
    return found[0]


def describe_slot(slot: str, data: bytes, secrets: Secrets, config: bytes) -> SlotInfo:
    """What a slot says of itself, and what is wrong with it."""
    try:
        parsed = parse_slot(slot, data)
    except (Damaged, UnsupportedVersion) as error:
        return SlotInfo(slot, fault=str(error))
    good = endorsed(parsed, secrets, config_hash(config))
    return SlotInfo(
        slot, parsed.label, parsed.created, "" if good else "made by someone who could not open this repository"
    )


def _check_storage(connector: Connector, exclusive: bool) -> None:
    if not connector.capabilities.exclusive_puts and not exclusive:
        raise UsageError(
            "this storage has no put-if-absent: two removals at the same time could leave no passphrase",
            remedy="make sure that no other host removes one, and say --exclusive",
        )


def _check_removable(keyring: Keyring, slot: str, secrets: Secrets, config: bytes) -> None:
    if slot not in keyring.live:
        raise UsageError(f"there is no key slot {slot[:8]}", remedy="see `coffret at REPO passphrase list`")
    left = (describe_slot(name, data, secrets, config) for name, data in keyring.live.items() if name != slot)
    if all(info.fault for info in left):
        raise UsageError(
            "it is the last passphrase that opens the repository",
            remedy="add another first, or use `passphrase change`",
        )
