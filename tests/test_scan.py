"""The walk by itself: where it goes, what it leaves out, and by which paths files will be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.harness import IS_ROOT, Program, Recorder, repository

from coffret.engine.catalog import Cutter
from coffret.engine.errors import SourceError
from coffret.engine.filters import Filters
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.scan import Roots, Scanner, ScanOptions

if TYPE_CHECKING:
    from coffret.engine.messages import Read

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough for what is tested here."""
    return "asyncio"


class Walk:
    """A scan of paths: `entries`, `reads` and `faults` by absolute path."""

    def __init__(self, *paths: Path | str, **options: object) -> None:
        self.entries: set[str] = set()
        self.reads: dict[str, Read] = {}
        self.faults: dict[str, str] = {}
        self.scanner = Scanner(
            Roots([os.fsencode(path) for path in paths], self._fault),
            ScanOptions(**options),  # type: ignore[arg-type]
            cutter=Cutter(bytes(32)),
            parent=None,
            store=lambda payload: bytes(36),
            fault=self._fault,
        )

    def run(self) -> Walk:
        """Walk to the end."""
        while pages := self.scanner.next(8):
            for page in pages:
                self.reads.update({os.fsdecode(read.path): read for read in page.reads})
                for directory, entries in page.sections:
                    prefix = "/" + os.fsdecode(directory) + "/" if directory else "/"
                    self.entries.update(prefix + os.fsdecode(entry.name) for entry in entries if entry is not None)
        self.entries |= self.reads.keys()
        return self

    def _fault(self, path: bytes, reason: str) -> None:
        self.faults[os.fsdecode(path)] = reason


def test_one_file_system_from_the_root() -> None:
    """All of the root's file system, no less, even if it is the root that was named."""
    device = os.stat("/").st_dev
    candidates = (path for path in Path("/").iterdir() if path.is_dir() and not path.is_symlink())
    below = [path for path in candidates if path.stat().st_dev == device and os.listdir(path)]
    if not below:
        pytest.skip("the root's file system holds nothing here")
    names = sorted(os.listdir(below[0]))
    patterns = ["/*", f"!{below[0]}", f"{below[0]}/*", f"!{below[0]}/{names[0]}", f"{below[0]}/{names[0]}/*"]
    walk = Walk("/", one_file_system=True, filters=Filters(excludes=patterns)).run()
    assert str(below[0] / names[0]) in walk.entries


def test_a_typed_path_too_long_for_one_call(tmp_path: Path) -> None:
    """Directories on the way to what was named, with paths near PATH_MAX and beyond it."""
    part = "d" * 250
    path, depth = str(tmp_path), 0
    folder = os.open(tmp_path, os.O_RDONLY)
    while len(path) < 5000:
        os.mkdir(part, dir_fd=folder)
        deeper = os.open(part, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder, path, depth = deeper, f"{path}/{part}", depth + 1
        if len(path) > 3600:
            for name in ("file", "other"):
                os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=folder))
            walk = Walk(f"{path}/file").run()
            assert walk.faults == {}
            assert f"{path}/file" in walk.reads, len(path)
            assert f"{path}/other" not in walk.reads
    os.close(folder)


def test_the_current_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SourceError, match="current directory"):
        Walk("relative")
    assert Walk(tmp_path).run().faults == {}


