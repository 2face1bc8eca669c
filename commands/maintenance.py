"""`coffret maintenance`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coffret.commands.line import EPILOG, PARTLY
from coffret.display import counted
from coffret.engine.units import format_duration, format_size, parse_seconds

if TYPE_CHECKING:
    from coffret.commands.running import Session
    from coffret.engine.ops.maintenance import MaintenanceSummary


@click.command(
    epilog=EPILOG,
    help="Give back the space that only removed snapshots took, beside any number of backups. A first run marks what"
    " nothing needs; one after the grace, when all who were at work then have ended, deletes it.",
)
@click.option("--grace", default="24h", show_default=True, metavar="DURATION", help="Leave marked data alone so long.")
@click.option(
    "--exclusive", is_flag=True, help="Vouch that nobody else works on the repository, where storage can't tell."
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be marked.")
@click.pass_obj
def command(session: Session, grace: str, exclusive: bool, dry_run: bool) -> int:
    """Maintain."""
    grace_s = parse_seconds(grace)

    async def run() -> int:
        from coffret.engine.ops.maintenance import MaintenanceOptions, maintain

        options = MaintenanceOptions(grace_s=grace_s, exclusive=exclusive, dry_run=dry_run)
        async with session.repository("coffret.engine.ops.maintenance") as repository:
            summary = await maintain(repository, options, session.display.progress)
        session.display.summary(
            f"maintenance: {_told(summary, dry_run=dry_run)}",
            marked_packs=summary.marked_packs,
            bytes_marked=summary.marked_bytes,
            bytes_to_copy=summary.to_copy_bytes,
            swept_packs=summary.swept_packs,
            missing_packs=summary.missing_packs,
            bytes_freed=summary.freed_bytes,
            bytes_stored=summary.stored_bytes,
            merged_objects=summary.merged_objects,
            ended_attempts=summary.ended_attempts,
            open_packs=summary.open_packs,
            sweep_in_s=summary.sweep_in_s,
            damaged_packs=summary.damaged_packs,
            dry_run=dry_run,
            duration_s=session.display.elapsed_s,
        )
        return PARTLY if summary.damaged_packs else 0

    return session.run(run, progress=True)


def _told(summary: MaintenanceSummary, *, dry_run: bool) -> str:
    """What was done, or would be."""
    done = []
    if summary.open_packs:
        done.append(f"{counted(summary.open_packs, 'pack')} marked already, to be swept")
    if summary.marked_packs:
        copied = f", of which {format_size(summary.to_copy_bytes)} are needed" if summary.to_copy_bytes else ""
        verb = "would mark" if dry_run else "marked"
        done.append(f"{verb} {counted(summary.marked_packs, 'pack')} ({format_size(summary.marked_bytes)}{copied})")
    if summary.swept_packs:
        freed = format_size(max(0, summary.freed_bytes - summary.stored_bytes))
        done.append(f"swept {counted(summary.swept_packs, 'pack')}, {freed} freed")
    if summary.missing_packs:
        done.append(f"forgot {counted(summary.missing_packs, 'missing pack')} that no snapshot needs")
    if summary.damaged_packs:
        done.append(f"kept what can't be read of {counted(len(summary.damaged_packs), 'damaged pack')}, see `check`")
    if summary.merged_objects:
        done.append(f"replaced {counted(summary.merged_objects, 'index object')}")
    if summary.ended_attempts:
        done.append(f"ended {counted(summary.ended_attempts, 'dead attempt')}")
    if summary.sweep_in_s is not None:
        done.append(f"what is marked can be swept in {format_duration(max(1, int(summary.sweep_in_s)))}")
    return "; ".join(done) or "nothing to do"
