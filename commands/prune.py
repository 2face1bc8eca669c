"""`coffret prune`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from coffret.commands.line import EPILOG
from coffret.commands.ls import snapshot_fields, snapshot_line
from coffret.display import counted, printable
from coffret.engine.errors import UsageError
from coffret.engine.retention import UNLIMITED, Duration, Policy, parse_duration, parse_group_by, tag_sets

if TYPE_CHECKING:
    from coffret.commands.running import Session
    from coffret.engine.ops.prune import PruneOptions
    from coffret.engine.retention import Decision, Group

_COUNTED = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_TAGS = "TAG[,TAG]"


@click.command(
    epilog=EPILOG,
    help="Remove the snapshots that no --keep option keeps; N may be `unlimited`. Of each group, by default all of"
    " one host and the same paths, the newest snapshot of an hour, day, week, month or year is kept, for the last N of"
    " them that have one.",
)
@click.option("--keep-last", metavar="N", help="Keep the last N snapshots.")
@click.option("--keep-hourly", metavar="N", help="Keep one for each of the last N hours with snapshots.")
@click.option("--keep-daily", metavar="N", help="The same by days.")
@click.option("--keep-weekly", metavar="N", help="The same by weeks, which begin on Monday.")
@click.option("--keep-monthly", metavar="N", help="The same by months.")
@click.option("--keep-yearly", metavar="N", help="The same by years.")
@click.option("--keep-within", metavar="DURATION", help="Keep what is so much older than the newest: 1y6m, 14d, 2d12h.")
@click.option("--keep-tag", multiple=True, metavar=_TAGS, help="Keep what has this tag, or all of these.")
@click.option("--tag", multiple=True, metavar=_TAGS, help="Look only at snapshots with this tag, or all of these.")
@click.option("--host", multiple=True, metavar="NAME", help="Look only at snapshots of this host.")
@click.option("--path", multiple=True, metavar="PATH", help="Look only at snapshots of PATH (of several: of them all).")
@click.option("--group-by", default="host,paths", show_default=True, metavar="WHAT", help="host,paths,tags; or none.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed, and why the rest stays.")
@click.pass_obj
def command(session: Session, /, **given: Any) -> int:
    """Apply a policy."""
    options, dry_run = _options(given), given["dry_run"]

    async def run() -> int:
        from coffret.engine.ops.prune import plan, prune

        async with session.repository("coffret.engine.ops.prune") as repository:
            decided = await plan(repository, options)
            if session.globals.json or session.globals.verbose or dry_run:
                for group, decisions in decided.items():
                    _show(session, group, decisions)
            if not dry_run:
                await prune(repository, decided)
        everything = [decision for decisions in decided.values() for decision in decisions]
        going = [decision.snapshot for decision in everything if not decision.keep]
        kept = len(everything) - len(going)
        session.display.summary(
            f"prune: would remove {counted(len(going), 'snapshot')} and keep {kept:,}"
            if dry_run
            else f"prune: removed {counted(len(going), 'snapshot')}, kept {kept:,}",
            removed=len(going),
            kept=kept,
            snapshot_ids=[snapshot.id for snapshot in going],
            dry_run=dry_run,
        )
        return 0

    return session.run(run)


def _options(given: dict[str, Any]) -> PruneOptions:
    """What is asked for.

    :raises UsageError: if it makes no sense, or nothing says what to keep
    """
    from coffret.engine.ops.prune import PruneOptions

    policy = Policy(
        **{name: _count(f"--keep-{name}", given[f"keep_{name}"]) for name in _COUNTED},
        within=Duration() if given["keep_within"] is None else parse_duration(given["keep_within"]),
        tags=tuple(found for text in given["keep_tag"] for found in tag_sets(text)),
    )
    if policy.empty:
        raise UsageError(
            "nothing says which snapshots to keep",
            remedy="give a --keep-... option; `coffret at REPO maintenance` gives back space of what was removed",
        )
    return PruneOptions(
        policy,
        hosts=given["host"],
        tags=[found for text in given["tag"] for found in tag_sets(text)],
        paths=[os.fsencode(os.path.abspath(path)) for path in given["path"]],
        group_by=parse_group_by(given["group_by"]),
    )


def _count(option: str, text: str | None) -> int:
    """How many to keep.

    :raises UsageError: if it is no number
    """
    if text is None:
        return 0
    if text in ("unlimited", "-1"):
        return UNLIMITED
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(f"{option} wants a number, or `unlimited`, not {text!r}", remedy="see `coffret prune --help`")
    return int(text)


def _show(session: Session, group: Group, decisions: list[Decision]) -> None:
    """What becomes of each snapshot of a group, and why."""
    described = [f"{name} {' '.join(map(_text, values)) or '(none)'}" for name, values in group]
    session.display.line(", ".join(described) + ":" if described else "all:")
    for decision in decisions:
        reasons = ", ".join(decision.reasons) or "nothing keeps it"
        action = "keep  " if decision.keep else "remove"
        session.display.line(f"  {action}   {snapshot_line(decision.snapshot)}   {_text(reasons)}")
        session.display.item(**snapshot_fields(decision.snapshot), keep=decision.keep, reasons=list(decision.reasons))


def _text(value: str | bytes) -> str:
    return printable(value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape"))
