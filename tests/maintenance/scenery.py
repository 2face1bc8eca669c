"""A repository of small chunks and packs."""

from __future__ import annotations

import random

from tests.attempts.storage import Storage

from coffret.engine import configuration
from coffret.engine.records import ChunkerConfig

#: Contents that have nothing in common.
PIECES = [random.Random(number).randbytes(2000) for number in range(6)]


def small_storage() -> Storage:
    """A storage in memory, of which a few kilobytes make several chunks."""
    storage = Storage()
    chunker = ChunkerConfig(min_bytes=64, avg_bytes=256, max_bytes=1024)
    storage.config = configuration.new_config(storage.secrets, chunker=chunker, pack_bytes=2 << 20)
    return storage
