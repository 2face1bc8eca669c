"""Pages of a catalog that are known already, from the catalog of another snapshot: they are not read again."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.catalogs import DIRECTORY, KEY, PATHS, Chunks, FineCutter, build, node, ordered, tree
from tests.harness import repository

from coffret.engine.catalog import describe
from coffret.engine.catalog_reader import Catalog
from coffret.engine.catalog_walk import last_key_of
from coffret.engine.errors import Damaged
from coffret.engine.fetch import Fetcher
from coffret.engine.packfile import pack_name
from coffret.engine.records import ID_BYTES, PageRef, Section, encode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coffret.engine.catalog import Key
    from coffret.engine.records import Entry

pytestmark = pytest.mark.anyio
TREES = st.lists(PATHS, max_size=40).map(tree)


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough for what is tested here."""
    return "asyncio"


async def pages(
    catalog: Catalog, known: dict[PageRef, Key], *, reverse: bool = False
) -> list[tuple[PageRef, list[Section]]]:
    return [page async for page in catalog.pages(reverse=reverse, known=known.get)]


@pytest.mark.parametrize("reverse", [False, True])
@given(TREES, st.data())
def test_they_come_in_their_place_and_are_not_read(
    reverse: bool, entries: dict[Key, Entry], data: st.DataObject
) -> None:
    async def compare() -> None:
        chunks = Chunks()
        catalog = Catalog(*build(chunks, ordered(entries), FineCutter(KEY)), chunks.load)
        every = await pages(catalog, {}, reverse=reverse)
        # A catalog of one page has no node above it that would name the page.
        among = [page for page, _ in every] if len(every) > 1 else []
        known = data.draw(st.sets(st.sampled_from(among))) if among else set()
        chunks.loaded.clear()
        last = {page: last_key_of(sections) for page, sections in every}
        found = await pages(catalog, {page: last[page] for page in known}, reverse=reverse)
        assert found == [(page, [] if page in known else sections) for page, sections in every]
        assert not {page.ref for page in known} & set(chunks.loaded)

    compare_now = compare()
    with pytest.raises(StopIteration):  # nothing it awaits ever waits
        compare_now.send(None)


async def test_what_overlaps_one_is_damage() -> None:
    chunks = Chunks()

    def page(*sections: Section) -> PageRef:
        return describe(sections, chunks.store(encode(sections)))

    first = page(Section(b"", [node(b"", DIRECTORY), node(b"a", DIRECTORY), node(b"c")]))
    for name, fits in ((b"b", False), (b"c", False), (b"d", True)):
        second = page(Section(b"", [node(name)]))
        catalog = Catalog(chunks.store(encode((first, second))), 1, chunks.load)
        if fits:
            assert len(await pages(catalog, {first: (b"", b"c")})) == 2
        else:
            with pytest.raises(Damaged, match="out of order"):
                await pages(catalog, {first: (b"", b"c")})


async def test_check_reads_what_snapshots_share_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts and reports all of it for each: damage in a shared page is damage of every snapshot."""
    source, rng = tmp_path / "source", random.Random(1)
    for number in range(3000):
        (source / f"{number % 30}").mkdir(parents=True, exist_ok=True)
        (source / f"{number % 30}" / f"{number}").write_bytes(rng.randbytes(30))
    loaded: list[int] = []
    load = Fetcher.load

    async def counted(self: Fetcher, refs: Sequence[bytes]) -> list[bytes]:
        loaded.append(len(refs))
        return await load(self, refs)

    monkeypatch.setattr(Fetcher, "load", counted)
    async with repository(tmp_path) as opened:
        for number in range(4):
            (source / "fresh").write_bytes(rng.randbytes(40 + number))
            await opened.backup([bytes(source)])
        first = (await opened.commits()).snapshots[0]
        loaded.clear()
        await opened.check([(first, None)])
        once = sum(loaded)
        loaded.clear()
        summary = await opened.check()
        assert (summary.snapshots, summary.files, summary.damaged_files) == (4, 4 * 3001, 0)
        assert sum(loaded) < 2 * once
        [entry] = [entry async for _, [entry] in opened.entries(first, bytes(source)[1:] + b"/7/37", recursive=True)]
        [location] = await opened.mirror.locate([entry.content[:ID_BYTES]])
        assert location is not None
        (tmp_path / "repository" / pack_name(location.pack)).unlink()
        summary = await opened.check()
        assert (summary.files, summary.damaged_files) == (4 * 3001, 4 * 3000 + 1)
        assert len(summary.damaged_snapshots) == 4
