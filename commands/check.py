"""`coffret check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coffret.commands.line import EPILOG
from coffret.commands.running import DAMAGE_FOUND, Session, common_path, split_target
from coffret.display import counted, printable
from coffret.engine.repository import open_storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.ops.check import CheckSummary
    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot


@click.command(
    epilog=EPILOG,
    help="Verify snapshots, or, without an argument, the whole repository: every byte, from pack to file.",
)
@click.argument("snapshots", nargs=-1, metavar="[SNAPSHOT[:PATH]]...")
@click.option("--fast", is_flag=True, help="Only index, catalogs, and existence and size of packs.")
@click.option("--packs", is_flag=True, help="Only the checksums of packs; needs no passphrase.")
@click.pass_obj
def command(session: Session, snapshots: tuple[str, ...], fast: bool, packs: bool) -> int:
    """Check and report."""
    if packs and (snapshots or fast):
        raise click.UsageError("--packs checks all packs, and nothing else")

    async def check_all_packs() -> int:
        from coffret.engine.ops.check import check_packs

        async with open_storage(session.location, session.options) as connector:
            summary = await check_packs(connector, session.display.progress)
        return _report(session, summary, f"check: the checksums of {counted(summary.packs, 'pack')} are right")

    async def check() -> int:
        from coffret.engine.ops.check import CheckOptions

        options = CheckOptions(fast=fast, workers=session.globals.workers)
        async with session.repository("coffret.engine.ops.check", listing=True, transfers=not fast) as repository:
            targets = await _targets(repository, snapshots)
            session.display.progress.subject = targets[0][0].short_id if targets else ""
            summary = await repository.check(targets or None, options, session.display.progress)
            # What was reported as damaged need not be said once more.
            reported = summary.damaged_objects
            repository.notes[:] = [note for note in repository.notes if not any(name in note for name in reported)]
        shown = [f"{found.short_id}:{printable(path or common_path(found.header.roots))}" for found, path in targets]
        what = " ".join(shown) or session.location
        return _report(session, summary, f"check: verification of {what} completed successfully")

    return session.run(check_all_packs if packs else check, progress=True)


async def _targets(repository: Repository, texts: Sequence[str]) -> list[tuple[Snapshot, bytes | None]]:
    """The snapshots meant, each with a path in it, or None for all of it; nothing twice."""
    targets = []
    for text in texts:
        name, path = split_target(text)
        targets.append((await repository.find_snapshot(name), path))
    whole = {found.id for found, path in targets if path is None}
    unique = {(found.id, path): (found, path) for found, path in targets if path is None or found.id not in whole}
    return [*unique.values()]


def _report(session: Session, summary: CheckSummary, success: str) -> int:
    session.display.summary(
        success if summary.clean else _damage(summary),
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


def _damage(summary: CheckSummary) -> str:
    """The last line where there is damage: how much, and what to do next."""
    found = [
        counted(number, noun)
        for number, noun in (
            (len(summary.damaged_packs), "pack"),
            (len(summary.damaged_objects), "other object"),
            (len(summary.damaged_snapshots), "snapshot"),
            (summary.damaged_files, "file"),
        )
        if number
    ]
    # Each host remembers for itself what it has found damaged: that is when its backups store it again.
    return (
        f"check: found damage: {', '.join(found)}; run `coffret check`, then `coffret backup` on the hosts whose files "
        "are damaged: it stores again what is still there"
    )
