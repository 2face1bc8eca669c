"""`coffret check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coffret.commands.running import DAMAGE_FOUND, Session, common_path, split_target
from coffret.display import counted, printable
from coffret.engine.repository import open_storage

if TYPE_CHECKING:
    from coffret.engine.ops.check import CheckSummary


@click.command(help="Verify snapshots, or, without an argument, the whole repository: every byte, from pack to file.")
@click.argument("snapshots", nargs=-1, metavar="[SNAPSHOT[:PATH]]...")
@click.option("--fast", is_flag=True, help="Only index, catalogs, and existence and size of packs.")
@click.option("--packs", is_flag=True, help="Only the checksums of packs; needs no passphrase.")
@click.pass_obj
def command(session: Session, snapshots: tuple[str, ...], fast: bool, packs: bool) -> int:
    """Check and report."""
    if packs and (snapshots or fast):
        raise click.UsageError("--packs checks all packs, and nothing else")

    async def check() -> int:
        from coffret.engine.ops.check import CheckOptions, check_packs

        progress = session.display.progress
        if packs:
            async with open_storage(session.globals.repository, session.options) as connector:
                return _report(session, await check_packs(connector, progress), [session.globals.repository])
        async with session.repository() as repository:
            targets = []
            for text in snapshots:
                name, path = split_target(text)
                targets.append((await repository.find_snapshot(name), path))
            session.display.progress.subject = targets[0][0].short_id if targets else ""
            summary = await repository.check(targets or None, CheckOptions(fast=fast), progress)
        shown = [f"{found.short_id}:{printable(path or common_path(found.header.roots))}" for found, path in targets]
        return _report(session, summary, shown or [session.globals.repository])

    return session.run(check, progress=True)


def _report(session: Session, summary: CheckSummary, shown: list[str]) -> int:
    if summary.clean:
        text = f"check: verification of {' '.join(shown)} completed successfully"
    else:
        text = (
            f"check: verification of {' '.join(shown)} found damage: "
            f"{counted(len(summary.damaged_packs), 'pack')}, {counted(len(summary.damaged_objects), 'other object')}, "
            f"{counted(len(summary.damaged_snapshots), 'snapshot')}, {counted(summary.damaged_files, 'file')}"
        )
    session.display.summary(
        text,
        clean=summary.clean,
        packs=summary.packs,
        snapshots=summary.snapshots,
        files=summary.files,
        bytes_read=session.display.progress.size_bytes,
        damaged_packs=summary.damaged_packs,
        damaged_objects=summary.damaged_objects,
        damaged_snapshots=summary.damaged_snapshots,
        damaged_files=summary.damaged_files,
        duration_s=session.display.elapsed_s,
    )
    return 0 if summary.clean else DAMAGE_FOUND
