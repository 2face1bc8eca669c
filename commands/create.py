"""`coffret create`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from coffret.commands.line import EPILOG
from coffret.commands.running import Session, new_passphrase
from coffret.display import path_fields, printable
from coffret.engine.creation import check_like, create_repository
from coffret.engine.errors import UsageError
from coffret.engine.opening import bare_storage
from coffret.engine.passphrase import passphrase_is_set

if TYPE_CHECKING:
    from coffret.engine.repository import Repository


@click.command(
    epilog=EPILOG,
    help="Create a repository. Its passphrase is asked for twice, or comes from COFFRET_PASSPHRASE,"
    " COFFRET_PASSPHRASE_FILE or COFFRET_PASSPHRASE_COMMAND.",
)
@click.option("--no-encryption", is_flag=True, help="Make a repository that anyone who reaches it can read.")
@click.option(
    "--like",
    metavar="PEER",
    help="Cut and name chunks as the repository PEER does, so that what is copied from there is known to backups made"
    " here; what encrypts is the new one's own. PEER's passphrase is asked for once, or comes from"
    " COFFRET_PEER_PASSPHRASE, COFFRET_PEER_PASSPHRASE_FILE or COFFRET_PEER_PASSPHRASE_COMMAND.",
)
@click.pass_obj
def command(session: Session, no_encryption: bool, like: str | None) -> int:
    """Create the repository and print its fingerprint."""

    async def create() -> int:
        _refuse(session, no_encryption)
        async with bare_storage(session.location, session.options):
            pass  # what is no location at all is told before a passphrase is asked for
        if like is None:
            return await _create(session, no_encryption, None)
        async with session.peer(like) as peer:
            check_like(peer, encrypted=not no_encryption)
            return await _create(session, no_encryption, peer)

    return session.run(create)


async def _create(session: Session, no_encryption: bool, like: Repository | None) -> int:
    if_empty = "choose one; --no-encryption makes a repository without"
    passphrase = None if no_encryption else new_passphrase(if_empty=if_empty)
    config = await create_repository(
        session.location, passphrase=passphrase, like=like, options=session.options, on_note=session.display.note
    )
    location = os.fsencode(session.location)
    kind = "without encryption" if no_encryption else "encrypted"
    session.display.summary(
        f"create: created repository {config.repository_id} {kind} at {printable(location)}",
        repository_id=config.repository_id,
        encryption=config.encryption,
        like=None if like is None else like.config.repository_id,
        **path_fields(location, "location"),
    )
    return 0


def _refuse(session: Session, no_encryption: bool) -> None:
    """
    :raises UsageError: if what is given contradicts itself
    """
    if session.globals.expect_id is not None:
        raise UsageError("--expect-id is for a repository that exists: a new one gets a new id", remedy="leave it out")
    if session.globals.expect_state is not None:
        raise UsageError("--expect-state is for a repository that exists: a new one is empty", remedy="leave it out")
    if no_encryption and passphrase_is_set(os.environ):
        raise UsageError(
            "--no-encryption, and yet a passphrase is set",
            remedy="leave out the one, or unset COFFRET_PASSPHRASE, COFFRET_PASSPHRASE_FILE and ..._COMMAND",
        )
