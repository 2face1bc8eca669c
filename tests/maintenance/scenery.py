"""A repository of small chunks and packs."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

from tests.attempts.storage import Storage
from tests.harness import Program

from coffret.engine import configuration
from coffret.engine.records import ChunkerConfig
from coffret.engine.sealing import Secrets

if TYPE_CHECKING:
    from pathlib import Path

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


def with_garbage(home: Path) -> Program:
    """A repository without encryption, of whose two snapshots of `home`/source the first is removed."""
    program, source = Program(home), home / "source"
    program("create", "--no-encryption")
    source.mkdir()
    for _ in range(2):
        (source / "file").write_bytes(os.urandom(200_000))
        program("backup", source)
    program("rm", program("ls", "--json").of_type("item")[0]["snapshot_id"])
    return program
