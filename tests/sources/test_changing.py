"""Sources that change while they are read."""

from __future__ import annotations

import os
import shutil
import stat
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from tests.harness import Recorder, repository

from coffret.engine.dedup import dedup_stage
from coffret.engine.filters import Filters
from coffret.engine.ops.backup import BackupOptions, BackupSummary
from coffret.engine.pipeline import Limits
from coffret.engine.scan import Scanner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection
    from pathlib import Path

    from coffret.engine.filters import FilterScope
    from coffret.engine.flow import Channel, Sender
    from coffret.engine.messages import RawBlock, Run, ScanPage
    from coffret.engine.repository import Repository

MIB = 1 << 20


async def back_up(
    opened: Repository, source: Path, *, filters: Filters | None = None, slabs: int = 4
) -> tuple[BackupSummary, dict[bytes, str]]:
    """(summary, faults by path below the source) of a backup with one worker."""
    progress = Recorder()
    options = BackupOptions(filters=filters, limits=Limits(workers=1, slabs=slabs))
    made = await opened.backup([os.fsencode(source)], options, progress)
    assert made.counts.errors == len(progress.faults)
    assert {fault.path: fault.reason for fault in made.snapshot.header.faults} == progress.faults
    below = os.fsencode(source) + b"/"
    return made, {path.removeprefix(below): reason for path, reason in progress.faults.items()}


def contents_of(directory: Path) -> dict[str, bytes]:
    """The content of all files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


async def restored(opened: Repository, made: BackupSummary, target: Path) -> dict[str, bytes]:
    """The content of the files that come back."""
    summary = await opened.restore(made.snapshot, os.fsencode(target))
    assert summary.errors == 0
    return contents_of(target)


def after_the_scan(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Call `change` when everything is scanned and nothing is read: no page leaves the scan before."""
    pages: list[ScanPage] | None = None
    real = Scanner.next

    def next_pages(self: Scanner, count: int) -> list[ScanPage]:
        nonlocal pages
        if pages is None:
            pages = []
            while found := real(self, count):
                pages += found
            change()
        given, pages[:] = pages[:count], pages[count:]
        return given

    monkeypatch.setattr(Scanner, "next", next_pages)


