"""Check and restore of damaged repositories: what damage costs, what makes up for it, and that all of it is seen."""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.harness import Program, Recorder, repository
from tests.restore.case import MIB, Case, case, catalog_packs, chunks, flip_bit

from coffret.connectors.errors import ConnectorError
from coffret.connectors.local import LocalConnector
from coffret.engine import sealing
from coffret.engine.catalog_walk import open_page
from coffret.engine.errors import ChunkMissing, UsageError
from coffret.engine.fetch import Fetcher
from coffret.engine.index import open_index
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.ops.check import CheckOptions, check_packs
from coffret.engine.packfile import pack_name
from coffret.engine.pipeline import Limits
from coffret.engine.records import encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from coffret.engine.catalog_walk import LoadedPage
    from coffret.engine.ops.check import CheckSummary
    from coffret.engine.records import PackTable, PageRef

pytestmark = pytest.mark.anyio
FAST, FULL = CheckOptions(fast=True), CheckOptions()


class Checked:
    """What a check said: its summary, faults by path, notes."""

    def __init__(self, summary: CheckSummary, progress: Recorder) -> None:
        self.summary, self.faults, self.notes = summary, progress.faults, progress.notes

    @property
    def files(self) -> set[str]:
        """The names of damaged files."""
        return {os.fsdecode(path).rpartition("/")[2] for path in self.faults if b":/" in path}


async def checked(c: Case, options: CheckOptions = FULL, path: bytes | None = None, *, one: bool = False) -> Checked:
    """Check the repository; with `one` or a path, the snapshot."""
    progress = Recorder()
    targets = [(c.snapshot, path)] if one or path is not None else None
    return Checked(await c.opened.check(targets, options, progress), progress)


async def tables(c: Case) -> list[tuple[str, PackTable]]:
    """All pack tables, with the index object each is in."""
    found = []
    async for info in c.opened.connector.list("index/"):
        index = open_index(c.opened.sealer, info.name, await c.opened.connector.get(info.name))
        found += [(info.name, table) for table in index.packs]
    return found


async def put_index(c: Case, tables: Sequence[PackTable]) -> str:
    """Publish an index object of an attempt that was never heard of."""
    attempt = os.urandom(16)
    name = f"index/{attempt.hex()}-0"
    body = c.opened.sealer.seal(sealing.INDEX, name, attempt, encode({"packs": list(tables)}))
    await c.opened.connector.put(name, [body])
    return name


@asynccontextmanager
async def reopened(c: Case) -> AsyncIterator[Case]:
    """The repository opened once more, by the same user, with the same cache."""
    async with repository(c.place) as opened:
        other = Case(opened, c.place)
        other.snapshot = c.snapshot
        await opened.commits()
        yield other


class TestOtherCopies:
    """Everything is there twice, in packs of their own."""

    async def twice(self, c: Case) -> list[bytes]:
        """Store all once more, and return the packs there were before, but for those of the catalog."""
        first = [table.pack for _, table in await tables(c) if table.pack not in await catalog_packs(c)]
        index = c.place / "repository" / "index"
        index.rename(c.place / "aside")
        index.mkdir()
        for path in list((c.place / "repository" / "snapshots").iterdir()):
            path.rename(c.place / "aside" / path.name)
        async with repository(c.place) as opened:
            await opened.backup([os.fsencode(c.source)], BackupOptions(limits=Limits(workers=1), force=True))
        for path in (c.place / "aside").iterdir():
            path.rename((index if "-" in path.name else c.place / "repository" / "snapshots") / path.name)
        assert len({table.pack for _, table in await tables(c)}) > len(set(first))
        return first

    @pytest.mark.parametrize("how", ["missing", "damaged"])
    async def test_make_up_for_damage(self, place: Path, how: str) -> None:
        async with case(place) as c:
            damaged = await self.twice(c)
            for pack in damaged:
                if how == "missing":
                    c.file_of(pack).unlink()
                else:
                    for offset in range(100, c.file_of(pack).stat().st_size - 200, 100_000):
                        flip_bit(c.file_of(pack), offset)
            async with reopened(c) as again:
                assert await again.restore() == {}
                again.same()
                found = await checked(again)
                assert set(found.summary.damaged_packs) == {pack_name(pack) for pack in damaged}
                assert (found.summary.damaged_files, found.summary.damaged_snapshots) == (0, [])
                assert not (await checked(again, one=True)).files

    async def test_damage_to_all_of_them_is_damage(self, place: Path) -> None:
        async with case(place) as c:
            await self.twice(c)
            for _, table in await tables(c):
                if table.size_bytes > MIB:  # the catalog's are smaller
                    c.file_of(table.pack).unlink(missing_ok=True)
            async with reopened(c) as again:
                assert {"large", "e", "a/large"} <= (await again.restore()).keys()
                assert {"large", "e"} <= (await checked(again)).files


