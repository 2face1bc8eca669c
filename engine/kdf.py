"""From a passphrase to the keys of a slot: Argon2id (RFC 9106), and the commitment.

It imports little: what opens a repository begins with this, and imports the rest meanwhile.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import msgspec
from blake3 import blake3
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from coffret.engine import settings
from coffret.engine.errors import CoffretError

KEY_BYTES, SALT_BYTES = 32, 16
_COMMITMENT = "coffret 2026 key slot commitment"
# OpenSSL runs the lanes in one pool of threads for the whole process, and two derivations that hold some of it while
# they wait for more block each other for ever (seen with 4.0.3 on two cores, at once).
_one_derivation = threading.Lock()


class Cost(NamedTuple):
    """What Argon2id takes: memory in KiB, passes over it, lanes."""

    memory_kib: int = settings.ARGON2_MEMORY_KIB
    passes: int = settings.ARGON2_PASSES
    lanes: int = settings.ARGON2_LANES


class KdfParameters(NamedTuple):
    """What a slot's keys are derived from beside the passphrase. By itself it lets nobody try one."""

    salt: bytes
    cost: Cost


class DerivedKeys(msgspec.Struct, frozen=True):
    """What Argon2id gave of a passphrase: a slot's key-encryption key and commitment, if it has these parameters."""

    parameters: KdfParameters
    key: bytes
    commitment: bytes

    def __repr__(self) -> str:
        return "DerivedKeys"  # keys never reach a log or a traceback

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []


#: The most that a slot may ask for.
CEILING = Cost(settings.ARGON2_MAX_MEMORY_KIB, settings.ARGON2_MAX_PASSES, settings.ARGON2_MAX_LANES)


def is_sane(cost: Cost) -> bool:
    """Whether a slot may ask for this."""
    return all(1 <= asked <= limit for asked, limit in zip(cost, CEILING, strict=True)) and (
        cost.memory_kib >= 8 * cost.lanes
    )


def derive(parameters: KdfParameters, passphrase: bytes) -> DerivedKeys:
    """What a passphrase gives with a slot's parameters.

    :raises CoffretError: if that takes more memory than there is, or than any slot may ask for
    """
    salt, cost = parameters
    if len(salt) != SALT_BYTES or not is_sane(cost):
        raise CoffretError(f"a key derivation with absurd parameters: {cost.memory_kib} KiB × {cost.passes}")
    derivation = Argon2id(
        salt=salt, length=2 * KEY_BYTES, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory_kib
    )
    try:
        with _one_derivation:
            derived = derivation.derive(passphrase)
    except MemoryError:
        raise CoffretError(
            f"not enough memory to try the passphrase: {cost.memory_kib >> 10} MiB are needed",
            remedy="end other programs, or use a machine with more memory",
        ) from None
    commitment = blake3(derived[KEY_BYTES:], derive_key_context=_COMMITMENT).digest()
    return DerivedKeys(parameters, derived[:KEY_BYTES], commitment)
