"""`coffret create`."""

from __future__ import annotations

import os

import click

from coffret.commands.running import Session, new_passphrase
from coffret.display import path_fields, printable
from coffret.engine.repository import create_repository


@click.command(help="Create a repository. Its passphrase is asked for twice, or comes from COFFRET_PASSPHRASE….")
@click.option("--no-encryption", is_flag=True, help="Make a repository that anyone who reaches it can read.")
@click.pass_obj
def command(session: Session, no_encryption: bool) -> int:
    """Create the repository and print its fingerprint."""

    async def create() -> int:
        passphrase = None if no_encryption else new_passphrase()
        config = await create_repository(session.globals.repository, passphrase=passphrase, options=session.options)
        location = os.fsencode(session.globals.repository)
        kind = "without encryption" if no_encryption else "encrypted"
        session.display.summary(
            f"create: created repository {config.repository_id} {kind} at {printable(location)}",
            repository_id=config.repository_id,
            encryption=config.encryption,
            **path_fields(location, "location"),
        )
        return 0

    return session.run(create)
