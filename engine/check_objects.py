"""Verify what is neither pack, index object nor catalog: key slots and their log, snapshots, marks, small records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.connectors.errors import ConnectorError, NotFound
from coffret.engine import keys, sealing
from coffret.engine.configuration import config_hash
from coffret.engine.errors import CoffretError, Damaged
from coffret.engine.fetch import unreadable
from coffret.engine.keyring import read_keyring, slot_name
from coffret.engine.objects import CLONE, MAX_MARK_BYTES, PROBE, read_listed
from coffret.engine.records import ID_BYTES, UNDECODABLE, decode_mark, decode_removal
from coffret.engine.snapshot import load_commits

if TYPE_CHECKING:
    from coffret.connectors.base import ObjectInfo
    from coffret.engine.check_damage import Damage
    from coffret.engine.progress import Progress
    from coffret.engine.repository import Repository

_SEALED = (("removed/", sealing.REMOVED), ("leases/", sealing.LEASE), ("trash/", sealing.MARK))


async def check_objects(repository: Repository, damage: Damage, progress: Progress) -> None:
    """Verify them all."""
    commits = await load_commits(repository.connector, repository.sealer)
    for name, reason in commits.damaged:
        damage.object(name, reason)
    for prefix, kind in _SEALED:
        async for info in repository.connector.list(prefix):
            await _check_sealed(repository, info, kind, damage)
    if repository.config.encrypted:
        await _check_keys(repository, damage, progress)


async def _check_sealed(repository: Repository, info: ObjectInfo, kind: bytes, damage: Damage) -> None:
    try:
        data = await read_listed(repository.connector, info, MAX_MARK_BYTES)
        if kind == sealing.LEASE and data.startswith((PROBE, CLONE)):
            return
        _, payload = repository.sealer.open(kind, info.name, data)
        # What was seen of a mark, and its end, have other fields.
        if kind == sealing.MARK and "-" not in info.name and len(decode_mark(payload).packs) % ID_BYTES:
            raise Damaged("names a part of a pack")
        if kind == sealing.REMOVED:
            decode_removal(payload)
    except NotFound:
        return  # leases come and go
    except (Damaged, *UNDECODABLE) as error:
        damage.object(info.name, str(error))
    except ConnectorError as error:
        damage.object(info.name, unreadable(info.name, error).removeprefix(f"{info.name} "))


async def _check_keys(repository: Repository, damage: Damage, progress: Progress) -> None:
    digest = config_hash(repository.config_data)
    try:
        keyring = await read_keyring(repository.connector, digest)
    except (ConnectorError, CoffretError) as error:
        damage.object("keys/", str(error))
        return
    if keyring.log_damaged:
        damage.object(f"keys/removed-{keyring.last}", "the log of removed key slots is not what was stored")
    for slot_id, data in keyring.live.items():
        try:
            slot = keys.parse_slot(slot_id, data)
        except CoffretError as error:
            damage.object(slot_name(slot_id), str(error))
            continue
        if not keys.endorsed(slot, repository.secrets, digest):
            progress.note(f"{slot_name(slot_id)} was put by somebody who did not have the repository's keys")
