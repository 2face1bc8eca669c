"""Key slots: a repository's keys wrapped by a passphrase, one slot for each passphrase.

    passphrase ─► Argon2id ─► 64 bytes ─► first half: key-encryption key ─► AES-256-GCM ─► data | chunk id | chunker key
                                        └► second half ─► BLAKE3 ─► commitment

* A slot is named by the BLAKE3-256 of its bytes: damage shows without a passphrase.
* The *commitment* tells a wrong passphrase from altered data; no slot can be made that opens under two passphrases.
* The hash of the config and what the slot holds in clear are authenticated: a slot opens beside its config only.
* The *endorsement*, a hash keyed by the data key, shows whoever has opened the repository which slots were made by
  someone who had. A slot planted by the storage is not counted as a way in when another is removed.

Pure: bytes in, bytes out; no storage and no event loop. `wrap` and `unlock` take 0.2 s a slot: call them in a thread.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from coffret.engine import kdf
from coffret.engine.configuration import utc_now
from coffret.engine.errors import (
    CoffretError,
    Damaged,
    RepositoryChanged,
    UnsupportedVersion,
    UsageError,
    WrongPassphrase,
)
from coffret.engine.kdf import KEY_BYTES, SALT_BYTES, Cost, DerivedKeys, KdfParameters
from coffret.engine.records import FORMAT_VERSION
from coffret.engine.sealing import Secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NONCE_BYTES, WRAPPED_BYTES = 12, 3 * 32 + 16
KDF = "argon2id"
# A slot has about 600 bytes and an opening tries every slot: both ceilings are far beyond use, and stop a hostile
# storage from taking hours.
MAX_SLOT_BYTES, MAX_SLOTS, MAX_LABEL = 4 << 10, 64, 200
_ENDORSEMENT = "coffret 2026 key slot endorsement"
_BOUND = b"coffret key slot\0"
_RECOVER = "put the key slots back from a recovery file: `coffret at REPO passphrase add --from FILE`"


class Slot(msgspec.Struct, frozen=True):
    """`keys/<id>`, one line of JSON, bytes in base64. `created` is UTC, `label` what users know it by."""

    version: int
    kdf: str
    memory_kib: int
    passes: int
    lanes: int
    salt: bytes
    created: str
    label: str
    commitment: bytes = b""
    nonce: bytes = b""
    wrapped: bytes = b""
    endorsement: bytes = b""

    @property
    def cost(self) -> Cost:
        """What deriving its keys takes."""
        return Cost(self.memory_kib, self.passes, self.lanes)

    @property
    def kdf_parameters(self) -> KdfParameters:
        """What they are derived from beside the passphrase."""
        return KdfParameters(self.salt, self.cost)


class _Head(msgspec.Struct):
    """What every version of a slot has."""

    version: int


def new_secrets(*, encrypted: bool) -> Secrets:
    """Random keys for a new repository."""
    data_key = os.urandom(KEY_BYTES) if encrypted else b""
    return Secrets(data_key, os.urandom(KEY_BYTES), os.urandom(KEY_BYTES))


def wrap(
    secrets: Secrets,
    passphrase: bytes,
    config_hash: bytes,
    *,
    label: str,
    cost: Cost | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
    created: str = "",
) -> tuple[str, bytes]:
    """A new slot, as (id, stored bytes), that opens with `passphrase` (UTF-8 as it is) beside this config.

    `cost`, `entropy` and `created` are given by tests alone. Characters of `label` that do not print are replaced.

    :raises UsageError: if the passphrase is empty
    """
    if not passphrase:
        raise UsageError("the passphrase is empty")
    label = "".join(c if c.isprintable() else "?" for c in label[:MAX_LABEL])
    salt, nonce = entropy(SALT_BYTES), entropy(NONCE_BYTES)
    slot = Slot(FORMAT_VERSION, KDF, *(cost or Cost()), salt, created or utc_now(), label)
    derived = kdf.derive(slot.kdf_parameters, passphrase)
    slot = msgspec.structs.replace(slot, commitment=derived.commitment, nonce=nonce)
    bundle = secrets.data_key + secrets.id_key + secrets.chunker_key
    wrapped = AESGCM(derived.key).encrypt(nonce, bundle, _bound(slot, config_hash))
    slot = msgspec.structs.replace(slot, wrapped=wrapped)
    data = _encode(msgspec.structs.replace(slot, endorsement=_endorse(slot, secrets, config_hash)))
    return slot_id_of(data), data


def slot_id_of(data: bytes) -> str:
    """The id of a slot with these bytes."""
    return blake3(data).hexdigest()


def parse_slot(slot_id: str, data: bytes) -> Slot:
    """The slot stored as `keys/<slot_id>`, before any passphrase; nothing that is absurd comes through.

    :raises Damaged: if it is not what was stored there, or asks for more memory or time than any that is made
    :raises UnsupportedVersion: if a newer version made it
    """
    if len(data) > MAX_SLOT_BYTES or slot_id_of(data) != slot_id:
        raise Damaged(f"key slot {slot_id[:8]} is cut short or altered", remedy=_RECOVER)
    try:
        version = msgspec.json.decode(data, type=_Head).version
        if version != FORMAT_VERSION:
            raise UnsupportedVersion(f"key slot {slot_id[:8]} has format version {version}")
        slot = msgspec.json.decode(data, type=Slot, strict=True)
    except (ValueError, RecursionError):
        raise Damaged(f"key slot {slot_id[:8]} is no key slot", remedy=_RECOVER) from None
    if slot.kdf != KDF:
        raise UnsupportedVersion(f"key slot {slot_id[:8]} uses {slot.kdf!r}, which this version does not know")
    lengths = tuple(map(len, (slot.salt, slot.commitment, slot.nonce, slot.wrapped, slot.endorsement)))
    if (
        _encode(slot) != data
        or lengths != (SALT_BYTES, KEY_BYTES, NONCE_BYTES, WRAPPED_BYTES, KEY_BYTES)
        or not (slot.label + slot.created).isprintable()
    ):
        raise Damaged(f"key slot {slot_id[:8]} is no key slot", remedy=_RECOVER)
    if not kdf.is_sane(slot.cost):
        cost = f"{slot.memory_kib} KiB × {slot.passes}"
        raise Damaged(f"key slot {slot_id[:8]} asks for absurd memory or time: {cost}", remedy=_RECOVER)
    return slot


def unlock(
    slots: Mapping[str, bytes],
    passphrase: bytes,
    config_hash: bytes,
    likely: str = "",
    derived: DerivedKeys | None = None,
) -> tuple[str, Secrets]:
    """Try the slots, the `likely` one and then the cheapest first; return (slot id, keys) of the first that opens.

    `derived`: from the same passphrase, before it was known which slots there are.

    :raises WrongPassphrase: if none is for this passphrase
    :raises RepositoryChanged: if one is, and was altered or made for another config
    :raises Damaged: if all slots are damaged, or there is none
    :raises UnsupportedVersion: if all slots that are not damaged are of a newer version
    """
    if len(slots) > MAX_SLOTS:
        raise Damaged(f"the repository has {len(slots)} key slots, more than {MAX_SLOTS}")
    found: dict[str, Slot] = {}
    faults: list[CoffretError] = []
    for slot_id, data in slots.items():
        try:
            found[slot_id] = parse_slot(slot_id, data)
        except (Damaged, UnsupportedVersion) as error:
            faults.append(error)
    changed: RepositoryChanged | None = None
    for slot_id in sorted(found, key=lambda name: (name != likely, found[name].cost, name)):
        try:
            return slot_id, unwrap(found[slot_id], passphrase, config_hash, derived)
        except WrongPassphrase:
            continue
        except RepositoryChanged as error:
            changed = error
    if changed is not None:
        raise changed
    if found:
        none = f"the passphrase opens none of the repository's {len(found)} key slots"
        if faults:
            none += f" ({len(faults)} more can't be read: {faults[0]})"
            raise WrongPassphrase(none, remedy=f"check it; if it belongs to one that can't be read, {_RECOVER}")
        raise WrongPassphrase(none)
    newer = [fault for fault in faults if isinstance(fault, UnsupportedVersion)]
    raise (newer or faults or [Damaged("the repository is encrypted and has no key slot", remedy=_RECOVER)])[0]


def unwrap(slot: Slot, passphrase: bytes, config_hash: bytes, derived: DerivedKeys | None = None) -> Secrets:
    """The keys in one slot. `derived` from the same passphrase are used if the slot has their parameters.

    :raises WrongPassphrase: if it is for another passphrase
    :raises RepositoryChanged: if it is for this one, but it was altered or made for another config
    """
    if derived is None or derived.parameters != slot.kdf_parameters:
        derived = kdf.derive(slot.kdf_parameters, passphrase)
    if derived.commitment != slot.commitment:
        raise WrongPassphrase("the passphrase is not that of the key slot")
    clear = msgspec.structs.replace(slot, wrapped=b"", endorsement=b"")
    try:
        bundle = AESGCM(derived.key).decrypt(slot.nonce, slot.wrapped, _bound(clear, config_hash))
    except InvalidTag:
        raise RepositoryChanged(
            "the passphrase is right, but the repository's config or key slot is not the one it was set for",
            remedy="do not trust this storage; put both back from a recovery file (`passphrase add --from FILE`)",
        ) from None
    return Secrets(*(bundle[at : at + KEY_BYTES] for at in range(0, len(bundle), KEY_BYTES)))


def endorsed(slot: Slot, secrets: Secrets, config_hash: bytes) -> bool:
    """Whether a slot was made, for this config, by someone who had the repository's keys."""
    return _endorse(msgspec.structs.replace(slot, endorsement=b""), secrets, config_hash) == slot.endorsement


def _encode(slot: Slot) -> bytes:
    return msgspec.json.encode(slot) + b"\n"


def _bound(slot: Slot, config_hash: bytes) -> bytes:
    """What is authenticated with the keys: the config, and the slot as far as it is filled."""
    return _BOUND + config_hash + _encode(slot)


def _endorse(slot: Slot, secrets: Secrets, config_hash: bytes) -> bytes:
    key = blake3(secrets.data_key, derive_key_context=_ENDORSEMENT).digest()
    return blake3(_bound(slot, config_hash), key=key).digest()
