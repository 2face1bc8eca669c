"""What tests of restore and check share: a small tree that was backed up, and damage to what it became."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING

from tests.harness import Recorder, repository
from tests.trees import describe, differences

from coffret.engine.catalog_reader import Catalog
from coffret.engine.fetch import Fetcher
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.ops.restore import RestoreOptions
from coffret.engine.packfile import pack_name
from coffret.engine.pipeline import Limits
from coffret.engine.records import ID_BYTES, iter_refs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from coffret.engine.mirror import Location
    from coffret.engine.repository import Repository
    from coffret.engine.snapshot import Snapshot

MIB = 1 << 20


class Case:
    """A repository, the snapshot of a directory `source`, and a target to restore it to."""

    def __init__(self, opened: Repository, place: Path) -> None:
        self.opened, self.place = opened, place
        self.source, self.target = place / "source", place / "target"
        self.snapshot: Snapshot
        self.progress = Recorder()

    async def back_up(self, *paths: Path) -> None:
        """Make the snapshot that is meant from now on."""
        roots = [os.fsencode(path) for path in paths or (self.source,)]
        made = await self.opened.backup(roots, BackupOptions(limits=Limits(workers=1)))
        self.snapshot = made.snapshot
        await self.opened.commits()  # brings the readers' view of the index up to date

    async def restore(self, path: Path | str | None = None, **options: object) -> dict[str, str]:
        """Restore; return the faults by their paths below the source ("" is the source)."""
        progress = Recorder()
        summary = await self.opened.restore(
            self.snapshot,
            os.fsencode(self.target),
            path=None if path is None else os.fsencode(path),
            options=RestoreOptions(**options),  # type: ignore[arg-type]
            progress=progress,
        )
        assert summary.errors == len(progress.faults)
        self.progress = progress
        return {os.fsdecode(path).removeprefix(f"{self.source}")[1:]: why for path, why in progress.faults.items()}

    def restored(self) -> set[str]:
        """What is in the target."""
        return {str(path.relative_to(self.target)) for path in self.target.rglob("*")}

    def file_of(self, pack: bytes) -> Path:
        """Where a pack lies."""
        return self.place / "repository" / pack_name(pack)

    def same(self) -> None:
        """The target holds what the source does."""
        assert differences(describe(self.source), describe(self.target)) == []


@asynccontextmanager
async def case(place: Path) -> AsyncIterator[Case]:
    """A small tree, backed up: two large files, some small ones, links of all kinds."""
    made = place / "source"
    random = Random(9)
    for name in ("a/b/c", "a/d", "e", "empty"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(random.randbytes(2000) if name != "empty" else b"")
    for name in ("large", "a/large"):
        (made / name).write_bytes(random.randbytes(6 * MIB))
    (made / "a" / "link").symlink_to("b")
    (made / "a" / "b" / "linked").hardlink_to(made / "e")
    os.mkfifo(made / "fifo")
    os.utime(made / "a", ns=(1, 1_000_000_001))
    async with repository(place) as opened:
        each = Case(opened, place)
        await each.back_up()
        yield each


ALL = {"a", "a/b", "a/b/c", "a/b/linked", "a/d", "a/large", "a/link", "e", "empty", "fifo", "large"}


async def chunks(c: Case) -> dict[str, list[Location]]:
    """Where the chunks of each entry of the source lie: its content, or else its attributes."""
    found = {}
    async for directory, entries in c.opened.entries(c.snapshot, os.fsencode(c.source)[1:], recursive=True):
        for entry in entries:
            refs = entry.content or (entry.extra.xattrs_ref if entry.extra else b"")
            located = await c.opened.mirror.locate([chunk_id for chunk_id, _ in iter_refs(refs)])
            path = f"/{os.fsdecode(directory)}/{os.fsdecode(entry.name)}".removeprefix(f"{c.source}/")
            found[path] = [location for location in located if location is not None]
    return found


async def catalog_packs(c: Case) -> set[bytes]:
    """The packs that hold the pages of the snapshot's catalog."""
    found: set[bytes] = set()
    fetcher = Fetcher(c.opened.connector, c.opened.sealer, c.opened.mirror, id_key=c.opened.secrets.id_key)

    async def load(refs: Sequence[bytes]) -> list[bytes]:
        locations = await c.opened.mirror.locate([ref[:ID_BYTES] for ref in refs])
        found.update(location.pack for location in locations if location)
        return await fetcher.load(refs)

    async for _ in Catalog(c.snapshot.header.catalog, c.snapshot.header.depth, load).pages():
        pass
    return found


def flip(c: Case, block: Location) -> None:
    """Change a bit of a stored block."""
    flip_bit(c.file_of(block.pack), block.offset + block.stored_bytes // 2)


def flip_bit(path: Path, offset: int) -> None:
    """Change a bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
