"""`coffret sync`."""

from __future__ import annotations

import os
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from coffret.commands.line import EPILOG, PARTLY
from coffret.commands.ls import iso_time
from coffret.display import counted, paths_fields, printable
from coffret.engine.opening import bare_storage, check_two
from coffret.engine.settings import COMPRESSION_LEVELS
from coffret.engine.units import parse_moment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.commands.running import Session
    from coffret.engine.ops.sync import SyncOptions
    from coffret.engine.repository import Repository
    from coffret.engine.selection import Selection
    from coffret.engine.snapshot import Snapshot

DIRECTIONS = ("to", "from", "with")
KEEP = "keep"


class Leg(NamedTuple):
    """One direction of a sync: what is read, what is written, and how they are called."""

    source: Repository
    target: Repository
    direction: str


@click.command(
    epilog=EPILOG,
    help="Copy snapshots that one repository lacks: `to` the peer (also when no direction is given), `from` it, or both"
    " ways, `with` it. They keep their ids; only what is missing is transferred. The peer's passphrase comes from"
    " COFFRET_PEER_PASSPHRASE, COFFRET_PEER_PASSPHRASE_FILE or COFFRET_PEER_PASSPHRASE_COMMAND, or is asked for.",
)
@click.argument("words", nargs=-1, required=True, metavar="[to|from|with] PEER [SNAPSHOT]...")
@click.option("--tag", multiple=True, metavar="TAG", help="Only snapshots with this tag.")
@click.option("--host", multiple=True, metavar="NAME", help="Only snapshots of this host.")
@click.option("--path", multiple=True, metavar="PATH", help="Only snapshots of this path, or of one above it.")
@click.option("--since", metavar="TIME", help="Only snapshots from TIME on: 2026-11-22, 2026-11-22T21:38, or 30d ago.")
@click.option("--before", metavar="TIME", help="Only snapshots from before TIME.")
@click.option("--latest", type=click.IntRange(1), metavar="N", help="Only the N latest of each host and path.")
@click.option(
    "--compression",
    type=click.Choice([KEEP, *COMPRESSION_LEVELS]),
    default=KEEP,
    show_default=True,
    help="Compress anew; `keep` takes over what is compressed already.",
)
@click.option("--dry-run", is_flag=True, help="Tell what would be copied; copy nothing.")
@click.pass_obj
def command(session: Session, /, words: tuple[str, ...], **given: Any) -> int:
    """Copy and report."""
    direction, peer, named = _sorted(words)
    selection = _selection(named, given)
    session.display.dry_run = given["dry_run"]

    async def sync() -> int:
        writing = not given["dry_run"]
        # What is no location at all is told before a passphrase is asked for.
        async with (
            bare_storage(session.location, session.options) as here,
            bare_storage(peer, session.peer_options) as there,
        ):
            check_two(here, there)
        async with AsyncExitStack() as stack:
            ahead = "coffret.engine.ops.sync"
            mine = await stack.enter_async_context(session.repository(ahead, writing=writing and direction != "to"))
            other = await stack.enter_async_context(session.peer(peer, writing=writing and direction != "from"))
            legs = []
            if direction in ("to", "with"):
                legs.append(Leg(mine, other, "to"))
            if direction in ("from", "with"):
                legs.append(Leg(other, mine, "from"))
            return await _legs(session, legs, selection, given)

    return session.run(sync, progress=True)


def _sorted(words: Sequence[str]) -> tuple[str, str, Sequence[str]]:
    """(direction, peer, snapshots) of what was said.

    :raises UsageError: if no peer was
    """
    direction, rest = ("to", words) if words[0] not in DIRECTIONS else (words[0], words[1:])
    if not rest:
        raise click.UsageError(f"{direction} what? A peer is missing (a folder of that name is ./{direction})")
    return direction, rest[0], rest[1:]


def _selection(named: Sequence[str], given: dict[str, Any]) -> Selection:
    from coffret.engine.selection import Selection

    now_ns = time.time_ns()
    return Selection(
        named=named,
        tags=given["tag"],
        hosts=given["host"],
        paths=[os.path.abspath(os.fsencode(path)) for path in given["path"]],
        since_ns=parse_moment(given["since"], now_ns) if given["since"] else None,
        before_ns=parse_moment(given["before"], now_ns) if given["before"] else None,
        latest=given["latest"],
    )