def after_the_first_slab(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Call `change` when the first slab of a large file is full: if there is no other, nothing more is read before."""

    class Watched:
        def __init__(self, inbox: Channel[Run]) -> None:
            self.inbox, self.done = inbox, False

        async def __aiter__(self) -> AsyncIterator[Run]:
            async for run in self.inbox:
                if run.slab is not None and not self.done:
                    self.done = True
                    change()
                yield run

    async def watched_stage(inbox: Channel[Run], outbox: Sender[RawBlock], **others: Any) -> None:
        await dedup_stage(Watched(inbox), outbox, **others)  # type: ignore[arg-type]

    monkeypatch.setattr("coffret.engine.pipeline.dedup_stage", watched_stage)


class ChangingFilters(Filters):
    """Filters that leave nothing out, but call `change` when a directory has been listed and its entries not yet."""

    def __init__(self, directory: Path, change: Callable[[], None]) -> None:
        super().__init__()
        self._directory, self._change = os.fsencode(directory)[1:], change

    def enter(
        self,
        directory: bytes,
        names: Collection[bytes],
        read: Callable[[bytes], bytes | None],
        parent: FilterScope | None,
    ) -> FilterScope:
        if directory == self._directory:
            self._change()
        return super().enter(directory, names, read, parent)


@pytest.mark.anyio
class TestMovingSource:
    async def test_between_scan_and_read(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = place / "source"
        random = Random(3)
        contents: dict[str, bytes] = {}
        for name in ("vanishes", "fifo", "directory", "link", "socket", "grows", "shrinks", "outgrows", "stays"):
            for size, kind in ((3000, "small"), (6 * MIB, "large")):
                path = source / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                contents[f"{kind}/{name}"] = random.randbytes(size)
                path.write_bytes(contents[f"{kind}/{name}"])

        def change() -> None:
            for kind in ("small", "large"):
                for name in ("vanishes", "fifo", "directory", "link", "socket"):
                    (source / kind / name).unlink()
                    del contents[f"{kind}/{name}"]
                os.mkfifo(source / kind / "fifo")
                (source / kind / "directory").mkdir()
                (source / kind / "link").symlink_to("stays")
                os.mknod(source / kind / "socket", stat.S_IFSOCK | 0o600)
                # What is longer or shorter than the scan saw is whole when it is read: no fault.
                for name, content in (
                    ("grows", contents[f"{kind}/grows"] * 2),
                    ("shrinks", contents[f"{kind}/shrinks"][:100]),
                    ("outgrows", random.randbytes(9 * MIB)),
                ):
                    (source / kind / name).write_bytes(content)
                    contents[f"{kind}/{name}"] = content

        after_the_scan(monkeypatch, change)
        async with repository(place) as opened:
            made, faults = await back_up(opened, source)
            reasons = {
                "vanishes": "No such file or directory",
                "fifo": "is no regular file any more",
                "directory": "is no regular file any more",
                "link": "Too many levels of symbolic links",
                "socket": "No such device or address",
            }
            assert faults == {
                f"{kind}/{name}".encode(): reason for kind in ("small", "large") for name, reason in reasons.items()
            }
            assert made.counts.files == len(contents)
            assert await restored(opened, made, place / "target") == contents

    @pytest.mark.parametrize("how", ["grows", "shrinks", "is rewritten", "vanishes"])
    async def test_while_it_is_read(self, place: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        source = place / "source"
        source.mkdir()
        content, file = Random(7).randbytes(20 * MIB), source / "large"
        file.write_bytes(content)
        (source / "small").write_text("small")
        os.utime(file, ns=(0, 0))

        def change() -> None:
            with file.open("r+b") as opened_file:
                if how == "grows":
                    opened_file.seek(0, os.SEEK_END)
                    opened_file.write(b"more")
                elif how == "shrinks":
                    opened_file.truncate(12 * MIB + 5)
                elif how == "is rewritten":
                    opened_file.seek(-6, os.SEEK_END)
                    opened_file.write(b"edited")
            if how == "vanishes":
                file.unlink()

        expected = {"shrinks": content[: 12 * MIB + 5], "is rewritten": content[:-6] + b"edited"}.get(how, content)
        after_the_first_slab(monkeypatch, change)
        async with repository(place) as opened:
            made, faults = await back_up(opened, source, slabs=1)
            # An open file stays readable when its name is gone.
            assert faults == ({} if how == "vanishes" else {b"large": "changed while it was read"})
            found = await restored(opened, made, place / "target")
            assert found == {"large": expected, "small": b"small"}
            # The next backup reads it once more.
            monkeypatch.undo()
            if how != "vanishes":
                again, faults = await back_up(opened, source)
                assert faults == {}
                assert again.counts.read_bytes >= file.stat().st_size
                shutil.rmtree(place / "target")
                assert (await restored(opened, again, place / "target"))["large"] == file.read_bytes()

    async def test_a_sparse_file_that_is_emptied(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = place / "source"
        source.mkdir()
        with (source / "sparse").open("wb") as file:
            file.write(Random(1).randbytes(20 * MIB))
            file.truncate(60 * MIB)
        after_the_first_slab(monkeypatch, lambda: os.truncate(source / "sparse", 0))
        async with repository(place) as opened:
            made, faults = await back_up(opened, source, slabs=1)
            assert faults == {b"sparse": "changed while it was read"}
            assert len((await restored(opened, made, place / "target"))["sparse"]) == 60 * MIB

    async def test_while_it_is_scanned(self, place: Path) -> None:
        """Listed and gone; a directory gone, or another thing, before it was its turn."""
        source = place / "source"
        for name in ("a/file", "gone-directory/inside", "file-now/inside", "z/file", "changed"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(name)
        (source / "gone").touch()

        def before() -> None:
            (source / "gone").unlink()
            (source / "changed").unlink()
            (source / "changed").mkdir()

        def between() -> None:
            shutil.rmtree(source / "gone-directory")
            shutil.rmtree(source / "file-now")
            (source / "file-now").touch()

        async with repository(place) as opened:
            made, faults = await back_up(opened, source, filters=ChangingFilters(source, before))
            assert faults == {b"gone": "No such file or directory", b"changed": "is no regular file any more"}
            made, faults = await back_up(opened, source, filters=ChangingFilters(source / "a", between))
            assert faults == {b"gone-directory": "No such file or directory", b"file-now": "Not a directory"}
            found = await restored(opened, made, place / "target")
            assert found == {"a/file": b"a/file", "z/file": b"z/file"}
            assert (place / "target" / "changed").is_dir()