class TestStorage:
    """A storage that gives back an error for one object costs that object."""

    async def test_errors(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async with case(place) as c:
            bad = pack_name((await chunks(c))["large"][0].pack)

            def failing(real: Any) -> Any:
                async def call(self: LocalConnector, name: str, *args: Any, **options: Any) -> Any:
                    if name == bad:
                        raise ConnectorError(f"{name}: Input/output error")
                    return await real(self, name, *args, **options)

                return call

            monkeypatch.setattr(LocalConnector, "get", failing(LocalConnector.get))
            monkeypatch.setattr(LocalConnector, "get_into", failing(LocalConnector.get_into))
            faults = await c.restore()
            assert faults.keys() == {"large", "a/large", "a/b/c", "a/b/linked", "a/d", "e"}
            assert all(bad in reason for reason in faults.values())
            assert c.restored() == {"a", "a/b", "a/link", "empty", "fifo"}
            found = await checked(c)
            assert found.summary.damaged_packs == [bad]
            assert "large" in found.files and found.summary.damaged_files == 6
            summary = await check_packs(c.opened.connector, Recorder())
            assert summary.damaged_packs == [bad]

    async def test_a_missing_pack_is_said_to_be_missing(self, place: Path) -> None:
        async with case(place) as c:
            pack = (await chunks(c))["large"][0].pack
            c.file_of(pack).unlink()
            faults = await c.restore()
            assert set(faults.values()) == {f"{pack_name(pack)} is missing"}
            # `check --fast SNAPSHOT` looks whether its packs are there.
            for options in (FAST, FULL):
                found = await checked(c, options, one=True)
                assert found.summary.damaged_packs == [pack_name(pack)]
                assert "large" in found.files

    async def test_what_is_whole_beside_what_is_not(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a pack that is cut short what lies before the cut is read, though it is fetched in one with the rest."""
        async with case(place) as c:
            located = await chunks(c)
            last = max((at for found in located.values() for at in found), key=lambda at: at.offset)
            path = c.file_of(last.pack)
            os.truncate(path, last.offset + 10)
            costs = {
                name
                for name, found in located.items()
                if any((at.pack, at.offset) == (last.pack, last.offset) for at in found)
            }
            assert (await c.restore()).keys() == costs


class TestCatalog:
    """A page that can't be read costs what is in it."""

    @asynccontextmanager
    async def large(self, place: Path) -> AsyncIterator[tuple[Case, dict[bytes, list[str]]]]:
        """A case of some pages, and what is in each."""
        for number in range(2400):
            path = place / "source" / f"{number % 6}" / f"name{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        async with repository(place) as opened:
            c = Case(opened, place)
            await c.back_up()
            fetcher = Fetcher(opened.connector, opened.sealer, opened.mirror, id_key=opened.secrets.id_key)
            from coffret.engine.catalog_reader import Catalog

            pages = {}
            async for page, sections in Catalog(
                c.snapshot.header.catalog, c.snapshot.header.depth, fetcher.load
            ).pages():
                below = [f"/{os.fsdecode(s.directory)}/{os.fsdecode(e.name)}" for s in sections for e in s.entries]
                pages[page.ref] = [
                    name.removeprefix(f"{c.source}/") for name in below if name.startswith(f"{c.source}/")
                ]
            yield c, pages

    @pytest.mark.parametrize("number", [2, -1])  # the first ones may hold the directories above the source
    async def test_a_page(self, place: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        async with self.large(place) as (c, pages):
            assert len(pages) > 3
            bad = list(pages)[number]
            real = Fetcher.load

            async def load(self: Fetcher, refs: Sequence[bytes]) -> list[bytes]:
                if bad in refs:
                    raise ChunkMissing("damaged")
                return await real(self, refs)

            monkeypatch.setattr(Fetcher, "load", load)
            faults = await c.restore()
            [(path, reason)] = faults.items()
            assert path == pages[bad][0]
            assert reason.startswith(f"{len(pages[bad])} entries from {c.source}/{path} to ")
            lost = {name for name in pages[bad] if "/" in name}
            assert {name for name in c.restored() if "/" in name} == {
                name for names in pages.values() for name in names if "/" in name
            } - lost
            # Directories have their metadata all the same.
            for directory in c.target.iterdir():
                if directory.name not in pages[bad]:
                    assert directory.stat().st_mtime_ns == (c.source / directory.name).stat().st_mtime_ns
            found = await checked(c)
            assert found.summary.damaged_snapshots == [c.snapshot.id]
            [fault] = found.faults
            assert fault.endswith(os.fsencode(path))
            assert found.summary.files == c.snapshot.header.counts.files - len(lost)


class TestSizes:
    """The chunks of a file are as many bytes as it has."""

    @pytest.mark.parametrize("name", ["e", "large"])
    async def test_a_file_that_claims_another_size(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        def altered(ref: PageRef, payload: bytes) -> LoadedPage:
            page = open_page(ref, payload)
            for section in page.sections:
                for entry in section.entries:
                    if entry.name == name.encode() and section.directory.endswith(b"source"):
                        entry.size += 1
            return page

        async with case(place) as c:
            monkeypatch.setattr("coffret.engine.catalog_walk.open_page", altered)
            faults = await c.restore()
            assert name in faults and "of its size" in faults[name]
            assert not (c.target / name).exists()
            assert (await checked(c, FAST)).files == {name}


class TestIndex:
    async def test_what_only_a_damaged_index_object_says_is_lost(self, place: Path) -> None:
        """Also where the cache remembers what it said when it could be read."""
        async with case(place) as c:
            (c.source / "new").write_bytes(os.urandom(MIB))
            await c.back_up()
            [name] = {index for index, table in await tables(c) if table.pack == (await chunks(c))["new"][0].pack}
            flip_bit(c.place / "repository" / name, 80)
            for options in (FAST, FULL):
                found = await checked(c, options)
                assert found.summary.damaged_objects == [name]
                assert c.snapshot.id in found.summary.damaged_snapshots
                found = await checked(c, options, one=True)
                assert c.snapshot.id in found.summary.damaged_snapshots

    @pytest.mark.parametrize(
        "alter",
        [
            lambda table: msgspec.structs.replace(table, header=bytes(64)),
            lambda table: msgspec.structs.replace(table, size_bytes=table.size_bytes + 1),
            lambda table: msgspec.structs.replace(
                table,
                blocks=[msgspec.structs.replace(block, stored_bytes=block.stored_bytes + 1) for block in table.blocks],
            ),
        ],
        ids=["header", "size", "blocks"],
    )
    async def test_every_index_object_is_compared(self, place: Path, alter: Callable[[PackTable], PackTable]) -> None:
        async with case(place) as c:
            table = max((table for _, table in await tables(c)), key=lambda table: table.size_bytes)
            # It is the same that is said: nothing is wrong.
            await put_index(c, [table])
            assert (await checked(c)).summary.clean
            names = {await put_index(c, [alter(table)]) for _ in range(3)}
            async with reopened(c) as again:
                found = await checked(again)
                assert set(found.summary.damaged_objects) == names
                assert (found.summary.damaged_packs, found.summary.damaged_files) == ([], 0)

    async def test_packs_that_nobody_names(self, place: Path) -> None:
        async with case(place) as c:
            assert (await checked(c)).notes == []
            stray = c.file_of(os.urandom(32))
            stray.parent.mkdir(exist_ok=True)
            stray.write_bytes(bytes(3000))
            found = await checked(c)
            assert found.summary.clean
            [note] = found.notes
            assert note.startswith("packs that no index object names: 1, of 3.0 kB")


async def test_objects(place: Path) -> None:
    """Key slots, their log, marks and leases."""
    async with repository(place, passphrase=b"x") as opened:
        await opened.commits()
        progress = Recorder()
        assert (await opened.check(None, FULL, progress)).clean
        [slot] = [info.name async for info in opened.connector.list("keys/")]
        other = "keys/" + "ab" * 32
        attempt = os.urandom(16)
        mark = opened.sealer.seal(sealing.MARK, "trash/1", attempt, encode({"packs": bytes(33)}))
        lease = opened.sealer.seal(sealing.LEASE, "leases/another", attempt, b"")
        bad = {
            other: await opened.connector.get(slot),
            "keys/removed-1": b"{}",
            "trash/1": mark,
            f"leases/{attempt.hex()}": lease,
            f"removed/{attempt.hex()}-{attempt.hex()}": b"garbage",
        }
        for name, body in bad.items():
            await opened.connector.put(name, [body])
        summary = await opened.check(None, FULL, progress)
        assert set(summary.damaged_objects) == set(bad)


async def test_paths(place: Path) -> None:
    """Paths are taken however they are written; those that are not there are a mistake, and no damage."""
    async with case(place) as c:
        source = os.fsencode(c.source)
        for path in (source + b"//a/./b/", source + b"/a/b"):
            found = await checked(c, path=path)
            assert (found.summary.files, found.summary.clean) == (2, True)
            assert await c.restore(os.fsdecode(path)) == {}
            assert c.restored() == {"c", "linked"}
            shutil.rmtree(c.target)
        with pytest.raises(UsageError, match="no /nowhere"):
            await checked(c, path=b"/nowhere")


def test_the_program_and_a_path_that_is_not_there(place: Path) -> None:
    program = Program(place)
    program("create", "--no-encryption")
    (place / "source").mkdir()
    program.backup("source")
    assert "no /nope" in program("check", "latest:/nope", code=2).stderr


def test_ls_goes_on_after_a_damaged_page(place: Path) -> None:
    """Of empty files there is one pack, of their catalog; its first block is damaged, the last has the tree's root."""
    (place / "home").mkdir()
    program = Program(place / "home")
    program("create", "--no-encryption")
    source = place / "source"
    for number in range(30_000):
        if number % 1000 == 0:
            (folder := source / f"{number // 1000:02}").mkdir(parents=True)
        (folder / f"file-{number}").touch()
    program.backup(source)
    (pack,) = (path for path in (program.repository / "packs").rglob("*") if path.is_file())
    flip_bit(pack, 5000)
    outcome = program("ls", "--json", "-r", b"latest:" + os.fsencode(source), code=3)
    assert 5_000 < len(outcome.of_type("item")) < 30_000
    (fault, *_) = outcome.of_type("error")
    assert "entries from" in fault["reason"]
    assert outcome.summary["damaged"] == len(outcome.of_type("error"))