class TestLinks:
    def test_files_are_read_where_the_named_link_leads(self, tmp_path: Path) -> None:
        """What is told is the name that was given; what is opened has no link in its path."""
        (tmp_path / "real" / "sub").mkdir(parents=True)
        (tmp_path / "real" / "sub" / "file").touch()
        (tmp_path / "real" / "file").touch()
        (tmp_path / "link").symlink_to("real")
        (tmp_path / "named").symlink_to("real/file")
        walk = Walk(tmp_path / "link", tmp_path / "named").run()
        link, real = tmp_path / "link", tmp_path / "real"
        expected = {link / "file": real / "file", link / "sub" / "file": real / "sub" / "file"}
        expected[tmp_path / "named"] = real / "file"
        assert {Path(path): Path(os.fsdecode(read.source)) for path, read in walk.reads.items()} == expected
        # Named by way of it, and within what is named itself.
        for paths in ((link / "sub",), (tmp_path, link / "sub", link)):
            walk = Walk(*paths).run()
            assert walk.faults == {}
            assert Path(os.fsdecode(walk.reads[str(link / "sub" / "file")].source)) == real / "sub" / "file"

    def test_a_directory_that_becomes_a_link(self, tmp_path: Path) -> None:
        """A link put in the place of a directory after it was listed leads the walk nowhere."""
        (tmp_path / "secret" / "sub").mkdir(parents=True)
        (tmp_path / "secret" / "sub" / "key").touch()
        source = tmp_path / "source"
        (source / "a" / "sub").mkdir(parents=True)

        class Swap(Filters):
            def enter(self, directory, names, read, parent):  # type: ignore[no-untyped-def]
                if directory == os.fsencode(source / "a")[1:]:
                    (source / "a").rename(source / "before")
                    (source / "a").symlink_to(tmp_path / "secret")
                return super().enter(directory, names, read, parent)

        walk = Walk(source, filters=Swap()).run()
        assert not any("key" in path for path in walk.reads)
        assert walk.faults == {str(source / "a" / "sub"): "Too many levels of symbolic links"}

    @pytest.mark.parametrize("size", [10, 6 << 20], ids=["small", "large"])
    async def test_a_directory_that_is_a_link_when_its_files_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        for name, content in (("secret", b"s" * size), ("source/a", b"m" * size)):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "file").write_bytes(content)
        source, following = tmp_path / "source", Scanner.next

        def swapped(self: Scanner, count: int):  # type: ignore[no-untyped-def]
            pages = following(self, count)
            if (source / "a").is_dir() and not (source / "a").is_symlink():
                (source / "a").rename(tmp_path / "aside")
                (source / "a").symlink_to(tmp_path / "secret")
            return pages

        monkeypatch.setattr(Scanner, "next", swapped)
        progress = Recorder()
        async with repository(tmp_path) as opened:
            made = await opened.backup([bytes(source)], None, progress)
        assert progress.faults == {bytes(source / "a" / "file"): "Too many levels of symbolic links"}
        assert made.counts.read_bytes == 0


@pytest.mark.parametrize("ignore_ctime", [False, True])
@pytest.mark.skipif(not IS_ROOT, reason="only root may give files away")
async def test_another_owner_is_a_change(tmp_path: Path, ignore_ctime: bool) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("user", "group", "link", "stays"):
        (source / name).write_text(name)
        os.utime(source / name, (0, 0))
    options = BackupOptions(ignore_ctime=ignore_ctime)
    async with repository(tmp_path) as opened:
        first = await opened.backup([bytes(source)], options)
        assert first.counts.files == 4
        # What was just read is racy by its ctime: pretend that it is not.
        os.chown(source / "user", 1, -1)
        os.chown(source / "group", -1, 1)
        os.link(source / "link", tmp_path / "another")
        again = await opened.backup([bytes(source)], options)
        found = {}
        async for _, entries in opened.entries(again.snapshot, os.fsencode(source)[1:], recursive=True):
            found.update({entry.name: entry for entry in entries})
    assert (found[b"user"].uid, found[b"group"].gid) == (1, 1)
    assert found[b"link"].extra is not None
    assert found[b"link"].extra.nlink == 2


class TestOwnPlaces:
    def test_the_cache_above_the_source(self, tmp_path: Path) -> None:
        """Of a folder chosen for the cache only what Coffret keeps there is left out."""
        data = tmp_path / "data"
        (data / "source").mkdir(parents=True)
        (data / "source" / "file").touch()
        program = Program(tmp_path)
        program("create", "--no-encryption")
        for root in (data / "source", data, tmp_path):
            made = program.backup(root, "--cache-dir", data)
            assert made["errors"] == 0
            names = {Path(os.fsdecode(path)) for path in program.listing()}
            assert data / "source" / "file" in names
            assert not any(path.name == "data.mdb" for path in names)

    def test_a_source_within_the_default_folders(self, tmp_path: Path) -> None:
        program = Program(tmp_path)
        program("create", "--no-encryption")
        mine = tmp_path / "cache" / "coffret" / "mine"
        mine.mkdir(parents=True)
        (mine / "file").touch()
        (tmp_path / "alias").symlink_to("cache/coffret/mine")
        for root in (mine, tmp_path / "alias", tmp_path / "cache" / "coffret"):
            assert program.backup(root)["files"] == 1

    def test_a_source_within_the_repository(self, tmp_path: Path) -> None:
        """Nothing is left out in silence that was asked for."""
        program = Program(tmp_path)
        program("create", "--no-encryption")
        packs = program.repository / "packs"
        outcome = program("backup", "--json", packs, code=3)
        assert outcome.faults == {bytes(packs): "left out: it is the repository, or Coffret's cache or state"}
