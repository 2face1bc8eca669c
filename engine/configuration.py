"""`config`: what never changes in a repository, as one line of JSON, made once and read with ceilings.

The repository id certifies the rest: its first half is random, its second half a hash of that and of everything else
in the config. So no two configs share an id, damage shows without a key even where nothing is encrypted, and whoever
compares the id (`--expect-id`) has compared encryption flag, chunker and sizes with it. The bytes are canonical: the
hash of the file, which is bound into every key slot and pinned by each machine, stands for its content and vice versa.

Pure: bytes in, bytes out.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from coffret.engine.chunker import check_parameters
from coffret.engine.errors import CoffretError, Damaged, NoRepository, UnsupportedVersion, UsageError
from coffret.engine.records import FORMAT_VERSION, ID_BYTES, ChunkerConfig, Config
from coffret.engine.sealing import Secrets
from coffret.engine.settings import BLOCK_BYTES, MIB, PACK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG_NAME = "config"
AES256_GCM, NO_ENCRYPTION = "aes256-gcm", "none"
BLAKE3_256 = "blake3-256"
# A config has about 300 bytes: no storage can make us read more than this.
MAX_CONFIG_BYTES = 16 << 10
# A pack must hold two of the largest blocks; a buffer of this size is taken several times over.
MIN_PACK_BYTES, MAX_PACK_BYTES = 2 * BLOCK_BYTES, 256 * MIB
_START = b'{"version":'
_NONCE_DIGITS = ID_BYTES
_CONTEXT = "coffret 2026 repository id of a config"
_REMEDY = (
    "put back the config that was written at `create`: recovery files hold it "
    "(`coffret at REPO passphrase add --from FILE`)"
)

_UNSETTLED = (
    "it is of before the first release: restore with the program that made it, and back up into a new repository"
)


class _Head(msgspec.Struct):
    """What every version of a config has."""

    version: int


def new_config(
    secrets: Secrets,
    *,
    chunker: ChunkerConfig | None = None,
    pack_bytes: int = PACK_BYTES,
    entropy: Callable[[int], bytes] = os.urandom,
    created: str = "",
) -> Config:
    """The config of a new repository with these keys: one with encryption where there is a data key.

    `entropy` and `created` (UTC, ISO 8601 to the second) are given by tests alone.

    :raises UsageError: if chunk or pack sizes (bytes) make no sense
    """
    encrypted = bool(secrets.data_key)
    nonce = entropy(ID_BYTES // 2).hex()
    config = Config(
        version=FORMAT_VERSION,
        repository_id=nonce,
        encryption=AES256_GCM if encrypted else NO_ENCRYPTION,
        hash=BLAKE3_256,
        chunker=chunker or ChunkerConfig(),
        pack_bytes=pack_bytes,
        created=created or utc_now(),
        id_key="" if encrypted else secrets.id_key.hex(),
        chunker_key="" if encrypted else secrets.chunker_key.hex(),
    )
    try:
        _check_values(config)
    except CoffretError as error:
        raise UsageError(str(error)) from None
    return msgspec.structs.replace(config, repository_id=_certified(config, nonce))


def config_bytes(config: Config) -> bytes:
    """The one form of a config as it is stored."""
    return msgspec.json.encode(config) + b"\n"


def config_hash(data: bytes) -> bytes:
    """BLAKE3-256 of a stored config: what key slots and pins are bound to."""
    return blake3(data).digest()


def parse_config(data: bytes) -> Config:
    """The config in an object named `config`; nothing that is absurd comes through.

    :raises NoRepository: if it is not coffret's at all
    :raises UnsupportedVersion: if a newer version wrote it
    :raises Damaged: if it is not what was written at `create`
    """
    try:
        if len(data) > MAX_CONFIG_BYTES:
            raise msgspec.ValidationError("too long")
        version = msgspec.json.decode(data, type=_Head).version
        if version == FORMAT_VERSION:
            config = msgspec.json.decode(data, type=Config, strict=True)
    except (ValueError, RecursionError):  # msgspec's errors, and those of Python's that it lets through
        # Two marks, far apart, so that no single damage makes a repository look like something else.
        if not _START.startswith(data[: len(_START)]) and b'"repository_id":' not in data:
            raise NoRepository("what stands there has a `config` that is not coffret's") from None
        raise Damaged("the repository's config is cut short or altered", remedy=_REMEDY) from None
    if version != FORMAT_VERSION:
        told = f"the repository has format version {version}; this program knows {FORMAT_VERSION}"
        raise UnsupportedVersion(told, remedy=_UNSETTLED if version < FORMAT_VERSION else None)
    if config_bytes(config) != data or not _fits(config):
        raise Damaged("the repository's config was altered: its content does not fit its id", remedy=_REMEDY)
    _check_values(config)
    return config


def clear_secrets(config: Config) -> Secrets:
    """The keys of a repository without encryption: there is no data key."""
    return Secrets(b"", bytes.fromhex(config.id_key), bytes.fromhex(config.chunker_key))


def utc_now() -> str:
    """The time now, UTC, ISO 8601 to the second, as stored in clear."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _certified(config: Config, nonce: str) -> str:
    """The repository id of a config: the nonce (hex), then the hash of the config with the nonce for an id."""
    body = config_bytes(msgspec.structs.replace(config, repository_id=nonce))
    return nonce + blake3(body, derive_key_context=_CONTEXT).hexdigest(length=ID_BYTES // 2)


def _fits(config: Config) -> bool:
    """Whether the id is the one that this content has."""
    is_id = re.fullmatch(r"[0-9a-f]{64}", config.repository_id)
    return is_id is not None and config.repository_id == _certified(config, config.repository_id[:_NONCE_DIGITS])


def _check_values(config: Config) -> None:
    """Refuse what no version of this program writes.

    :raises UnsupportedVersion: if an algorithm has a name that is not known here
    :raises Damaged: if sizes or keys make no sense
    """
    for known, name in (((AES256_GCM, NO_ENCRYPTION), config.encryption), ((BLAKE3_256,), config.hash)):
        if name not in known:
            raise UnsupportedVersion(f"the repository uses {name!r}, which this version does not know")
    sizes = config.chunker
    check_parameters(sizes.name, sizes.min_bytes, sizes.avg_bytes, sizes.max_bytes)
    if not MIN_PACK_BYTES <= config.pack_bytes <= MAX_PACK_BYTES or config.pack_bytes < 2 * sizes.max_bytes:
        raise Damaged(f"the repository's pack size makes no sense: {config.pack_bytes} bytes", remedy=_REMEDY)
    key = r"" if config.encrypted else r"[0-9a-f]{64}"
    if not re.fullmatch(key, config.id_key) or not re.fullmatch(key, config.chunker_key):
        has = "keys in clear beside encryption" if config.encrypted else "neither encryption nor valid keys"
        raise Damaged(f"the repository's config has {has}", remedy=_REMEDY)
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", config.created, re.ASCII):
        raise Damaged("the repository's config has no valid time", remedy=_REMEDY)
