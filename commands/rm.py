"""`coffret rm`."""

from __future__ import annotations

import click

from coffret.commands.line import EPILOG
from coffret.commands.ls import show_snapshot
from coffret.commands.running import Session, split_target
from coffret.display import counted
from coffret.engine.errors import UsageError


@click.command(
    epilog=EPILOG,
    help="Remove snapshots from the list. `coffret maintenance` gives back the space that only they took.",
)
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT...")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.pass_obj
def command(session: Session, snapshots: tuple[str, ...], dry_run: bool) -> int:
    """Remove snapshots: all, or none if one of them is not there."""
    for text in snapshots:
        if split_target(text)[1] is not None:
            raise UsageError(f"{text}: a part of a snapshot can't be removed", remedy="name whole snapshots")

    async def rm() -> int:
        from coffret.engine.ops.rm import remove, renew, resolve

        async with session.repository("coffret.engine.ops.rm") as repository:
            found, gone = resolve(await repository.commits(), snapshots)
            for snapshot_id in gone:
                session.display.note(f"snapshot {snapshot_id[:8]} was removed before")
            if session.globals.json or session.globals.verbose or dry_run:
                for snapshot in found:
                    show_snapshot(session, snapshot)
            if not dry_run:
                await remove(repository, found)
                if renewed := await renew(repository, gone):
                    session.display.note(f"{counted(renewed, 'damaged record')} of that put anew")
        session.display.summary(
            f"rm: {'would remove' if dry_run else 'removed'} {counted(len(found), 'snapshot')}",
            removed=len(found),
            snapshot_ids=[snapshot.id for snapshot in found],
            removed_before=gone,
            dry_run=dry_run,
        )
        return 0

    return session.run(rm)
