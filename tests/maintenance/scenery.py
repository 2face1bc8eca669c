"""A repository of small chunks and packs."""

from __future__ import annotations

import random

from tests.attempts.storage import Storage

from coffret.engine import configuration
from coffret.engine.records import ChunkerConfig
from coffret.engine.sealing import Secrets

#: Contents that have nothing in common.
PIECES = [random.Random(number).randbytes(2000) for number in range(6)]


def small_storage(like: Storage | None = None) -> Storage:
    """A storage in memory, of which a few kilobytes make several chunks; `like` another, chunks have the same ids."""
    storage = Storage()
    if like is not None:
        storage.secrets = Secrets(storage.secrets.data_key, like.secrets.id_key, like.secrets.chunker_key)
    chunker = ChunkerConfig(min_bytes=64, avg_bytes=256, max_bytes=1024)
    storage.config = configuration.new_config(storage.secrets, chunker=chunker, pack_bytes=2 << 20)
    return storage
