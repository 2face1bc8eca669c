"""Opening a repository: the way into the engine for the command line and for programs that use it as a library.

async with open_repository("/var/backups", passphrase=lambda: b"…") as repository:
    summary = await repository.backup([b"/etc"])
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from coffret.connectors.errors import ConnectorError, NotFound
from coffret.connectors.registry import connect
from coffret.engine import configuration, keys, state
from coffret.engine.derivation import begin_derivation
from coffret.engine.errors import CoffretError, NoRepository, UsageError, WrongPassphrase
from coffret.engine.flow import together
from coffret.engine.keyring import Keyring, read_keyring
from coffret.engine.readahead import ReadAhead
from coffret.engine.repository import OpenOptions, Repository, cache_folder, check_pins

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence

    from coffret.connectors.base import Connector
    from coffret.engine.derivation import Derivation
    from coffret.engine.records import Config
    from coffret.engine.sealing import Secrets
    from coffret.engine.state import SlotHint
    from coffret.engine.storecache import StoreCache

_STATE = re.compile("[0-9a-fA-F]{32}")


@asynccontextmanager
async def open_repository(
    url: str,
    *,
    passphrase: Callable[[], bytes] | None = None,
    options: OpenOptions | None = None,
    writing: bool = False,
    listing: bool = False,
    transfers: bool = False,
) -> AsyncIterator[Repository]:
    """Open a repository. `passphrase` is called, in this thread, only if the repository is encrypted, or was last time.

    `writing`: for a backup, so that it is refused at once where nothing tells a repository without encryption from one
    put in its place. `listing`: for what asks for snapshots first of all, as all reading does: of a storage elsewhere
    they are listed while the key is derived. `transfers`: for what will move much, so that connections are ready then.

    :raises NoRepository: if there is none
    :raises UsageError: if it has no encryption, and that is asked for, or if what is expected is no state
    :raises WrongPassphrase: if the passphrase opens nothing, or none is given
    :raises RepositoryChanged: if it is not the one that was at this location before, or not in the state expected
    """
    from coffret.engine.mirror import Mirror, mirror_folder

    options = options or OpenOptions()
    if options.expect_state is not None and not _STATE.fullmatch(options.expect_state.strip()):
        raise UsageError(
            f"{options.expect_state!r} is no state of a repository", remedy="give the 32 digits that `backup -v` told"
        )
    passphrase = cache(passphrase) if passphrase else None  # one that is read from a pipe is there once
    async with bare_storage(url, options) as connector:
        if transfers:
            connector.expect_transfers()
        ahead = ReadAhead(connector) if listing and not connector.places else None
        hint = await to_thread.run_sync(state.likely_slot, connector.location, options.state_dir)
        derivation = options.derivation
        if derivation is not None and derivation.location != connector.location:
            derivation = None
        if derivation is None and passphrase and options.passphrase_at_hand:
            derivation = begin_derivation(connector.location, hint, passphrase)
        data, keyring, _ = await together(
            partial(_config, connector, url),
            partial(_keyring, connector, hint.slot),
            ahead.fetch_lists if ahead else _nothing,
        )
        config = configuration.parse_config(data)
        check_pins(connector, data, options, pin=False)
        _check_encryption(config, url, options)
        folder, caches, kept = None, cache_folder(options), None
        if options.use_cache and (caches.is_absolute() or options.cache_dir is not None):
            folder = mirror_folder(caches, config.repository_id, connector.location)
        mirror = await Mirror.open(folder, config.repository_id)
        if folder is not None and not mirror.why_private and not connector.places:
            from coffret.engine.storecache import StoreCache

            kept = StoreCache(folder / "stored.db")
        try:
            digest = configuration.config_hash(data)
            if isinstance(keyring, Keyring) and keyring.log_config not in ("", digest.hex()):
                keyring = await read_keyring(connector, digest)  # a log of another repository says nothing
            (slot_id, secrets), _ = await together(
                partial(_unlock, keyring, config, digest, passphrase, hint.slot, derivation),
                partial(ahead.fetch_objects, _not_kept(kept), mirror.lacking) if ahead else _nothing,
            )
            note = check_pins(connector, data, options, writing=writing)
            if (
                slot_id
                and isinstance(keyring, Keyring)
                and hint != (known := slot_hint(slot_id, keyring.live[slot_id]))
            ):
                await to_thread.run_sync(state.remember_slot, connector.location, known, options.state_dir)
            notes = [note] if note else []
            if options.use_cache and mirror.why_private:
                notes.append(f"no local cache is kept: {mirror.why_private}")
            repository = Repository(
                connector,
                data,
                secrets,
                mirror,
                slot_id=slot_id,
                options=options,
                notes=notes,
                kept=kept,
                cache_folder=None if mirror.why_private else folder,
                writing=writing,
                ahead=ahead,
            )
            if options.expect_state is not None:  # whatever is to be done
                await repository.commits()
            yield repository
            notes += connector.notes
        finally:
            with anyio.CancelScope(shield=True):
                await mirror.close()
                if kept is not None:
                    await kept.close()


@asynccontextmanager
async def open_storage(url: str, options: OpenOptions | None = None) -> AsyncIterator[Connector]:
    """The storage of a repository, without its keys: for what needs no passphrase.

    :raises NoRepository: if there is no repository
    :raises UsageError: if it has no encryption, and that is asked for
    :raises RepositoryChanged: if it is not the one expected
    """
    options = options or OpenOptions()
    if options.expect_state is not None:
        raise UsageError(
            "what state a repository is in nobody can tell without its keys", remedy="leave out --expect-state"
        )
    async with bare_storage(url, options) as connector:
        config = configuration.parse_config(await _config(connector, url))
        state.check_expected(connector.location, config.repository_id, options.expect_id)
        _check_encryption(config, url, options)
        yield connector


async def known_config(connector: Connector, url: str, options: OpenOptions) -> bytes:
    """The stored config of the repository that was at this location before, for what needs no keys.

    :raises NoRepository: if there is none
    :raises UsageError: if it has no encryption, and that is asked for
    :raises RepositoryChanged: if it is another than before, or than the one expected
    """
    data = await _config(connector, url)
    await to_thread.run_sync(partial(check_pins, connector, data, options, pin=False))
    _check_encryption(configuration.parse_config(data), url, options)
    return data


@asynccontextmanager
async def bare_storage(url: str, options: OpenOptions | None = None) -> AsyncIterator[Connector]:
    """The storage at a location, whatever is there: for putting back what a repository lost."""
    options = options or OpenOptions()
    connector, calls = connect(url, options.connector, options.transfers)
    async with connector:
        options.calls[connector.location] = calls
        yield connector


def check_two(mine: Connector, other: Connector) -> None:
    """See that a peer is another repository, as far as its location tells.

    :raises UsageError: if they are one and the same
    """
    if mine.location == other.location:
        raise UsageError(f"{other.location} is the repository itself", remedy="give another as the peer")


async def _config(connector: Connector, url: str) -> bytes:
    try:
        return await connector.peek(configuration.CONFIG_NAME, configuration.MAX_CONFIG_BYTES + 1)
    except NotFound:
        await check_not_lost(connector, url)
        raise NoRepository(f"no repository at {url}") from None


async def check_not_lost(connector: Connector, url: str) -> None:
    """Where there is no config, there must be no packs either.

    :raises NoRepository: if there are
    """
    with suppress(ConnectorError):
        async for _ in connector.list("packs/"):
            raise NoRepository(
                f"{url} holds a repository that has lost its config",
                remedy="put it back from a recovery file: `coffret at REPO passphrase add --from FILE`; or, if it is a "
                "clone that was interrupted, run that again",
            )


def _check_encryption(config: Config, url: str, options: OpenOptions) -> None:
    """Refuse a repository without encryption, if so asked: before it is remembered, and before anything is stored."""
    if options.encrypted_only and not config.encrypted:
        raise UsageError(
            f"a passphrase is given, but the repository at {url} has no encryption",
            remedy="unset it if that is intended; otherwise do not trust this storage",
        )


async def _keyring(connector: Connector, likely: str) -> Keyring | Exception:
    """The key slots, read beside the config; an error is for those who need them."""
    try:
        return await read_keyring(connector, likely=likely)
    except (CoffretError, ConnectorError) as error:
        return error


def slot_hint(slot_id: str, data: bytes) -> SlotHint:
    """What is remembered of a key slot, for a `Derivation`."""
    salt, cost = keys.parse_slot(slot_id, data).kdf_parameters
    return state.SlotHint(slot_id, salt, *cost)


async def _unlock(
    keyring: Keyring | Exception,
    config: Config,
    digest: bytes,
    passphrase: Callable[[], bytes] | None,
    likely: str,
    derivation: Derivation | None,
) -> tuple[str, Secrets]:
    if not config.encrypted:
        return "", configuration.clear_secrets(config)
    if isinstance(keyring, Exception):
        raise keyring
    if passphrase is None:
        raise WrongPassphrase("the repository is encrypted and no passphrase was given")
    given = passphrase()
    derived = await to_thread.run_sync(derivation.keys, given) if derivation is not None else None
    return await to_thread.run_sync(keys.unlock, keyring.live, given, digest, likely, derived)


async def _nothing() -> None:
    """What is done where nothing is to be read ahead."""


def _not_kept(kept: StoreCache | None) -> Callable[[Sequence[str]], Awaitable[Collection[str]]]:
    """What tells which of some objects are not kept on this machine."""

    async def lacking(names: Sequence[str]) -> Collection[str]:
        return set(names) - (await kept.get(names)).keys() if kept is not None else names

    return lacking
