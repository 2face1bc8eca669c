"""A sync makes the same snapshots in another repository, and moves only what is missing there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import pytest
from msgspec.structs import replace
from tests.fault_harness import make_source
from tests.harness import needs_root
from tests.hostile_tree import make_hostile_tree
from tests.sync.sides import SMALL, Side, is_whole, restores, sync
from tests.trees import describe, differences

from coffret.connectors.base import APPEND_ONLY, Capabilities
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.wrapper import Wrapper
from coffret.engine.errors import UsageError
from coffret.engine.index import open_index
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.sync import SyncOptions, check_pair
from coffret.engine.progress import Progress
from coffret.engine.records import REF_BYTES, iter_refs
from coffret.engine.snapshot import load_whole, seal_snapshot, snapshot_name

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("to_encrypted", [True, False], ids=["to-encrypted", "to-clear"])
@pytest.mark.parametrize("from_encrypted", [True, False], ids=["from-encrypted", "from-clear"])
async def test_the_same_snapshot(source: Path, tmp_path: Path, from_encrypted: bool, to_encrypted: bool) -> None:
    a, b = Side.made(encrypted=from_encrypted), Side.made(encrypted=to_encrypted)
    made = await a.backup(source)
    summary = await sync(await a.open(), await b.open())
    assert [snapshot.id for snapshot in summary.copied] == [made] and not summary.damaged
    mine, other = await a.open(), await b.open()
    before = await load_whole(mine.connector, mine.sealer, await mine.find_snapshot(made))
    after = await load_whole(other.connector, other.sealer, await other.find_snapshot(made))
    assert before.attempt != after.attempt and before.header.catalog != after.header.catalog
    assert msgspec.structs.replace(after.header, catalog=before.header.catalog) == before.header
    assert await is_whole(b) and await restores(b, made, source, tmp_path)
    # What a client that has only the one of them learns nothing of the other.
    assert not (await sync(await a.open(), await b.open())).copied
    assert not (await sync(await b.open(), await a.open())).copied


async def test_both_ways_nothing_is_more_than_all(source: Path) -> None:
    a, b = Side.made(), Side.made()
    progress = Progress()
    for side in (a, b):
        await side.backup(source)
    mine, other = await a.open(), await b.open()
    for leg in ((mine, other), (other, mine)):
        await sync(*leg, progress=progress)
        assert (progress.files, progress.size_bytes) == (progress.files_total, progress.size_total)


async def test_what_a_later_version_has_added_to_a_snapshot(source: Path) -> None:
    """Fields of the header that are not known here are there in the copy, too."""
    a, b = Side.made(), Side.made()
    made = await a.backup(source)
    mine = await a.open()
    known = await load_whole(mine.connector, mine.sealer, await mine.find_snapshot(made))
    assert not known.unknown
    added: dict[str, object] = {"signature": b"\x01" * 64, "later": {"a": [1, None, "b"]}}
    name = snapshot_name(known.attempt)
    await mine.connector.put(name, [seal_snapshot(mine.sealer, replace(known, unknown=added))])
    mine, other = await a.open(), await b.open()
    assert len((await sync(mine, other)).copied) == 1
    copy = await load_whole(other.connector, other.sealer, await (await b.open()).find_snapshot(made))
    assert copy.unknown == added
    assert msgspec.structs.replace(copy.header, catalog=known.header.catalog) == known.header
    assert await is_whole(b)


@needs_root
async def test_everything_a_snapshot_can_hold(tmp_path: Path) -> None:
    """Sparse files, many attributes and extents, names of any kind; and lists of lists, since chunks are small."""
    tree = tmp_path / "tree"
    make_hostile_tree(tree, seed=1, root_user=True, deep=False)
    (tree / "long").write_bytes(os.urandom(200_000) + bytes(4_000_000))
    a, b = Side.made(chunker=SMALL), Side.made(chunker=SMALL)
    made = await a.backup(tree)
    await sync(await a.open(), await b.open())
    assert await is_whole(b)
    opened = await b.open()
    await opened.restore(await opened.find_snapshot(made), bytes(tmp_path / "back"))
    mine = await a.open()
    await mine.restore(await mine.find_snapshot(made), bytes(tmp_path / "original"))
    assert differences(describe(tmp_path / "original"), describe(tmp_path / "back")) == []


async def test_only_what_is_missing_is_read(source: Path, tmp_path: Path) -> None:
    """Of a second snapshot the source is asked for what has changed, though every id differs between the two."""
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    await a.backup(source)
    first = Progress()
    await sync(await a.open(), await b.open(), progress=first)
    (source / "directory1" / "more").write_bytes(os.urandom(5000))
    made = await a.backup(source)
    second = Progress()
    await sync(await a.open(), await b.open(), progress=second)
    assert first.read_bytes > 1 << 20 and second.read_bytes == 5000
    assert second.files == first.files + 1 and second.size_bytes == first.size_bytes + 5000
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


async def test_what_lies_below_a_sound_page_is_not_looked_up(source: Path, tmp_path: Path) -> None:
    """A snapshot of the same catalog costs two reads of the source's packs at most: none, here."""
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    await a.backup(source)
    await sync(await a.open(), await b.open())
    await a.backup(source)
    counted = FaultyConnector(a.memory)
    await sync(await a.open(counted), await b.open())
    assert [call for call in counted.calls if call[1].startswith("packs/")] == []
    assert len(await b.ids()) == 2 and await is_whole(b)


