"""`coffret create`."""

from __future__ import annotations

import click

from coffret.commands.running import Session, new_passphrase
from coffret.engine.repository import create_repository


@click.command(help="Create a repository. Its passphrase is asked for twice, or comes from COFFRET_PASSPHRASE….")
@click.option("--no-encryption", is_flag=True, help="Make a repository that anyone who reaches it can read.")
@click.pass_obj
def command(session: Session, no_encryption: bool) -> int:
    """Create the repository and print its fingerprint."""

    async def create() -> int:
        passphrase = None if no_encryption else new_passphrase()
        config = await create_repository(session.globals.repository, passphrase=passphrase, options=session.options)
        kind = "without encryption" if no_encryption else "encrypted"
        session.display.summary(
            f"create: created repository {config.repository_id} {kind} at {session.globals.repository}",
            repository_id=config.repository_id,
            encryption=config.encryption,
            location=session.globals.repository,
        )
        return 0

    return session.run(create)