def _options(session: Session, leg: Leg, compression: str) -> SyncOptions:
    from coffret.engine.ops.sync import SyncOptions

    def show(snapshot: Snapshot) -> None:
        _show(session, leg, snapshot)

    if compression == KEEP:
        return SyncOptions(on_copied=show)
    return SyncOptions(level=COMPRESSION_LEVELS[compression], repack=True, on_copied=show)


async def _legs(session: Session, legs: Sequence[Leg], selection: Selection, given: dict[str, Any]) -> int:
    """Find out what is lacking where, before anything is copied; then copy it, and report."""
    from coffret.engine.ops.sync import Lacking, check_pair, lacking

    found: list[tuple[Leg, Lacking]] = []
    listed = {id(each): await each.listed() for each in (legs[0].source, legs[0].target)}
    for leg in legs:
        check_pair(leg.source, leg.target)
        source, target = listed[id(leg.source)], listed[id(leg.target)]
        found.append((leg, lacking(source, target, selection, both_ways=len(legs) > 1)))
    copied = damaged = 0
    one, other = legs[0].source, legs[0].target
    if one.config.repository_id == other.config.repository_id:
        session.display.note("both have one id: one is a clone of the other, or they are one repository, and no copy")
    for repository in (one, other):
        for _, reason in listed[id(repository)].damaged:
            session.display.note(f"{repository.connector.location}: left out, since it is damaged: {reason}")
    if not selection.named:  # what else may be meant can't be copied
        damaged = sum(len(listed[id(leg.source)].damaged) for leg in legs)
    for leg, lack in found:
        if lack.removed:
            _tell_removed(session, leg, lack.removed)
        if given["dry_run"]:
            copied += len(lack.snapshots)
            for snapshot in lack.snapshots:
                _show(session, leg, snapshot)
        else:
            options = msgspec.structs.replace(
                _options(session, leg, given["compression"]), back=lack.back, shared=lack.shared
            )
            summary = await leg.target.sync(leg.source, lack.snapshots, options, session.display.progress)
            copied, damaged = copied + len(summary.copied), damaged + len(summary.damaged)
    progress = session.display.progress
    verb = "would synchronize" if given["dry_run"] else "synchronized"
    tail = f", {counted(damaged, 'damaged snapshot')} left out" if damaged else ""
    session.display.summary(
        f"sync: {verb} {counted(copied, 'snapshot')}{tail}",
        snapshots=copied,
        damaged=damaged,
        dry_run=given["dry_run"],
        bytes_read=progress.read_bytes,
        bytes_added=progress.added_bytes,
        bytes_stored=progress.stored_bytes,
        duration_s=session.display.elapsed_s,
    )
    return PARTLY if damaged else 0


def _tell_removed(session: Session, leg: Leg, removed: Sequence[Snapshot]) -> None:
    """Say what is not copied again, and how it would be."""
    ids = " ".join(snapshot.short_id for snapshot in removed)
    session.display.note(
        f"not copied to {leg.target.connector.location}, where it was removed: {ids} (name it to have it back)"
    )


def _show(session: Session, leg: Leg, snapshot: Snapshot) -> None:
    """Tell of a snapshot that was copied, or, in a dry run, would be."""
    header = snapshot.header
    paths = " ".join(printable(root) for root in header.roots)
    if session.display.dry_run:
        where = printable(os.fsencode(leg.target.connector.location))
        session.display.line(f"sync: would copy {snapshot.short_id} to {where}: {paths}")
    elif session.display.verbose and not session.display.quiet:
        session.display.line(f"{snapshot.short_id}: OK ✓ {paths}")
    session.display.item(
        snapshot_id=snapshot.id,
        short_id=snapshot.short_id,
        direction=leg.direction,
        time=iso_time(header.time_ns),
        host=header.host,
        **paths_fields(header.roots),
        size_bytes=header.counts.size_bytes,
    )
