"""`coffret restore`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from coffret.commands.line import EPILOG, PARTLY
from coffret.commands.running import Session, common_path, split_target
from coffret.display import counted, path_fields, printable
from coffret.engine.settings import OVERWRITE

if TYPE_CHECKING:
    from coffret.engine.ops.restore import RestoreOptions


@click.command(
    epilog=EPILOG,
    help="Restore SNAPSHOT, or what lies at PATH in it, into a directory (default: ./coffret-<short id>).",
)
@click.argument("snapshot", metavar="SNAPSHOT[:PATH]")
@click.option("--to", "target", metavar="DIR", help="Where to; receives the contents of the snapshot's root.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Restore only what matches (gitignore rules).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out what matches.")
@click.option(
    "--overwrite",
    type=click.Choice(OVERWRITE[1:]),
    help="What becomes of files that exist: always replaces them, if-changed those of another size or time, never none"
    " of them. Without it none may exist.",
)
@click.option("--no-owner", is_flag=True, help="Do not restore owners.")
@click.option("--sparse", is_flag=True, help="Keep the holes of sparse files.")
@click.pass_obj
def command(session: Session, /, snapshot: str, target: str | None, **given: Any) -> int:
    """Restore and report."""
    display = session.display

    async def restore() -> int:
        async with session.repository("coffret.engine.ops.restore", listing=True, transfers=True) as repository:
            name, path = split_target(snapshot)
            found = await repository.find_snapshot(name)
            display.progress.subject = found.short_id
            into = target or f"coffret-{found.short_id}"
            summary = await repository.restore(
                found, os.fsencode(into), path=path, options=_options(session, given), progress=display.progress
            )
        shown = printable(path or common_path(found.header.roots))
        ending = f"with {counted(summary.errors, 'error')}" if summary.errors else "successfully"
        display.summary(
            f"restore: restoration of {found.short_id}:{shown} at {printable(os.fsencode(into))} completed {ending}",
            snapshot_id=found.id,
            **path_fields(path or common_path(found.header.roots)),
            **path_fields(os.fsencode(into), "target"),
            files=summary.files,
            size_bytes=summary.size_bytes,
            kept=summary.kept,
            errors=summary.errors,
            duration_s=summary.duration_s,
        )
        return PARTLY if summary.errors else 0

    return session.run(restore, progress=True)


def _options(session: Session, given: dict[str, Any]) -> RestoreOptions:
    from coffret.engine.ops.restore import RestoreOptions

    patterns = None
    if given["include"] or given["exclude"]:
        from coffret.engine.filters import PathPatterns

        patterns = PathPatterns(given["include"], given["exclude"])
    return RestoreOptions(
        overwrite=given["overwrite"] or "refuse",
        patterns=patterns,
        owner=False if given["no_owner"] else None,
        sparse=given["sparse"],
        workers=session.globals.workers,
    )
