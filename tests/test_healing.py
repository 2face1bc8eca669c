"""What the repository has lost is stored again where the source has it, and no snapshot relies on what is not there."""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3
from tests.fault_harness import contents, make_source, objects, put_in_place
from tests.harness import Recorder, repository

from coffret.engine.catalog_walk import LoadedPage
from coffret.engine.mirror import Mirror
from coffret.engine.ops.backup import BackupOptions
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.maintenance import MaintenanceOptions, maintain
from coffret.engine.pipeline import Limits
from coffret.engine.progress import Progress
from coffret.engine.recheck import Recheck
from coffret.engine.records import Entry, Extra, PageRef, Section, pack_ref

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from coffret.engine.check_damage import CheckSummary
    from coffret.engine.ops.backup import BackupSummary

pytestmark = pytest.mark.anyio

ONE_WORKER = Limits(workers=1)
PLAIN, FORCED = BackupOptions(limits=ONE_WORKER), BackupOptions(limits=ONE_WORKER, force=True)


class Home:
    """A repository on disk, a source whose files are old enough to be known again, and a cache that stays."""

    def __init__(self, path: Path) -> None:
        self.path, self.stored = path, path / "repository"
        self.source = make_source(path / "source", large_bytes=3 << 20)
        self.recorder = Recorder()

    async def backup(self, options: BackupOptions = PLAIN, source: Path | None = None) -> BackupSummary:
        self.recorder = Recorder()
        async with repository(self.path) as opened:
            return await opened.backup([bytes(source or self.source)], options, self.recorder)

    async def restores(self) -> bool:
        """Whether the latest snapshot is the source, for this machine and for one that knows nothing."""
        for place in (self.path, self.path / "elsewhere"):
            if place != self.path:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                (place / "repository").symlink_to(self.stored)
            async with repository(place) as opened:
                target, snapshot = self.path / "target", await opened.find_snapshot("latest")
                summary = await opened.restore(snapshot, bytes(target))
                same = not summary.errors and contents(target) == contents(self.source)
                shutil.rmtree(target)
                if not same:
                    return False
        return True

    def packs(self) -> list[Path]:
        """The packs, the largest first: the last holds the catalog alone."""
        return sorted(objects(self.stored, "packs"), key=lambda path: -path.stat().st_size)

    def forget_cache(self) -> None:
        shutil.rmtree(self.path / "cache")


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough: channels, threads and processes, where loops differ, have tests of their own."""
    return "asyncio"


@pytest.fixture
async def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """One snapshot of a source that counts as old: nothing of it is read again for being fresh."""
    monkeypatch.setattr("coffret.engine.settings.RACY_NS", 0)
    made = Home(tmp_path)
    await made.backup()
    return made


async def test_unchanged_is_not_looked_up(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The common case costs nothing: neither look-ups of what the parent names, nor a listing of packs."""

    def fail(*_: object) -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr("coffret.engine.ops.backup.Recheck", fail)
    monkeypatch.setattr("coffret.engine.attempt.find_bad_packs", fail)
    for _ in range(2):
        assert (await home.backup()).counts.read_bytes == 0
    (home.source / "new").write_bytes(b"new")
    assert (await home.backup()).counts.read_bytes == 3
    assert (await home.backup()).counts.read_bytes == 0


@pytest.mark.parametrize("how", ["gone", "cut short"])
@pytest.mark.parametrize("which", ["catalog", "content"])
@pytest.mark.parametrize("knows", ["all", "nothing"])
async def test_a_pack_is_lost(home: Home, which: str, how: str, knows: str) -> None:
    """A cache that knew all does not notice that content is lost: that takes `--force`."""
    lost = home.packs()[-1 if which == "catalog" else 0]
    data = lost.read_bytes()
    lost.unlink()
    if how == "cut short":
        lost.write_bytes(data[:100])
    if knows == "nothing":
        home.forget_cache()
    await home.backup(FORCED if knows == "all" and which == "content" else PLAIN)
    assert any("missing or damaged" in note for note in home.recorder.notes) or which == "catalog"
    assert await home.restores()
    # Nor is it relied on from now on, by whatever source.
    other = shutil.copytree(home.source, home.path / "other", symlinks=True)
    await home.backup(source=other)
    assert await home.restores()
    assert (await home.backup()).counts.read_bytes == 0


async def test_a_pack_of_the_catalog_is_damaged_inside(home: Home) -> None:
    catalog = home.packs()[-1]
    data = bytearray(catalog.read_bytes())
    data[80] ^= 1
    put_in_place(catalog, bytes(data))
    await home.backup()
    assert any("can't be read, so all files are" in note for note in home.recorder.notes)
    (home.source / "new").write_bytes(b"new")
    await home.backup()
    assert await home.restores()


