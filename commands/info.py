"""`coffret info`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coffret.commands.line import EPILOG
from coffret.engine.units import format_size

if TYPE_CHECKING:
    from coffret.commands.running import Session


@click.command(epilog=EPILOG, help="Tell what is known of the repository: id, format, sizes.")
@click.pass_obj
def command(session: Session) -> int:
    """Show what the repository is and holds."""

    async def info() -> int:
        async with session.repository(listing=True) as repository:
            config = repository.config
            snapshots = (await repository.commits()).snapshots
            packs = stored = 0
            async for found in repository.connector.list("packs/"):
                packs += 1
                stored += found.size_bytes
            display = session.display
            display.line(f"repository  {config.repository_id}")
            display.line(f"location    {repository.connector.location}")
            display.line(f"format      version {config.version}, created {config.created}")
            display.line(f"encryption  {config.encryption}")
            chunker = config.chunker
            display.line(
                f"chunker     {chunker.name}, {chunker.min_bytes >> 10} KiB to {chunker.max_bytes >> 10} KiB,"
                f" {chunker.avg_bytes >> 10} KiB on average"
            )
            state = repository.state_of(snapshots)
            display.line(f"snapshots   {len(snapshots)}")
            display.line(f"state       {state}")
            display.line(f"packs       {packs}, {format_size(stored)}")
        display.summary(
            "",
            repository_id=config.repository_id,
            location=repository.connector.location,
            version=config.version,
            created=config.created,
            encryption=config.encryption,
            chunker={
                "name": chunker.name,
                "min_bytes": chunker.min_bytes,
                "avg_bytes": chunker.avg_bytes,
                "max_bytes": chunker.max_bytes,
            },
            pack_bytes=config.pack_bytes,
            snapshots=len(snapshots),
            state=state,
            packs=packs,
            bytes_stored=stored,
        )
        return 0

    return session.run(info)
