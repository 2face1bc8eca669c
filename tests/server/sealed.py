"""Objects as a repository has them, sealed with keys that no server knows."""

from __future__ import annotations

import os

from blake3 import blake3

from coffret.engine import sealing
from coffret.engine.sealing import Sealer, Secrets

SEALER = Sealer(Secrets(os.urandom(32), os.urandom(32), os.urandom(32)), os.urandom(32))


def attempt() -> str:
    """A new attempt (hex)."""
    return os.urandom(16).hex()


def sealed(kind: bytes, name: str, of: str) -> bytes:
    """An object of a kind, by an attempt."""
    return SEALER.seal(kind, name, bytes.fromhex(of), os.urandom(50))


def pack(size_bytes: int = 1000, *, kind: bytes = sealing.PACK) -> tuple[str, bytes]:
    """(name, bytes) of a pack."""
    body = SEALER.header(kind, os.urandom(16)) + os.urandom(size_bytes)
    digest = blake3(body).hexdigest()
    return f"packs/{digest[:2]}/{digest}", body


def lease(of: str) -> tuple[str, bytes]:
    """(name, bytes) of an attempt's lease."""
    return f"leases/{of}", sealed(sealing.LEASE, f"leases/{of}", of)


def index(of: str, number: int = 0) -> tuple[str, bytes]:
    """(name, bytes) of an attempt's index object."""
    return f"index/{of}-{number}", sealed(sealing.INDEX, f"index/{of}-{number}", of)


def snapshot(of: str) -> tuple[str, bytes]:
    """(name, bytes) of an attempt's snapshot."""
    return f"snapshots/{of}", sealed(sealing.SNAPSHOT, f"snapshots/{of}", of)


def tombstone(of: str, by: str = "") -> tuple[str, bytes]:
    """(name, bytes) of an attempt's other end, put by another."""
    return f"snapshots/{of}", sealed(sealing.END, f"snapshots/{of}", by or of)
