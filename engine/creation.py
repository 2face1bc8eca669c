"""Make a new repository."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio import to_thread

from coffret.connectors.errors import AlreadyExists, NotFound, NotStorage
from coffret.engine import configuration, keys, state
from coffret.engine.errors import NoRepository, UsageError
from coffret.engine.keyring import put_slot
from coffret.engine.objects import PROBE, put_once
from coffret.engine.opening import bare_storage, check_not_lost, slot_hint
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coffret.connectors.base import Connector
    from coffret.engine.records import Config
    from coffret.engine.repository import Repository

#: Racing puts of one name, by which a storage shows whether they exclude each other.
RACERS = 4


async def create_repository(
    url: str,
    *,
    passphrase: bytes | None,
    like: Repository | None = None,
    options: OpenOptions | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Config:
    """Make a new, empty repository; without a passphrase it has no encryption. Returns its config.

    `like`: an open repository that cuts and names chunks as the new one is to do, so that what is copied from there is
    known to backups made here. `on_note` is told what the storage can't promise.

    :raises UsageError: if there is a repository already, or the passphrase is empty, or if keys of a repository with
        encryption would lie in clear
    :raises NoRepository: if the place holds something else
    """
    options = options or OpenOptions()
    encrypted = passphrase is not None
    secrets = keys.new_secrets(encrypted=encrypted)
    if like is None:
        config = configuration.new_config(secrets)
    else:
        check_like(like, encrypted=encrypted)
        secrets = msgspec.structs.replace(secrets, id_key=like.secrets.id_key, chunker_key=like.secrets.chunker_key)
        config = configuration.new_config(secrets, chunker=like.config.chunker, pack_bytes=like.config.pack_bytes)
    data = configuration.config_bytes(config)
    async with bare_storage(url, options) as connector:
        await _make_place(connector, url)
        notes = await probe(connector)
        if passphrase is not None:
            label = f"{os.uname().nodename}"
            slot_id, slot = await to_thread.run_sync(
                lambda: keys.wrap(secrets, passphrase, configuration.config_hash(data), label=label)
            )
            await put_slot(connector, slot_id, slot)
        try:
            # Last: with its config the repository exists.
            await put_once(connector, configuration.CONFIG_NAME, data)
        except AlreadyExists:
            raise _taken(url) from None
        state.remember(
            connector.location,
            config.repository_id,
            config.encrypted,
            configuration.config_hash(data),
            folder=options.state_dir,
        )
        if passphrase is not None:
            state.remember_slot(connector.location, slot_hint(slot_id, slot), options.state_dir)
        for note in (*notes, *connector.notes):
            if on_note is not None:
                on_note(note)
    return config


def check_like(like: Repository, *, encrypted: bool) -> None:
    """See that a repository, with encryption or without, may be made like another.

    :raises UsageError: if not
    """
    if like.config.encrypted and not encrypted:
        raise UsageError(
            f"the repository at {like.connector.location} is encrypted, and the new one would show its keys in clear",
            remedy="leave out --no-encryption, or --like",
        )


async def _make_place(connector: Connector, url: str) -> None:
    """Make the storage ready, if no repository is there.

    :raises UsageError: if one is
    :raises NoRepository: if something else is
    """
    try:
        await connector.create()
    except NotStorage as error:
        await check_not_lost(connector, url)
        raise NoRepository(str(error), remedy="choose a new or an empty place") from None
    try:
        await connector.stat(configuration.CONFIG_NAME)
    except NotFound:
        return
    raise _taken(url)


def _taken(url: str) -> UsageError:
    return UsageError(f"{url} is a repository already", remedy="use it, or choose another place")


async def put_race(connector: Connector, name: str, bodies: Sequence[bytes]) -> int:
    """Put bodies under one name at once, if absent, and delete it; how many were put: one, if the storage is right."""
    winners = 0

    async def put(body: bytes) -> None:
        nonlocal winners
        try:
            await connector.put(name, [body], if_absent=True)
            winners += 1
        except AlreadyExists:
            pass

    async with anyio.create_task_group() as group:
        for body in bodies:
            group.start_soon(put, body)
    await connector.delete(name)
    return winners


async def probe(connector: Connector) -> list[str]:
    """Race puts of one name, and see what the storage makes of it; return notes for the user.

    Backups need no exclusive puts, since no two writers ever use one name; maintenance does.

    :raises NoRepository: if none of the puts succeeded
    """
    winners = await put_race(connector, f"leases/{os.urandom(16).hex()}", [PROBE + b"%d" % n for n in range(RACERS)])
    if not winners:
        raise NoRepository(
            f"{connector.location}: a new name is said to be taken", remedy="choose another storage: this one errs"
        )
    if winners == 1:
        return []
    return [
        f"{connector.location} does not keep several writers from taking one name: backups are safe, but whatever"
        " removes old data there must have the repository for itself"
    ]
