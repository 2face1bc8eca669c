"""`coffret repair index|snapshots`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coffret.commands.line import EPILOG, PARTLY
from coffret.commands.passphrase import Group
from coffret.display import counted

if TYPE_CHECKING:
    from coffret.commands.running import Session


@click.group(
    cls=Group,
    epilog=EPILOG,
    no_args_is_help=False,
    help="Repair a repository that has lost something, as far as what is left allows. `coffret check` tells what.",
)
@click.pass_context
def command(context: click.Context) -> None:
    """Repair the index."""
    context.obj.display.command = f"repair {context.invoked_subcommand}"


@command.command("index", "Rebuild the index from the packs: needed when index objects are lost or damaged.")
@click.option("--all", "everything", is_flag=True, help="Index all packs, also those that are indexed already.")
@click.option("--dry-run", is_flag=True, help="Tell what would be indexed; store nothing.")
@click.option(
    "--exclusive", is_flag=True, help="Vouch that nobody else is at work: index packs marked for removal, too."
)
@click.pass_obj
def index(session: Session, everything: bool, dry_run: bool, exclusive: bool) -> int:
    """Index packs."""

    async def run() -> int:
        from coffret.engine.ops import repair

        options = repair.IndexRepairOptions(all=everything, exclusive=exclusive, dry_run=dry_run)
        async with session.repository("coffret.engine.ops.repair", writing=not dry_run) as repository:
            summary = await repair.repair_index(repository, options, session.display.progress)
        if summary.left:
            session.display.note(
                f"left alone, since marked for removal: {counted(summary.left, 'pack')}; if the index was lost since"
                " they were marked, say --exclusive while nobody else is at work"
            )
        if summary.renewed:
            session.display.note(f"put anew, since what they say is over: {', '.join(summary.renewed)}")
        did = "would index" if dry_run else "indexed"
        bad = f"; {counted(len(summary.damaged_packs), 'pack')} can't be read" if summary.damaged_packs else ""
        session.display.summary(
            f"repair: {did} {summary.indexed:,} of {counted(summary.packs, 'pack')}, with"
            f" {counted(summary.chunks, 'chunk')}{bad}",
            packs=summary.packs,
            packs_indexed=summary.indexed,
            packs_left=summary.left,
            chunks=summary.chunks,
            damaged_packs=summary.damaged_packs,
            dropped_objects=summary.dropped,
            renewed_objects=summary.renewed,
            dry_run=dry_run,
            duration_s=session.display.elapsed_s,
        )
        return PARTLY if summary.damaged_packs or summary.left else 0

    return session.run(run, progress=True)


@command.command(
    "snapshots",
    "Make of each damaged snapshot (default: of all) another, of what is whole in it. The damaged one stays, unless"
    " --forget is given.",
)
@click.argument("snapshots", nargs=-1, metavar="[SNAPSHOT]...")
@click.option("--fast", is_flag=True, help="Go by the index, and by existence and size of packs; do not read them.")
@click.option(
    "--forget",
    is_flag=True,
    help="Remove the damaged ones, each when the other is there; give up those of which nothing can be read.",
)
@click.option("--dry-run", is_flag=True, help="Tell what is lost; store nothing.")
@click.pass_obj
def snapshots_(session: Session, snapshots: tuple[str, ...], fast: bool, forget: bool, dry_run: bool) -> int:
    """Repair snapshots."""

    async def run() -> int:
        from coffret.engine.ops import repair

        options = repair.SnapshotRepairOptions(
            fast=fast, forget=forget, dry_run=dry_run, workers=session.globals.workers
        )
        async with session.repository("coffret.engine.ops.repair", writing=not dry_run) as repository:
            found = {each.id: each for each in [await repository.find_snapshot(text) for text in snapshots]}
            summary = await repair.repair_snapshots(
                repository, [*found.values()] or None, options, session.display.progress
            )
        for each in summary.repaired:
            session.display.line(
                f"{each.damaged.short_id}: repaired as {each.snapshot.short_id}, without"
                f" {counted(each.lost, 'path')} that {'is' if each.lost == 1 else 'are'} lost"
            )
            session.display.item(
                snapshot_id=each.snapshot.id,
                short_id=each.snapshot.short_id,
                damaged_id=each.damaged.id,
                lost=each.lost,
            )
        session.display.summary(
            f"repair: {counted(len(summary.damaged), 'snapshot')} of {summary.snapshots:,}"
            f" {'is' if len(summary.damaged) == 1 else 'are'} damaged, {len(summary.repaired):,} repaired"
            + (f", {len(summary.removed):,} removed" if forget else "")
            + (f"; {counted(len(summary.given_up), 'unreadable object')} given up" if summary.given_up else ""),
            snapshots=summary.snapshots,
            damaged_snapshots=[each.id for each in summary.damaged],
            repaired=len(summary.repaired),
            hopeless_snapshots=summary.hopeless,
            removed_snapshots=summary.removed,
            unreadable_objects=summary.unreadable,
            given_up_objects=summary.given_up,
            dry_run=dry_run,
            duration_s=session.display.elapsed_s,
        )
        return PARTLY if summary.hopeless or summary.unreadable else 0

    return session.run(run, progress=True)