async def test_each_header_is_read_once(source: Path, tmp_path: Path) -> None:
    """Not once for each snapshot that is copied after it, though each is an attempt of its own."""
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    for _ in range(6):
        await a.backup(source)
    counted = FaultyConnector(b.memory)
    summary = await sync(await a.open(), await b.open(counted))
    assert len(summary.copied) == 6
    read = [name for method, name in counted.calls if method != "put" and name.startswith("snapshots/") and name[10:]]
    assert 0 < len(read) == len(set(read)) < 6


async def test_nothing_is_known_without_a_cache(source: Path, tmp_path: Path) -> None:
    a, b = Side.made(), Side.made()
    await a.backup(source)
    await sync(await a.open(), await b.open())
    packs = await b.names("packs/")
    (source / "directory1" / "more").write_bytes(os.urandom(5000))
    made = await a.backup(source)
    progress = Progress()
    await sync(await a.open(), await b.open(), progress=progress)
    assert progress.read_bytes > 1 << 20  # read again
    assert len(await b.names("packs/")) == len(packs) + 2  # but not stored again
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


@pytest.mark.parametrize("how", ["lost", "altered"])
async def test_what_a_check_found_damaged_is_healed(source: Path, tmp_path: Path, how: str) -> None:
    """By a sync from a repository that has it still; no snapshot is made, and the next sync has nothing to do."""
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    first = await a.backup(source)
    (source / "directory1" / "more").write_bytes(os.urandom(5000))
    second = await a.backup(source)
    await sync(await a.open(), await b.open())
    before = {name: await b.memory.get(name) for name in await b.names("packs/")}
    for name, body in before.items():
        if how == "lost":
            await b.memory.delete(name)
        else:
            await b.memory.put(name, [body[:200], bytes([body[200] ^ 1]), body[201:]])
    await sync(await a.open(), await b.open())
    assert not await is_whole(b)  # a machine that knows nothing has found it, and not this one
    assert not (await (await b.open()).check(options=CheckOptions(workers=1))).clean
    summary = await sync(await a.open(), await b.open())
    assert not summary.copied and not summary.damaged
    assert await restores(b, second, source, tmp_path) and len(await b.ids()) == 2
    fresh = set(await b.names("packs/")) - set(before)
    assert fresh and not await b.names("leases/")
    for name in before:
        await b.memory.delete(name)  # not one of them is needed any more
    (source / "directory1" / "more").unlink()
    assert await restores(b, first, source, tmp_path)
    await sync(await a.open(), await b.open())
    assert set(await b.names("packs/")) == fresh


async def test_an_append_only_token_heals_nothing(source: Path, tmp_path: Path) -> None:
    """An attempt without a snapshot can't be ended with it: so none is begun."""

    class AppendOnly(Wrapper):
        @property
        def capabilities(self) -> Capabilities:  # type: ignore[override]
            return replace(super().capabilities, right=APPEND_ONLY)

    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    await a.backup(source)
    await sync(await a.open(), await b.open())
    for name in await b.names("packs/"):
        await b.memory.delete(name)
    assert not (await (await b.open()).check(options=CheckOptions(workers=1))).clean
    before = await b.names("")
    assert not (await sync(await a.open(), await b.open(AppendOnly(b.memory)))).copied
    assert await b.names("") == before


async def test_ids_are_shared(source: Path, tmp_path: Path) -> None:
    """`create --like`: catalogs are equal, and what was backed up to both is not copied."""
    a = Side.made(tmp_path / "cache")
    b = Side.made(tmp_path / "cache", like=a)
    await a.backup(source)
    await b.backup(source)
    (source / "directory1" / "more").write_bytes(os.urandom(5000))
    made = await a.backup(source)
    progress = Progress()
    summary = await sync(await a.open(), await b.open(), progress=progress)
    assert len(summary.copied) == 2 and progress.read_bytes == 5000
    mine, other = await a.open(), await b.open()
    catalogs = [(await each.find_snapshot(made)).header.catalog for each in (mine, other)]
    assert catalogs[0] == catalogs[1]
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


