"""A repository's keys for tests: five slots, `passphrase 0` to `passphrase 4`, and one that somebody planted."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from coffret.connectors.memory import MemoryConnector
from coffret.engine.configuration import config_bytes, config_hash, new_config
from coffret.engine.errors import WrongPassphrase
from coffret.engine.kdf import Cost
from coffret.engine.keyring import put_slot, read_keyring
from coffret.engine.keys import unlock, wrap
from coffret.engine.sealing import Secrets

if TYPE_CHECKING:
    from coffret.connectors.base import Connector

CHEAP = Cost(memory_kib=32, passes=1, lanes=1)
# Not random, so that what a property test finds is found again.
_entropy = random.Random(0).randbytes
SECRETS = Secrets(b"d" * 32, b"i" * 32, b"c" * 32)
CONFIG = config_bytes(new_config(SECRETS, entropy=_entropy, created="2026-01-02T03:04:05Z"))
HASH = config_hash(CONFIG)


def _slot(secrets: Secrets, number: int, label: str) -> tuple[str, bytes]:
    created = f"2026-01-02T03:04:{number:02}Z"
    return wrap(secrets, b"passphrase %d" % number, HASH, label=label, cost=CHEAP, entropy=_entropy, created=created)


SLOTS = dict(_slot(SECRETS, number, f"host{number}") for number in range(5))
IDS = list(SLOTS)
FOREIGN_ID, FOREIGN = _slot(Secrets(b"x" * 32, b"y" * 32, b"z" * 32), 0, "planted")


async def repository(count: int = 2) -> MemoryConnector:
    """A repository with that many passphrases."""
    connector = MemoryConnector()
    await connector.put("config", [CONFIG])
    for slot in IDS[:count]:
        await put_slot(connector, slot, SLOTS[slot])
    return connector


async def opens(connector: Connector, passphrase: bytes) -> bool:
    try:
        return unlock((await read_keyring(connector)).live, passphrase, HASH)[1] == SECRETS
    except WrongPassphrase:
        return False
