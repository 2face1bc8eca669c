"""`coffret backup`, and `push`, which is the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coffret.commands.line import EPILOG, PARTLY
from coffret.display import counted, paths_fields
from coffret.engine.errors import UsageError
from coffret.engine.settings import COMPRESSION_LEVELS
from coffret.engine.units import format_duration, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.commands.running import Session
    from coffret.engine.filters import Filters
    from coffret.engine.flow import ChannelStatistics
    from coffret.engine.ops.backup import BackupOptions, BackupSummary


@click.command(
    epilog=EPILOG,
    help="Back up PATHs (default: the current directory) as one snapshot; `-` is standard input.",
)
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out what matches (gitignore rules, from /).")
@click.option("--exclude-file", multiple=True, metavar="FILE", help="Leave out what matches a line of FILE.")
@click.option("--ignore-file", multiple=True, metavar="NAME", help="Honour files of this name, like .gitignore.")
@click.option("--exclude-caches", is_flag=True, help="Leave out the content of directories with a CACHEDIR.TAG.")
@click.option("--exclude-larger-than", metavar="SIZE", help="Leave out files larger than SIZE (10M, 1.5GiB).")
@click.option("--one-file-system", is_flag=True, help="Do not cross into other file systems.")
@click.option("--tag", multiple=True, metavar="TAG", help="Tag the snapshot.")
@click.option("--host", default="", metavar="NAME", help="Record this host name.")
@click.option("--force", is_flag=True, help="Read all files, unchanged or not.")
@click.option("--ignore-inode", is_flag=True, help="Do not take another inode number for a change.")
@click.option("--ignore-ctime", is_flag=True, help="Do not take another ctime for a change.")
@click.option("--compression", type=click.Choice(list(COMPRESSION_LEVELS)), default="default", show_default=True)
@click.option("--dry-run", is_flag=True, help="Tell what would be read and added; store nothing.")
@click.option("--stdin-name", metavar="NAME", help="The file name for standard input.")
@click.option(
    "--stdin-command",
    metavar="CMD",
    help="Back up what CMD prints; fails when CMD fails. It is run without a shell: for pipes say \"sh -c '...'\".",
)
@click.pass_obj
def command(session: Session, /, paths: tuple[str, ...], **given: Any) -> int:
    """Back up and report."""
    display = session.display
    display.dry_run = given["dry_run"]
    filters = _filters(given)

    if not given["stdin_name"]:
        _warn_of_idle(session, given["exclude"], paths)

    async def backup() -> int:
        from coffret.engine.stream import StreamSource

        source = StreamSource.asked_for(paths, name=given["stdin_name"], command=given["stdin_command"])
        roots = [os.fsencode(path) for path in paths] or [b"."]
        async with session.repository("coffret.engine.ops.backup", writing=not given["dry_run"]) as repository:
            options = _options(session, given, filters)
            summary = await repository.backup(source or roots, options, display.progress)
        return _report(session, summary, dry_run=given["dry_run"])

    return session.run(backup, progress=True)


def _warn_of_idle(session: Session, excludes: Sequence[str], paths: Sequence[str]) -> None:
    """Note patterns that were meant to begin in the current directory: they match nothing."""
    if not excludes:
        return
    from coffret.engine.filters import MATCHES_NOTHING, idle_patterns

    roots = [os.path.abspath(os.fsencode(path))[1:] for path in paths or ["."]]
    for pattern in idle_patterns(excludes, roots):
        session.display.note(f"{pattern!r} {MATCHES_NOTHING}")


def _filters(given: dict[str, Any]) -> Filters | None:
    wanted = (given["exclude"], given["exclude_file"], given["ignore_file"])
    if not any(wanted) and not given["exclude_caches"] and given["exclude_larger_than"] is None:
        return None
    from coffret.engine.filters import Filters

    limit = given["exclude_larger_than"]
    return Filters(
        excludes=given["exclude"],
        exclude_files=[Path(file) for file in given["exclude_file"]],
        ignore_names=given["ignore_file"],
        exclude_caches=given["exclude_caches"],
        exclude_larger_than=parse_size(limit) if limit is not None else None,
    )


def _options(session: Session, given: dict[str, Any], filters: Filters | None) -> BackupOptions:
    from coffret.engine.ops.backup import BackupOptions
    from coffret.engine.pipeline import Limits

    limits = Limits()
    workers = session.globals.workers or limits.workers
    return BackupOptions(
        tags=[_text("--tag", tag) for tag in given["tag"]],
        host=_text("--host", given["host"]),
        force=given["force"],
        filters=filters,
        one_file_system=given["one_file_system"],
        ignore_inode=given["ignore_inode"],
        ignore_ctime=given["ignore_ctime"],
        level=COMPRESSION_LEVELS[given["compression"]],
        dry_run=given["dry_run"],
        tell_state=bool(session.display.as_json or session.display.verbose) and not given["dry_run"],
        limits=Limits(workers=workers),
    )


def _text(option: str, value: str) -> str:
    """A value that is stored as text.

    :raises UsageError: if it is not UTF-8
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} is not UTF-8", remedy="give it in UTF-8") from None
    return value


def _report(session: Session, summary: BackupSummary, *, dry_run: bool) -> int:
    header, counts, progress = summary.snapshot.header, summary.counts, session.display.progress
    state = summary.state
    duration_s = summary.duration_ns / 1e9
    size, duration = format_size(counts.size_bytes), format_duration(duration_s)
    tail = f", {counted(counts.errors, 'error')}" if counts.errors else ""
    if dry_run:
        read = f"{counted(progress.read_files, 'file')} of {format_size(counts.read_bytes)} to read"
        text = (
            f"backup: would create an unsigned snapshot of size {size} in {duration}: "
            f"{read}, {format_size(counts.added_bytes)} to add{tail}"
        )
    else:
        text = f"backup: created unsigned snapshot {summary.snapshot.short_id} of size {size} in {duration}{tail}"
    if state is not None and not session.display.quiet:
        session.display.line(f"state {state}")
    session.display.summary(
        text,
        state=state,
        snapshot_id=None if dry_run else summary.snapshot.id,
        short_id=None if dry_run else summary.snapshot.short_id,
        parent_id=header.parent.hex() or None,
        dry_run=dry_run,
        **paths_fields(header.roots),
        files=counts.files,
        directories=counts.directories,
        others=counts.others,
        size_bytes=counts.size_bytes,
        new=progress.new,
        changed=progress.changed,
        unmodified=progress.unmodified,
        directories_new=progress.new_directories,
        directories_changed=progress.changed_directories,
        directories_unmodified=progress.unmodified_directories,
        files_read=progress.read_files,
        bytes_read=counts.read_bytes,
        bytes_added=counts.added_bytes,
        bytes_stored=counts.stored_bytes,
        errors=counts.errors,
        duration_s=duration_s,
        queues=[_queue(channel) for channel in progress.channels],
    )
    return PARTLY if counts.errors else 0


def _queue(channel: ChannelStatistics) -> dict[str, Any]:
    return {
        "name": channel.name,
        "items": channel.items,
        "bytes": channel.size_bytes,
        "peak_items": channel.peak_items,
        "peak_bytes": channel.peak_bytes,
        "sender_wait_s": round(channel.sender_wait_s, 4),
        "receiver_wait_s": round(channel.receiver_wait_s, 4),
    }