async def test_the_target_has_some_of_it(source: Path, tmp_path: Path) -> None:
    """Blocks of which the target has a part are taken apart; what it has is not stored twice."""
    a, b = Side.made(), Side.made()
    some = tmp_path / "some"
    make_source(some, files=17, large_bytes=3 << 20)
    await b.backup(some)
    before = dict(await _chunks(b))
    made = await a.backup(source)
    await sync(await a.open(), await b.open())
    after = await _chunks(b)
    assert len({chunk for chunk, _ in after}) == len(after)  # each once
    assert before.items() <= dict(after).items()
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


@pytest.mark.parametrize("level", [None, 3])
async def test_compressed_anew(source: Path, tmp_path: Path, level: int | None) -> None:
    a, b = Side.made(), Side.made()
    made = await a.backup(source)
    opened = await a.open()
    await (await b.open()).sync(opened, (await opened.listed()).snapshots, SyncOptions(level=level, repack=True))
    stored = [sum([info.size_bytes async for info in each.memory.list("packs/")]) for each in (a, b)]
    assert stored[1] > 1.5 * stored[0] if level is None else stored[1] < 1.1 * stored[0]
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


@pytest.mark.parametrize("alike", [False, True])
async def test_lists_of_lists_and_small_windows(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alike: bool
) -> None:
    """What a page or a list names may have been moved long before it is written."""
    monkeypatch.setattr("coffret.engine.sync_catalog._WINDOW_CHUNKS", 7)
    monkeypatch.setattr("coffret.engine.catalog._LIST_MAX_BYTES", 70 * REF_BYTES)
    (source / "long").write_bytes(os.urandom(9_000_000))
    (source / "twice").write_bytes((source / "long").read_bytes())
    a = Side.made(chunker=SMALL)
    b = Side.made(chunker=SMALL, like=a if alike else None)
    made = await a.backup(source)
    opened = await a.open()
    listed = opened.entries(await opened.find_snapshot(made), bytes(source)[1:], recursive=False)
    [long] = [entry async for _, entries in listed for entry in entries if entry.name == b"long"]
    assert long.extra is not None and long.extra.depth >= 2
    await sync(await a.open(), await b.open())
    assert await restores(b, made, source, tmp_path) and await is_whole(b)


async def test_a_catalog_of_many_pages(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(1500):
        path = tree / f"d{number % 30}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % (number % 100))
    a, b = Side.made(tmp_path / "cache"), Side.made(tmp_path / "cache")
    made = await a.backup(tree)
    await sync(await a.open(), await b.open())
    assert await restores(b, made, tree, tmp_path) and await is_whole(b)
    (tree / "d7" / "file7").write_bytes(b"changed")
    changed = await a.backup(tree)
    progress = Progress()
    await sync(await a.open(), await b.open(), progress=progress)
    assert 0 < progress.added_bytes < 200_000  # a few pages of some dozen, and the nodes above
    assert await restores(b, changed, tree, tmp_path) and await is_whole(b)


async def test_there_and_back(source: Path, tmp_path: Path) -> None:
    """Three repositories become equal, whatever way snapshots go."""
    sides = [Side.made(tmp_path / "cache", encrypted=number != 1) for number in range(3)]
    made = []
    for number, side in enumerate(sides):
        (source / f"file{number}").write_bytes(os.urandom(3000))
        made.append(await side.backup(source))
    a, b, c = sides
    for one, other in ((a, b), (b, c), (c, a), (c, b), (b, a)):
        await sync(await one.open(), await other.open())
    for side in sides:
        assert await side.ids() == set(made) and await is_whole(side)
        assert await restores(side, made[-1], source, tmp_path)


async def test_pairs_that_make_no_sense(tmp_path: Path) -> None:
    a, b = Side.made(), Side.made(chunker=SMALL)
    with pytest.raises(UsageError, match="is the repository itself"):
        check_pair(await a.open(), await a.open())
    with pytest.raises(UsageError, match="larger chunks"):
        check_pair(await a.open(), await b.open())
    check_pair(await b.open(), await a.open())


async def _chunks(side: Side) -> list[tuple[bytes, bytes]]:
    """(chunk, pack) of all that a repository's index names."""
    opened, found = await side.open(), []
    for name in await side.names("index/"):
        for table in open_index(opened.sealer, name, await side.memory.get(name)).packs:
            found += [(chunk, table.pack) for block in table.blocks for chunk, _ in iter_refs(block.refs)]
    return found