async def check(home: Home) -> CheckSummary:
    async with repository(home.path) as opened:
        return await opened.check(None, CheckOptions(workers=1))


def alter(pack: Path) -> None:
    """Change a byte of a block in a pack, which stays as large as it was."""
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    put_in_place(pack, bytes(data))


@pytest.mark.parametrize("which", ["catalog", "content"])
async def test_what_a_check_found_damaged_is_stored_again(home: Home, which: str) -> None:
    """By the next backup that has it, once, and without `--force`; nothing relies on it from then on."""
    pack = home.packs()[-1 if which == "catalog" else 0]
    whole = pack.read_bytes()
    alter(pack)
    size_bytes = (home.source / "large").stat().st_size
    if which == "content":
        assert (await home.backup()).counts.read_bytes == 0  # nobody knows yet
    summary = await check(home)
    assert len(summary.damaged_packs) == 1 and summary.damaged_snapshots
    again = (await home.backup()).counts
    assert any("1 pack is missing or damaged" in note for note in home.recorder.notes)
    assert again.read_bytes >= size_bytes if which == "content" else again.added_bytes > 0
    assert await home.restores()
    once = (await home.backup()).counts
    assert once.read_bytes == 0 and once.added_bytes < 10_000  # at most pages with folders above, which have changed
    other = shutil.copytree(home.source, home.path / "other", symlinks=True)
    assert (await home.backup(source=other)).counts.added_bytes < size_bytes  # its catalog alone
    assert await home.restores()
    async with repository(home.path) as opened:
        latest = await opened.find_snapshot("latest")
        assert (await opened.check([(latest, None)], CheckOptions(workers=1))).clean
    # Put back, and found whole by another check, it is relied on as before.
    put_in_place(pack, whole)
    assert (await check(home)).clean
    await home.backup()
    assert not home.recorder.notes


async def test_a_fast_check_does_not_clear_what_it_did_not_read(home: Home) -> None:
    alter(home.packs()[0])
    assert not (await check(home)).clean
    async with repository(home.path) as opened:
        assert (await opened.check(None, CheckOptions(fast=True, workers=1))).clean
    assert (await home.backup()).counts.read_bytes >= (home.source / "large").stat().st_size
    assert await home.restores()


@pytest.mark.parametrize("noticed_by", ["backup", "reader", "interrupted backup"])
async def test_an_index_object_is_lost(home: Home, noticed_by: str) -> None:
    """Whoever notices it first: the next snapshot relies on nothing that it located."""
    (home.source / "new").write_bytes(os.urandom(100_000))
    [first] = objects(home.stored, "index")
    await home.backup()
    first.unlink()
    if noticed_by == "reader":
        async with repository(home.path) as opened:
            await opened.commits()
    elif noticed_by != "backup":
        with pytest.raises(OSError, match="never mind"), pytest.MonkeyPatch.context() as patch:

            async def fail(*_: object) -> None:
                raise OSError("never mind")

            patch.setattr("coffret.engine.pipeline.Pipeline.run", fail)
            await alone(home)
    assert (await home.backup()).counts.read_bytes > 3 << 20
    assert await home.restores()
    assert (await home.backup()).counts.read_bytes == 0


async def alone(home: Home) -> None:
    """A backup whose error is raised as it is."""
    try:
        await home.backup()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def test_only_what_is_lost_is_read_again(home: Home) -> None:
    """Two packs of content: what lies in the other one is unchanged, and its chunks are not stored again."""
    new = home.source / "new"
    new.write_bytes(os.urandom(1_000_000))
    before = set(home.packs())
    await home.backup()
    added = max(set(home.packs()) - before, key=lambda path: path.stat().st_size)
    added.unlink()
    home.forget_cache()
    summary = await home.backup()
    assert summary.counts.read_bytes == new.stat().st_size
    assert home.recorder.items[bytes(new)] == "changed"
    assert summary.counts.added_bytes < 1_100_000
    assert await home.restores()


async def test_large_attributes_are_lost(home: Home) -> None:
    """They are chunks of their own, and the pack that holds them is gone."""
    path = home.source / "directory1" / "attributed"
    path.mkdir()
    try:
        os.setxattr(path, "user.large", os.urandom(900))
    except OSError:
        pytest.skip("no extended attributes here")
    before = set(home.packs())
    await home.backup()
    [added] = set(home.packs()) - before
    added.unlink()
    await home.backup(FORCED)
    async with repository(home.path) as opened:
        snapshot = await opened.find_snapshot("latest")
        await opened.restore(snapshot, bytes(home.path / "target"))
    restored = os.getxattr(home.path / "target" / "directory1" / "attributed", "user.large")
    assert restored == os.getxattr(path, "user.large")


