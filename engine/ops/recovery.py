"""Recovery files: config and key slots of a repository as text, to be kept elsewhere, and the way back.

    some lines for people
    -----BEGIN COFFRET RECOVERY FILE-----
    base64 of: BLAKE3-256 of the rest (32 bytes) | JSON {version, config, slots}
    -----END COFFRET RECOVERY FILE-----

The slots stay wrapped by their passphrases. What lies in a repository whose config or `keys/` is lost can't be read by
anyone, with whatever passphrase.
"""

from __future__ import annotations

import base64
import enum
import textwrap
from typing import TYPE_CHECKING

import msgspec
from anyio import to_thread
from blake3 import blake3

from coffret.connectors.errors import AlreadyExists, NotFound
from coffret.engine.configuration import (
    CONFIG_NAME,
    clear_secrets,
    config_bytes,
    config_hash,
    parse_config,
    utc_now,
)
from coffret.engine.errors import (
    Damaged,
    NoRepository,
    RepositoryChanged,
    UnsupportedVersion,
    UsageError,
    WrongPassphrase,
)
from coffret.engine.keyring import put_slot, read_keyring
from coffret.engine.keys import unlock, wrap
from coffret.engine.ops.passphrases import describe_slot
from coffret.engine.records import FORMAT_VERSION

if TYPE_CHECKING:
    from coffret.connectors.base import Connector
    from coffret.engine.kdf import Cost
    from coffret.engine.records import Config
    from coffret.engine.sealing import Secrets

MAX_TEXT_BYTES = 1 << 20
_BEGIN, _END = "-----BEGIN COFFRET RECOVERY FILE-----", "-----END COFFRET RECOVERY FILE-----"
_HASH_BYTES = 32


class _State(enum.Enum):
    """Of the config in the repository."""

    INTACT, MISSING, DAMAGED = range(3)


class _Content(msgspec.Struct, frozen=True):
    """What a recovery file holds: the stored bytes of the config and of each live slot, by id."""

    version: int
    config: bytes
    slots: dict[str, bytes]


class Recovered(msgspec.Struct, frozen=True):
    """What was put back: the config or not, and the ids of the slots that were missing or damaged."""

    repository_id: str
    config: bool
    slots: list[str]


async def export(connector: Connector, config: bytes, secrets: Secrets) -> str:
    """The recovery file of a repository, ASCII but for the slots' labels. `config` is the stored object.

    Slots that are damaged, or that nobody with the repository's keys made, are left out.
    """
    parsed = parse_config(config)
    live = (await read_keyring(connector, config_hash(config))).live
    infos = [describe_slot(slot, data, secrets, config) for slot, data in live.items()]
    good = sorted((info for info in infos if not info.fault), key=lambda info: (info.created, info.slot_id))
    if parsed.encrypted:
        opens = [
            "It opens with these passphrases, as they were at that time:",
            *(f"  {info.slot_id[:8]}  {info.created}  {info.label}" for info in good),
            "Without one of them it is of no use to anybody.",
        ]
    else:
        opens = ["The repository has no encryption; this file holds the same keys, in clear, as its config."]
    content = _Content(FORMAT_VERSION, config, {info.slot_id: live[info.slot_id] for info in good})
    return "\n".join(
        [
            f"Recovery file of the coffret repository {parsed.repository_id}",
            f"as it was at {connector.location} on {utc_now()}.",
            "",
            "If the repository's config or key slots are lost or damaged, this puts them back:",
            "",
            "    coffret at REPO passphrase add --from THIS-FILE",
            "",
            "Keep it, on paper or on a disk, away from the repository. It holds no files, only what opens them.",
            *opens,
            "",
            _BEGIN,
            *textwrap.wrap(base64.b64encode(_packed(content)).decode(), 76),
            _END,
            "",
        ]
    )


async def recover(
    connector: Connector, text: str, passphrase: bytes | None, *, label: str, cost: Cost | None = None
) -> Recovered:
    """Put back what a repository lost, from its recovery file, once `passphrase` is shown to open that.

    A slot removed since stays removed, and is put back under a new id only where no other is left.

    :raises UsageError: if `text` is no recovery file, or the passphrase was removed since
    :raises Damaged: if the file is damaged, or a damaged config does not show that it is this repository's
    :raises WrongPassphrase: if the passphrase opens none of the file's slots, or none is given
    :raises RepositoryChanged: if the repository there has another config
    """
    content = _parse(text)
    config = parse_config(content.config)
    opened, secrets = await _open(content, config, passphrase)
    state = await _config_state(connector, config)
    put = await _put_slots(connector, content, secrets, opened, passphrase or b"", label=label, cost=cost)
    if state is not _State.INTACT:
        # Last: with its config the repository exists.
        await _put_config(connector, content.config, replace=state is _State.DAMAGED)
    return Recovered(config.repository_id, state is not _State.INTACT, put)


