"""Reading a catalog: find, list, walk and compare with a parent, by as few pages as it takes."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.catalog_reader.reading import _FINE, TREES, collect, flat, run
from tests.catalogs import FILE, KEY, PATHS, Chunks, build, components, node, ordered, tree

from coffret.engine.catalog import Cutter, RefList, describe, join_path, key_of
from coffret.engine.catalog_reader import Catalog, ParentCursor
from coffret.engine.errors import Damaged
from coffret.engine.records import Entry, Extra, PageRef, Section, decode_page, pack_ref
from coffret.engine.settings import INLINE_REFS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.catalog import Key


def opened(entries: dict[Key, Entry], chunks: Chunks | None = None) -> Catalog:
    chunks = chunks or Chunks()
    return Catalog(*build(chunks, ordered(entries), _FINE), chunks.load)


def below(entries: dict[Key, Entry], path: bytes) -> list[tuple[bytes, Entry]]:
    """The model of `walk`: a path's own entry, then those whose directory is it or lies below it."""
    own = [item for item in ordered(entries) if join_path(item[0], item[1].name) == path]
    inside = [
        item
        for item in ordered(entries)
        if item[1].name and (not path or item[0] == path or item[0].startswith(path + b"/"))
    ]
    return own + inside if own else []


@given(TREES, st.lists(PATHS, max_size=5))
def test_find(entries: dict[Key, Entry], others: list[tuple[bytes, ...]]) -> None:
    catalog = opened(entries)
    for (directory, name), entry in entries.items():
        assert run(catalog.find(join_path(directory, name))) == entry
    for parts in others:
        assert run(catalog.find(b"/".join(parts))) == entries.get((b"/".join(parts[:-1]), parts[-1]))
    for path in (b"/", b"/a", b"a/", b"a//b", b"..", b"a/..", b"."):
        assert run(catalog.find(path)) is None


@given(TREES)
def test_listing(entries: dict[Key, Entry]) -> None:
    catalog = opened(entries)
    for directory, name in entries:
        path = join_path(directory, name)
        found = [entry for batch in collect(catalog.listing(path)) for entry in batch]
        assert found == [entry for key, entry in ordered(entries) if key == path and entry.name]
    assert collect(catalog.listing(b"absent")) == []


@given(TREES)
def test_walk_both_ways(entries: dict[Key, Entry]) -> None:
    catalog = opened(entries, Chunks(piece_bytes=150))
    for directory, name in entries:
        path = join_path(directory, name)
        expected = below(entries, path)
        assert flat(collect(catalog.walk(path))) == expected
        assert flat(collect(catalog.walk(path, reverse=True))) == expected[::-1]
    assert collect(catalog.walk(b"absent")) == []


@given(TREES, st.data())
def test_pages_of_a_range(entries: dict[Key, Entry], data: st.DataObject) -> None:
    chunks = Chunks()
    catalog = opened(entries, chunks)
    keys = sorted(entries, key=components)
    start, stop = sorted((data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(keys))), key=components)
    pages = collect(catalog.pages())
    assert [key for _, page in pages for section in page for key in _keys(section)] == keys
    assert all(decode_page(chunks.stored[ref.ref]) == page and describe(page, ref.ref) == ref for ref, page in pages)
    wanted = [
        (ref, page) for ref, page in pages if any(key_of(*start) <= k < key_of(*stop) for k in _bounds(pages, ref))
    ]
    found = collect(catalog.pages(key_of(*start), key_of(*stop)))
    assert [page for page in wanted if page not in found] == []
    assert collect(catalog.pages(key_of(*start), key_of(*stop), reverse=True)) == found[::-1]


def _keys(section: Section) -> list[Key]:
    return [(section.directory, entry.name) for entry in section.entries]


def _bounds(pages: list[tuple[PageRef, list[Section]]], ref: PageRef) -> list[Key]:
    return [key_of(*key) for found, page in pages if found == ref for section in page for key in _keys(section)]


def large_tree() -> dict[Key, Entry]:
    return tree((b"d%03d" % (n % 300), b"sub", b"f%05d" % n) for n in range(12_000))


def test_little_is_read_for_little() -> None:
    entries, chunks = large_tree(), Chunks()
    root, depth = build(chunks, ordered(entries), _FINE)
    assert len(chunks.stored) > 4000
    assert depth > 4
    catalog = Catalog(root, depth, chunks.load)
    assert run(catalog.find(b"d150/sub/f00150")) is not None
    assert len(chunks.loaded) == depth + 1
    chunks.loaded.clear()
    assert sum(map(len, collect(catalog.listing(b"d150/sub")))) == 40
    assert len(chunks.loaded) < 20 + 2 * depth + 40
    chunks.loaded.clear()
    calls = chunks.calls
    collect(catalog.walk())
    assert chunks.calls - calls < len(chunks.loaded) / 2