class Chunks:
    """Chunks by ref, of which some are absent."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.lost: set[bytes] = set()

    def put(self, payload: bytes) -> bytes:
        ref = pack_ref(blake3(payload).digest(), len(payload))
        self.held[ref] = payload
        return ref

    def load(self, refs: Sequence[bytes]) -> list[bytes]:
        return [self.held[ref] for ref in refs]

    def absent(self, ids: Sequence[bytes]) -> set[bytes]:
        return {chunk_id for chunk_id in ids if chunk_id in self.lost}


def entry(name: bytes, content: bytes = b"", size: int = 1 << 20, extra: Extra | None = None) -> Entry:
    return Entry(name, 0o100644, 0, 0, "", "", size, 0, 0, 0, 0, content=content, extra=extra)


@pytest.mark.parametrize("lost", ["nothing", "content", "list", "upper list", "xattrs", "extents", "page"])
def test_what_is_looked_up(lost: str) -> None:
    chunks = Chunks()
    refs = {
        "content": chunks.put(b"content"),
        "nothing": chunks.put(b"deep"),
        "xattrs": chunks.put(b"xattrs"),
        "extents": chunks.put(b"extents"),
        "page": chunks.put(b"page"),
    }
    deep = [chunks.put(b"deep %d" % number) for number in range(6)]
    lists = [chunks.put(b"".join(deep[:3])), chunks.put(b"".join(deep[3:]))]
    refs["list"], refs["upper list"] = deep[4], lists[1]
    entries = [
        entry(b"a", refs["content"]),
        entry(b"b", b"".join(lists), extra=Extra(depth=1)),
        entry(b"c", chunks.put(b"".join(lists)), extra=Extra(depth=2)),
        entry(b"d", extra=Extra(xattrs_ref=refs["xattrs"])),
        entry(b"e", extra=Extra(extents_ref=refs["extents"])),
        entry(b"f"),
    ]
    page = LoadedPage(PageRef(b"", b"a", refs["page"], 6, 6, 0), [Section(b"", entries)], 6)
    if lost != "nothing":
        chunks.lost.add(refs[lost][:32])
    Recheck(chunks.load, chunks.absent)(page)
    again = b"".join(found.name for found in entries if found.racy)
    names = {"content": b"a", "list": b"bc", "upper list": b"bc", "xattrs": b"d", "extents": b"e"}
    assert again == names.get(lost, b"")
    assert page.entries == (0 if lost == "page" else 6)


@asynccontextmanager
async def two_views(path: Path) -> AsyncIterator[tuple[Mirror, Mirror]]:
    async with await Mirror.open(path, "repository") as one, await Mirror.open(path, "repository") as two:
        yield one, two


async def test_a_catalog_is_vouched_for_only_while_nothing_is_lost(tmp_path: Path) -> None:
    from tests.mirror_samples import index, name, refresh

    held = {name(n): index({f"{n}": [n]}) for n in range(3)}
    async with two_views(tmp_path) as (one, two):
        await refresh(one, held)
        await one.vouch(b"root", audited=True)
        await refresh(two, held)
        assert two.is_sound(b"root")
        assert two.audited
        del held[name(0)]
        await refresh(two, held)
        assert not two.is_sound(b"root")
        assert not two.audited
        await one.vouch(b"root 2", audited=True)  # it went by what is lost
        await refresh(two, held)
        assert not two.is_sound(b"root 2")
        await two.vouch(b"root 3")
        await refresh(one, held)
        assert one.is_sound(b"root 3")
        assert not one.audited
        await one.doubt()
        await refresh(two, held)
        assert not two.is_sound(b"root 3")


async def test_maintenance_keeps_the_healed_copy(home: Home) -> None:
    """Of two packs with the same content it keeps the one that was not found to be damaged, whatever their names."""
    for _ in range(3):
        [bad, *_] = home.packs()
        data = bytearray(bad.read_bytes())
        data[len(data) // 2] ^= 1
        put_in_place(bad, bytes(data))
        async with repository(home.path) as opened:
            assert not (await opened.check()).clean
        await home.backup()
        async with repository(home.path) as opened:
            await maintain(opened, MaintenanceOptions(grace_s=0), Progress())
        assert bad not in home.packs()
        assert await home.restores()