async def _open(content: _Content, config: Config, passphrase: bytes | None) -> tuple[str, Secrets]:
    """(slot id, keys) of a recovery file; the id is empty where there is no encryption."""
    if not config.encrypted:
        return "", clear_secrets(config)
    if passphrase is None:
        raise WrongPassphrase("the recovery file is protected by a passphrase and none was given")
    return await to_thread.run_sync(unlock, content.slots, passphrase, config_hash(content.config))


async def _put_slots(
    connector: Connector,
    content: _Content,
    secrets: Secrets,
    opened: str,
    passphrase: bytes,
    *,
    label: str,
    cost: Cost | None,
) -> list[str]:
    """Put back the slots that are missing or damaged; return their ids."""
    keyring = await read_keyring(connector, config_hash(content.config))
    good = [
        slot
        for slot, data in content.slots.items()
        if not describe_slot(slot, data, secrets, content.config).fault and slot not in keyring.removed
    ]
    slots = {slot: content.slots[slot] for slot in good if keyring.live.get(slot) != content.slots[slot]}
    if opened in keyring.removed:
        left = [
            slot for slot, data in keyring.live.items() if not describe_slot(slot, data, secrets, content.config).fault
        ]
        if left or good:
            raise UsageError(
                "this passphrase was removed from the repository after the recovery file was written",
                remedy="use one that was not",
            )
        slot, data = await to_thread.run_sync(
            lambda: wrap(secrets, passphrase, config_hash(content.config), label=label, cost=cost)
        )
        slots[slot] = data
    for slot, data in slots.items():
        await put_slot(connector, slot, data)
    return sorted(slots)


async def _config_state(connector: Connector, config: Config) -> _State:
    """What became of the config in the repository.

    :raises RepositoryChanged, Damaged: if another is there, or a damaged one that may be another's
    """
    try:
        there = await connector.get(CONFIG_NAME)
    except NotFound:
        return _State.MISSING
    if there == config_bytes(config):
        return _State.INTACT
    try:
        found = parse_config(there).repository_id
    except UnsupportedVersion:
        found = "of a newer version"
    except (Damaged, NoRepository):
        if config.repository_id.encode() in there:
            return _State.DAMAGED
        raise Damaged(
            "the config there is damaged and does not name the repository of the recovery file",
            remedy="if it is surely the right file, delete the object `config` there and run the command again",
        ) from None
    raise RepositoryChanged(
        f"the recovery file is of repository {config.repository_id}; the one there is {found}",
        remedy="use the recovery file of this repository",
    )


async def _put_config(connector: Connector, config: bytes, *, replace: bool) -> None:
    try:
        await connector.put(CONFIG_NAME, [config], if_absent=not replace)
    except AlreadyExists:
        if await connector.get(CONFIG_NAME) != config:
            raise RepositoryChanged("another repository was created there at this moment") from None


def _packed(content: _Content) -> bytes:
    body = msgspec.json.encode(content)
    return blake3(body).digest() + body


def _parse(text: str) -> _Content:
    """The content of a recovery file, wherever in a text it stands, however its lines are broken or indented.

    :raises UsageError: if there is none
    :raises Damaged: if it is not as it was written
    :raises UnsupportedVersion: if a newer version wrote it
    """
    begin, end = text.find(_BEGIN), text.find(_END)
    if begin < 0 or len(text) > MAX_TEXT_BYTES:
        raise UsageError("the file is no recovery file", remedy="give one written by `passphrase export`")
    damaged = Damaged("the recovery file is damaged", remedy="copy it again from where it is kept, all of it")
    if end < begin:
        raise damaged
    try:
        data = base64.b64decode("".join(text[begin + len(_BEGIN) : end].split()), validate=True)
        if blake3(data[_HASH_BYTES:]).digest() != data[:_HASH_BYTES]:
            raise damaged
        content = msgspec.json.decode(data[_HASH_BYTES:], type=_Content, strict=True)
    except (ValueError, RecursionError):  # base64's and msgspec's are ValueErrors
        raise damaged from None
    if content.version != FORMAT_VERSION:
        raise UnsupportedVersion(f"the recovery file has format version {content.version}")
    return content
