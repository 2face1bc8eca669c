"""A repository's keys for tests: five slots, `passphrase 0` to `passphrase 4`, and one that somebody planted."""

from __future__ import annotations

from coffret.connectors.base import Connector
from coffret.connectors.memory import MemoryConnector
from coffret.engine.configuration import config_bytes, config_hash, new_config
from coffret.engine.errors import (
    WrongPassphrase,
)
from coffret.engine.keyring import put_slot, read_keyring
from coffret.engine.keys import Cost, new_secrets, unlock, wrap

CHEAP = Cost(memory_kib=32, passes=1, lanes=1)
SECRETS = new_secrets(encrypted=True)
CONFIG = config_bytes(new_config(SECRETS))
HASH = config_hash(CONFIG)
SLOTS = dict(wrap(SECRETS, b"passphrase %d" % n, HASH, label=f"host{n}", cost=CHEAP) for n in range(5))
IDS = list(SLOTS)
FOREIGN_ID, FOREIGN = wrap(new_secrets(encrypted=True), b"passphrase 0", HASH, label="planted", cost=CHEAP)


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
