"""`coffret ls`."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, Any

import click

from coffret.commands.line import EPILOG, PARTLY
from coffret.commands.running import Session, common_path, split_target
from coffret.display import counted, path_fields, paths_fields, printable
from coffret.engine.units import format_duration, format_size

if TYPE_CHECKING:
    from coffret.engine.records import Entry
    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character-device",
    stat.S_IFBLK: "block-device",
}


@click.command(
    epilog=EPILOG,
    help="List snapshots; or, of SNAPSHOT, all it holds; or, of SNAPSHOT:PATH, what PATH holds. What a backup could not"
    " read stands below its listing.",
)
@click.argument("snapshot", required=False, metavar="[SNAPSHOT[:PATH]]")
@click.option("-r", "--recursive", is_flag=True, help="List all that lies below PATH.")
@click.pass_obj
def command(session: Session, snapshot: str | None, recursive: bool) -> int:
    """List."""

    async def list_() -> int:
        async with session.repository(listing=True) as repository:
            if snapshot is None:
                commits = await repository.commits()
                for found in commits.snapshots:
                    show_snapshot(session, found)
                fields: dict[str, Any] = {"snapshots": len(commits.snapshots), "damaged": len(commits.damaged)}
            else:
                name, path = split_target(snapshot)
                found = await repository.find_snapshot(name)
                entries, damaged = await _entries(session, repository, found, path, recursive)
                faults = await _faults(session, repository, found, path)
                fields = {"snapshot_id": found.id, "entries": entries, "damaged": damaged, "faults": faults}
        session.display.summary("", **fields)
        return PARTLY if fields["damaged"] else 0

    return session.run(list_)


def iso_time(time_ns: int) -> str:
    """A time in UTC, as ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ns // 1_000_000_000))


def show_snapshot(session: Session, snapshot: Snapshot) -> None:
    """A line of a snapshot, or an item."""
    session.display.line(snapshot_line(snapshot))
    session.display.item(**snapshot_fields(snapshot))


def snapshot_line(snapshot: Snapshot) -> str:
    """Time, short id, size, duration, path, and how many paths could not be read, if any."""
    header = snapshot.header
    errors = f"   {counted(header.counts.errors, 'error')}" if header.counts.errors else ""
    return (
        f"{iso_time(header.time_ns)}   {snapshot.short_id}   {format_size(header.counts.size_bytes):>8}"
        f"   {format_duration(int(header.duration_ns / 1e9)):>5}   "
        f"{' '.join(printable(root) for root in header.roots)}{errors}"
    )


def snapshot_fields(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot in JSON."""
    header = snapshot.header
    return {
        "snapshot_id": snapshot.id,
        "short_id": snapshot.short_id,
        "time": iso_time(header.time_ns),
        "host": header.host,
        "user": header.user,
        **paths_fields(header.roots),
        **path_fields(common_path(header.roots)),
        "tags": header.tags,
        "size_bytes": header.counts.size_bytes,
        "files": header.counts.files,
        "errors": header.counts.errors,
        "duration_s": header.duration_ns / 1e9,
    }


async def _entries(
    session: Session, repository: Repository, snapshot: Snapshot, path: bytes | None, recursive: bool
) -> tuple[int, int]:
    """Show the entries; return how many there are, and how many parts of the listing are damaged."""
    count = damaged = 0

    def lost(begin: bytes, reason: str) -> None:
        nonlocal damaged
        damaged += 1
        session.display.progress.fault(begin, reason)

    start = b"" if path is None else path.strip(b"/")
    recursive = recursive or path is None
    async for directory, entries in repository.entries(snapshot, start, recursive=recursive, lost=lost):
        prefix = b"/" + directory + b"/" if directory else b"/"
        for entry in entries:
            _show(session, prefix + entry.name, entry)
        count += len(entries)
    return count, damaged


async def _faults(
    session: Session, repository: Repository, snapshot: Snapshot, path: bytes | None
) -> list[dict[str, str]]:
    """Show what the backup could not read as it should, at a path and below; return it for JSON."""
    recorded = await repository.faults(snapshot) if snapshot.header.counts.errors else []
    below = (path or b"").rstrip(b"/")
    found = [fault for fault in recorded if fault.path == below or fault.path.startswith(below + b"/")]
    for fault in found:
        session.display.aside(f"not backed up as it should be: {os.fsdecode(fault.path)}: {fault.reason}")
    if len(recorded) < snapshot.header.counts.errors:
        session.display.aside(f"{snapshot.header.counts.errors - len(recorded):,} more errors are not recorded")
    return [{**path_fields(fault.path), "reason": fault.reason} for fault in found]


def _owner(name: str, number: int) -> str:
    return printable(name.encode()) if name else str(number)


def _show(session: Session, path: bytes, entry: Entry) -> None:
    link = f" -> {printable(entry.extra.target)}" if entry.extra is not None and entry.extra.target else ""
    if not session.globals.json:
        session.display.line(
            f"{stat.filemode(entry.mode)} {_owner(entry.user, entry.uid):>8} {_owner(entry.group, entry.gid):>8} "
            f"{entry.size:>12} {iso_time(entry.mtime_ns)} {printable(path)}{link}"
        )
        return
    target = path_fields(entry.extra.target, "target") if link and entry.extra is not None else {}
    session.display.item(
        **path_fields(path),
        type=TYPES.get(stat.S_IFMT(entry.mode), "other"),
        mode=f"{stat.S_IMODE(entry.mode):04o}",
        uid=entry.uid,
        gid=entry.gid,
        user=entry.user,
        group=entry.group,
        size_bytes=entry.size,
        mtime=f"{iso_time(entry.mtime_ns)[:-1]}.{entry.mtime_ns % 1_000_000_000:09d}Z",
        **target,
    )
