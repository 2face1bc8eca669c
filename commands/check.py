"""`coffret check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coffret.commands.line import EPILOG
from coffret.commands.running import DAMAGE_FOUND, Session, common_path, split_target
from coffret.display import counted, printable
from coffret.engine.check_subset import Subset
from coffret.engine.opening import open_storage

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
@click.option(
    "--read-data-subset",
    metavar="N/M|P%|SIZE",
    help="Read a part of the packs, and of the others what --fast looks at: the N-th of M parts (one a night, say), or"
    " packs drawn at random, P in 100 or SIZE (10%, 500M) of them.",
)
@click.pass_obj
def command(session: Session, snapshots: tuple[str, ...], fast: bool, packs: bool, read_data_subset: str | None) -> int:
    """Check and report."""
    if packs and (snapshots or fast):
        raise click.UsageError("--packs checks all packs, and nothing else")
    if fast and read_data_subset is not None:
        raise click.UsageError("--fast reads no packs, --read-data-subset a part of them")
    subset = Subset.parse(read_data_subset) if read_data_subset is not None else None

    async def check_all_packs() -> int:
        from coffret.engine.ops.check import check_packs

        async with open_storage(session.location, session.options) as connector:
            summary = await check_packs(connector, session.display.progress, subset)
        return _report(session, summary, f"check: the checksums of {counted(summary.packs, 'pack')} are right")

    async def check() -> int:
        from coffret.engine.ops.check import CheckOptions

        options = CheckOptions(fast=fast, subset=subset, workers=session.globals.workers)
        async with session.repository("coffret.engine.ops.check", listing=True, transfers=not fast) as repository:
            targets = await _targets(repository, snapshots)
            session.display.progress.subject = targets[0][0].short_id if targets else ""
            summary = await repository.check(targets or None, options, session.display.progress)
            # What was reported as damaged need not be said once more.
            reported = summary.damaged_objects
            repository.notes[:] = [note for note in repository.notes if not any(name in note for name in reported)]
        shown = [f"{found.short_id}:{printable(path or common_path(found.header.roots))}" for found, path in targets]
        what = " ".join(shown) or session.location
        part = f"; {summary.packs_read} of {counted(summary.packs, 'pack')} were read" if subset is not None else ""
        success = f"check: verification of {what} completed successfully{part}"
        return _report(session, summary, success, all_snapshots=not snapshots)

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


def _report(session: Session, summary: CheckSummary, success: str, *, all_snapshots: bool = False) -> int:
    session.display.summary(
        success if summary.clean else _damage(summary, all_snapshots=all_snapshots),
        clean=summary.clean,
        packs=summary.packs,
        packs_read=summary.packs_read,
        snapshots=summary.snapshots,
        files=summary.files,
        bytes_read=session.display.progress.size_bytes,
        damaged_packs=summary.damaged_packs,
        damaged_objects=summary.damaged_objects,
        damaged_snapshots=summary.damaged_snapshots,
        damaged_files=summary.damaged_files,
        missing_snapshots=summary.missing_snapshots,
        duration_s=session.display.elapsed_s,
    )
    return 0 if summary.clean else DAMAGE_FOUND


def _damage(summary: CheckSummary, *, all_snapshots: bool) -> str:
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
    if not found:
        return f"check: {counted(len(summary.missing_snapshots), 'snapshot')} not as before: see the warning"
    if summary.damaged_packs and len(found) == 1 and all_snapshots:
        return f"check: found damage: {found[0]}, and nothing is lost by it; `coffret maintenance` takes it away"
    names = summary.damaged_objects
    first = []
    if any(name.startswith("trash/") for name in names):
        first += ["`coffret maintenance`", "`coffret repair index`"]
    elif any(name.startswith("index/") for name in names):
        first.append("`coffret repair index`")
    if any(name.startswith("removed/") for name in names):
        first.append("`coffret rm` of the snapshots that are named again")
    if first and not (summary.damaged_packs or summary.damaged_snapshots):
        return f"check: found damage: {', '.join(found)}; run {', then '.join(first)}"
    before = f"run {', then '.join(first)}; then " if first else ""
    # Each host remembers for itself what it has found damaged: that is when its backups store it again.
    return (
        f"check: found damage: {', '.join(found)}; {before}run `coffret check`, then `coffret backup` on the hosts "
        "whose files are damaged: it stores again what is still there, as `coffret sync` does from a copy; `coffret "
        "repair snapshots` saves what is whole"
    )