def test_reading_needs_the_same_memory_however_large_the_catalog() -> None:
    def peaks(files: int) -> list[int]:
        chunks, most = Chunks(), []
        entries = ordered(tree((b"d", b"%06d" % n) for n in range(files)))
        root, depth = build(chunks, entries, Cutter(KEY))
        del entries

        async def walk() -> int:
            return sum([len(part) async for _, part in Catalog(root, depth, chunks.load).walk()])

        def follow() -> int:
            cursor = ParentCursor(root, depth, chunks.load_now)
            return sum(len(part.entries) for directory in (b"", b"d") for part in cursor.seek(directory))

        for read in (lambda: run(walk()), follow):
            tracemalloc.start()
            assert read() == files + 2
            most.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return most

    for small, large in zip(peaks(5000), peaks(40_000), strict=True):
        assert large < small + (2 << 20)


@pytest.mark.anyio
async def test_on_an_event_loop() -> None:
    entries, chunks = large_tree(), Chunks()

    async def load(refs: Sequence[bytes]) -> list[bytes]:
        await anyio.lowlevel.checkpoint()
        return chunks.load_now(refs)

    catalog = Catalog(*build(chunks, ordered(entries)), load)
    found = [(directory, entry) async for directory, part in catalog.walk() for entry in part]
    assert found == ordered(entries)


def cursor_of(entries: dict[Key, Entry]) -> tuple[ParentCursor, Chunks]:
    chunks = Chunks()
    return ParentCursor(*build(chunks, ordered(entries), _FINE), chunks.load_now), chunks


@given(TREES, st.lists(PATHS, max_size=5), st.data())
def test_cursor_against_the_model(
    entries: dict[Key, Entry], others: list[tuple[bytes, ...]], data: st.DataObject
) -> None:
    cursor, chunks = cursor_of(entries)
    known = {join_path(*key) for key in entries} | {b"/".join(parts) for parts in others}
    chosen = sorted(data.draw(st.sets(st.sampled_from(sorted(known)))), key=lambda path: key_of(path, b""))
    for path in chosen:
        listing = [entry for directory, entry in ordered(entries) if directory == path]
        runs = list(cursor.seek(path))
        assert [entry for part in runs for entry in part.entries] == listing
        for part in runs:
            page = decode_page(chunks.stored[part.page.ref.ref])
            whole = [entry for section in page for entry in section.entries]
            assert part.page.entries == len(whole) == part.page.ref.entries
            assert whole[part.first : part.first + len(part.entries)] == part.entries


def test_cursor_reads_each_page_once_and_none_that_is_skipped() -> None:
    entries = large_tree()
    cursor, chunks = cursor_of(entries)
    for directory in sorted({directory for directory, _ in entries}, key=lambda path: key_of(path, b"")):
        assert sum(len(part.entries) for part in cursor.seek(directory)) > 0
    assert len(chunks.loaded) == len(set(chunks.loaded)) == len(chunks.stored)
    cursor, chunks = cursor_of(entries)
    for directory in (b"d010/sub", b"d011", b"d200", b"d290/sub", b"e"):
        assert list(cursor.seek(directory)) or directory == b"e"
    # For each skip a path down the tree, its neighbours, and the pages read ahead.
    assert len(chunks.loaded) < 200 < len(chunks.stored) / 20


def test_cursor_streams_a_large_directory() -> None:
    entries = tree((b"d", b"%06d" % n) for n in range(20_000))
    cursor, chunks = cursor_of(entries)
    assert next(cursor.seek(b"d")).entries
    assert len(chunks.loaded) < 100


def test_cursor_goes_forward_only() -> None:
    cursor, _ = cursor_of(tree([*((b"a", b"%03d" % n) for n in range(100)), (b"b", b"1")]))
    old = cursor.seek(b"a")
    assert next(old).entries[0].name == b"000"
    unused = cursor.seek(b"a")
    again = cursor.seek(b"a")
    found = [next(again)]
    assert found[0].entries[0].name == b"000"
    assert list(old) == []
    assert list(unused) == []
    found += again
    assert sum(len(part.entries) for part in found) == 100
    assert list(cursor.seek(b"b"))
    with pytest.raises(ValueError, match="sought after"):
        cursor.seek(b"a")


@pytest.mark.parametrize("count", [0, 1, INLINE_REFS + 1, 3000, 70_000])
def test_file_refs(count: int) -> None:
    chunks = Chunks()
    refs = [pack_ref(number.to_bytes(32, "big"), 5) for number in range(count)]
    builder = RefList(chunks.store)
    for ref in refs:
        builder.add(ref[:32], 5)
    content, depth = builder.finish()
    catalog = Catalog(pack_ref(bytes(32), 1), 0, chunks.load)
    entry = node(b"f", FILE, 5 * count, content)
    entry.extra = Extra(depth=depth)
    assert b"".join(collect(catalog.file_refs(entry))) == b"".join(refs)
    for size in (5 * count - 1, 5 * count + 1):
        entry.size = size
        with pytest.raises(Damaged):
            collect(catalog.file_refs(entry))
