"""`coffret clone`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click
import msgspec

from coffret.commands.line import EPILOG
from coffret.display import counted, path_fields, printable
from coffret.engine.units import format_size

if TYPE_CHECKING:
    from coffret.commands.running import Session
    from coffret.engine.ops.clone import CloneSummary

_INCOMPLETE = 3


@click.command(
    epilog=EPILOG,
    help="Make an exact copy of the repository at DEST, of the same or another kind: the same id, snapshots and"
    " passphrases, none of which is needed. Run again it copies what is missing. What -o sets is for the repository;"
    " options of DEST's storage stand in its URL.",
)
@click.argument("words", nargs=-1, metavar="[to] DEST")
@click.pass_obj
def command(session: Session, words: tuple[str, ...]) -> int:
    """Clone and report."""
    destination = _destination(words)

    async def clone() -> int:
        from coffret.engine.ops.clone import clone

        target_options = msgspec.structs.replace(session.peer_options, encrypted_only=False)
        summary = await clone(
            session.location,
            destination,
            options=session.options,
            target_options=target_options,
            progress=session.display.progress,
        )
        return _report(session, destination, summary)

    return session.run(clone, progress=True)


def _destination(words: tuple[str, ...]) -> str:
    """
    :raises click.UsageError: if there is none, or more than one
    """
    names = words[1:] if words[:1] == ("to",) else words
    if len(names) != 1:
        raise click.UsageError("clone wants one DEST: coffret [at REPO] clone [to] DEST")
    return names[0]


def _report(session: Session, destination: str, summary: CloneSummary) -> int:
    damaged, location = list(summary.damaged), os.fsencode(destination)
    text = (
        f"clone: cloned repository {summary.config.repository_id[:8]} to {printable(location)}: "
        f"{counted(summary.objects, 'object')}, {format_size(summary.size_bytes)}"
    )
    if summary.kept:
        text += f"; {summary.kept:,} more {'was' if summary.kept == 1 else 'were'} there already"
    if damaged:
        text += f"; not copied: {counted(len(damaged), 'damaged object')}: run `coffret at REPO check`"
    session.display.summary(
        text,
        repository_id=summary.config.repository_id,
        **path_fields(location, "destination"),
        objects=summary.objects,
        size_bytes=summary.size_bytes,
        kept=summary.kept,
        damaged_objects=damaged,
        duration_s=session.display.elapsed_s,
    )
    return _INCOMPLETE if damaged else 0
