"""Reading catalogs against a model, and catalogs written by an enemy."""

from __future__ import annotations

import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.catalogs import (
    DIRECTORY,
    FILE,
    KEY,
    PATHS,
    Chunks,
    FineCutter,
    build,
    components,
    node,
    ordered,
    tree,
)

from coffret.engine.catalog import Cutter, RefList, describe, join_path, key_of
from coffret.engine.catalog_reader import Attributes, Catalog, ParentCursor
from coffret.engine.errors import Damaged
from coffret.engine.records import Entry, Extra, PageRef, Section, decode_page, encode, pack_ref
from coffret.engine.settings import INLINE_REFS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from coffret.engine.catalog import Key

TREES = st.lists(PATHS, max_size=40).map(tree)
_FINE = FineCutter(KEY)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what awaits nothing but `Chunks.load`, which never waits: without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it awaits something else")


def collect(iterator: AsyncIterator[Any]) -> list[Any]:
    async def all_of_it() -> list[Any]:
        return [item async for item in iterator]

    return list(run(all_of_it()))


def opened(entries: dict[Key, Entry], chunks: Chunks | None = None) -> Catalog:
    chunks = chunks or Chunks()
    return Catalog(*build(chunks, ordered(entries), _FINE), chunks.load)


def flat(batches: list[tuple[bytes, list[Entry]]]) -> list[tuple[bytes, Entry]]:
    assert all(entries for _, entries in batches)
    return [(directory, entry) for directory, entries in batches for entry in entries]


def below(entries: dict[Key, Entry], path: bytes) -> list[tuple[bytes, Entry]]:
    """The model of `walk`: a path's own entry, then those whose directory is it or lies below it."""
    own = [item for item in ordered(entries) if join_path(item[0], item[1].name) == path]
    inside = [
        item
        for item in ordered(entries)
        if item[1].name and (not path or item[0] == path or item[0].startswith(path + b"/"))
    ]
    return own + inside if own else []


# What is there --------------------------------------------------------------------------------------------------------


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


# The parent of a backup -----------------------------------------------------------------------------------------------


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


# Chunk lists and attributes -------------------------------------------------------------------------------------------


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


def test_attributes() -> None:
    chunks = Chunks()
    catalog = Catalog(pack_ref(bytes(32), 1), 0, chunks.load)
    xattrs = [(b"user.a", b"1"), (b"user.b", bytes(9999))]
    extents = struct.pack("<4Q", 0, 10, 50, 50)
    entry = node(b"f", FILE, 100)
    assert run(catalog.attributes(entry)) == Attributes([], b"")
    entry.extra = Extra(xattrs=xattrs, extents=extents)
    assert run(catalog.attributes(entry)) == (xattrs, extents)
    assert not chunks.loaded
    entry.extra = Extra(extents=bytes(16))  # one hole
    assert run(catalog.attributes(entry)) == ([], bytes(16))
    assert not collect(catalog.file_refs(entry))
    half = len(extents) // 2
    pieces = chunks.store(extents[:half]) + chunks.store(extents[half:])
    entry.extra = Extra(xattrs_ref=chunks.store(encode(xattrs)), extents_ref=pieces)
    assert run(catalog.attributes(entry)) == (xattrs, extents)
    assert chunks.calls == 1


@pytest.mark.parametrize(
    "extra",
    [
        Extra(extents=struct.pack("<4Q", 0, 10, 5, 10)),
        Extra(extents=struct.pack("<4Q", 50, 10, 0, 10)),
        Extra(extents=struct.pack("<2Q", 95, 6)),
        Extra(extents=struct.pack("<4Q", 0, 10, 95, 0)),
        Extra(extents=struct.pack("<2Q", 101, 0)),
        Extra(extents=struct.pack("<2Q", 1 << 63, 1 << 63)),
        Extra(extents=bytes(15)),
        Extra(xattrs=[(b"", b"")]),
        Extra(xattrs=[(b"user.\0", b"")]),
        Extra(xattrs_ref=b"short"),
        Extra(xattrs_ref=pack_ref(bytes(32), 1 << 31)),
    ],
    ids=repr,
)
def test_attributes_of_an_enemy(extra: Extra) -> None:
    entry = node(b"f", FILE, 100)
    entry.extra = extra
    with pytest.raises(Damaged):
        run(Catalog(pack_ref(bytes(32), 1), 0, Chunks().load).attributes(entry))


def test_stored_xattrs_that_do_not_decode() -> None:
    chunks = Chunks()
    catalog = Catalog(pack_ref(bytes(32), 1), 0, chunks.load)
    for payload in (b"\xc1", encode([1]), b"\x91\x92\xa1\xff\xa1\xff", b"\x91" * 5000, b"\xdd\xff\xff\xff\xff"):
        entry = node(b"f", FILE, 100)
        entry.extra = Extra(xattrs_ref=chunks.store(payload))
        with pytest.raises(Damaged):
            run(catalog.attributes(entry))


def test_lists_of_an_enemy() -> None:
    chunks = Chunks()
    catalog = Catalog(pack_ref(bytes(32), 1), 0, chunks.load)
    bomb = pack_ref(bytes(32), 1)
    for _ in range(10):
        bomb = chunks.store(bomb * 1000)
    empty, ragged = chunks.store(b""), chunks.store(bytes(35))
    nothing = chunks.store(pack_ref(bytes(32), 0) * 9)
    lying = pack_ref(ragged[:32], 34)
    chunks.stored[lying] = bytes(35)
    for content, depth in ((bomb, 10), (empty, 1), (ragged, 1), (nothing, 1), (lying, 1), (bomb[:32] + b"\xff" * 4, 1)):
        entry = node(b"f", FILE, 100_000, content)
        entry.extra = Extra(depth=depth)
        with pytest.raises(Damaged):
            collect(catalog.file_refs(entry))


# Pages and nodes of an enemy ------------------------------------------------------------------------------------------


def read_all(catalog: Catalog) -> list[tuple[bytes, Entry]]:
    found = flat(collect(catalog.walk()))
    assert flat(collect(catalog.walk(reverse=True))) == found[::-1]
    return found


def refused(chunks: Chunks, root: bytes, depth: int) -> None:
    """Every way to read it says that it is damaged."""
    with pytest.raises(Damaged):
        collect(Catalog(root, depth, chunks.load).pages())
    with pytest.raises(Damaged):
        collect(Catalog(root, depth, chunks.load).pages(reverse=True))
    with pytest.raises(Damaged):
        cursor = ParentCursor(root, depth, chunks.load_now)
        for directory in (b"", b"a", b"a/b", b"b", b"z", b"\xff"):
            list(cursor.seek(directory))


ROOT = node(b"", DIRECTORY)


def changed(**fields: object) -> Entry:
    entry = node(b"n")
    for name, value in fields.items():
        setattr(entry, name, value)
    return entry


@pytest.mark.parametrize(
    "sections",
    [
        [],
        [Section(b"", [])],
        [Section(b"", [ROOT]), Section(b"a", [])],
        *([Section(b"", [ROOT, node(name)])] for name in (b".", b"..", b"/", b"a/b", b"/etc", b"../x", b"a\0", b"\0")),
        [Section(b"", [ROOT, node(b"")])],
        [Section(b"a", [node(b"")])],
        [Section(b"", [ROOT, node(b"b"), node(b"a")])],
        [Section(b"", [ROOT, node(b"a"), node(b"a")])],
        [Section(b"", [ROOT]), Section(b"b", [node(b"n")]), Section(b"a", [node(b"n")])],
        [Section(b"", [ROOT]), Section(b"a", [node(b"n")]), Section(b"a", [node(b"o")])],
        [Section(b"", [ROOT]), Section(b"a.b", [node(b"n")]), Section(b"a/b", [node(b"n")])],
        *(
            [Section(b"", [ROOT]), Section(directory, [node(b"n")])]
            for directory in (
                b"/",
                b"/a",
                b"a/",
                b"a//b",
                b"..",
                b"a/..",
                b"../a",
                b"a/../b",
                b".",
                b"a/./b",
                b"a\0b",
                b"\0",
            )
        ),
        *(
            [Section(b"", [ROOT, changed(**fields)])]
            for fields in (
                *({"mode": -1}, {"mode": 1 << 32}, {"uid": -1}, {"gid": 1 << 32}, {"size": -1}, {"size": 1 << 63}),
                *({"content": bytes(35)}, {"extra": Extra(target=b"a\0b")}),
                *({"extra": Extra(depth=-1)}, {"extra": Extra(depth=17)}),
                *({"extra": Extra(rdev=-1)}, {"extra": Extra(nlink=-1)}, {"extra": Extra(extents=bytes(15))}),
                *({"extra": Extra(extents_ref=bytes(35))}, {"extra": Extra(xattrs_ref=bytes(37))}),
                {"extra": Extra(extents=bytes(16), extents_ref=bytes(36))},
            )
        ),
    ],
    ids=repr,
)
def test_pages_of_an_enemy(sections: list[Section]) -> None:
    chunks = Chunks()
    refused(chunks, chunks.store(encode(sections)), 0)


@pytest.mark.parametrize(
    "payload",
    [
        *(
            b"",
            b"\xc1",
            b"\xdd\xff\xff\xff\xff",
            b"\x91\x92\xc4\x00\xdd\xff\xff\xff\xff",
            b"\x91\x93\xc4\x00\x90" + b"\x91" * 99_999,
        ),
        encode([Section(b"", [ROOT])]) + b"\0",
        encode([Section(b"", [ROOT])]).replace(b"root", b"roo\xff"),
        encode([Section(b"%05d" % n, [node(b"n")]) for n in range(20_000)]),
    ],
    ids=range(8),
)
def test_payloads_of_an_enemy(payload: bytes) -> None:
    chunks = Chunks()
    for depth in (0, 1, 2):
        refused(chunks, chunks.store(payload), depth)


def test_roots_of_an_enemy() -> None:
    chunks = Chunks()
    ref = chunks.store(encode([Section(b"", [ROOT])]))
    assert len(read_all(Catalog(ref, 0, chunks.load))) == 1
    for root, depth in ((ref, -1), (ref, 17), (ref, 1), (b"", 0), (ref[:-1], 0), (ref[:32] + b"\xff" * 4, 0)):
        refused(chunks, root, depth)
    short = ref[:32] + struct.pack("<I", 5)
    chunks.stored[short] = chunks.stored[ref]
    refused(chunks, short, 0)
    rootless = chunks.store(encode([Section(b"a", [node(b"n")])]))
    with pytest.raises(Damaged):
        collect(Catalog(rootless, 0, chunks.load).walk())


def test_nodes_of_an_enemy() -> None:
    chunks = Chunks()

    def page(*sections: Section) -> PageRef:
        return describe(sections, chunks.store(encode(sections)))

    def above(*refs: PageRef) -> bytes:
        return chunks.store(encode(refs))

    def with_(ref: PageRef, /, **fields: object) -> PageRef:
        return msgspec.structs.replace(ref, **fields)

    first = page(Section(b"", [ROOT, node(b"a", DIRECTORY)]), Section(b"a", [node(b"n")]))
    second = page(Section(b"a", [node(b"o")]), Section(b"b", [node(b"n")]))
    overlapping = page(Section(b"a", [node(b"n"), node(b"p")]))
    assert len(read_all(Catalog(above(first, second), 1, chunks.load))) == 5
    for refs in (
        (),
        (second, first),
        (first, first),
        (first, with_(first, directory=b"z")),
        (first, with_(second, name=b"oo")),
        (first, overlapping),
        (first, with_(second, entries=3)),
        (first, with_(second, entries=-1)),
        (first, with_(second, entries=0)),
        (first, with_(second, files=-1)),
        (first, with_(second, size_bytes=-1)),
        (first, with_(second, ref=second.ref[:35])),
        (first, with_(second, ref=b"")),
        (first, with_(second, ref=second.ref[:32] + b"\xff\xff\xff\x7f")),
    ):
        refused(chunks, above(*refs), 1)
    inner = PageRef(b"", b"", above(first, second), 5, 3, 0)
    assert len(read_all(Catalog(above(inner), 2, chunks.load))) == 5
    for lie in ({"entries": 6}, {"files": 4}, {"size_bytes": 1}, {"name": b"a"}):
        refused(chunks, above(with_(inner, **lie)), 2)
    refused(chunks, above(inner), 1)
    refused(chunks, above(first, second), 2)


def test_a_tree_that_repeats_itself_is_refused_at_once() -> None:
    chunks = Chunks()
    page = [Section(b"", [ROOT])]
    ref = describe(page, chunks.store(encode(page)))
    for _ in range(12):
        same = [PageRef(b"", b"%d" % n if n else b"", ref.ref, ref.entries, ref.files, 0) for n in range(9)]
        ref = PageRef(b"", b"", chunks.store(encode(same)), 9 * ref.entries, 0, 0)
    refused(chunks, ref.ref, 12)
    assert chunks.calls < 100


@settings(max_examples=150, deadline=None)
@given(TREES, st.data())
def test_whatever_is_altered_is_damage_or_harmless(entries: dict[Key, Entry], data: st.DataObject) -> None:
    chunks = Chunks()
    root, depth = build(chunks, ordered(entries), _FINE)
    ref = data.draw(st.sampled_from(sorted(chunks.stored)))
    payload = bytearray(chunks.stored[ref])
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    chunks.stored[ref] = bytes(payload)
    try:
        found = read_all(Catalog(root, depth, chunks.load))
        cursor = ParentCursor(root, depth, chunks.load_now)
        for directory in sorted({directory for directory, _ in found}, key=lambda path: key_of(path, b"")):
            list(cursor.seek(directory))
    except Damaged:
        return
    for directory, entry in found:
        parts = [*directory.split(b"/"), entry.name] if directory else [entry.name]
        assert not any(part in (b".", b"..") or b"/" in part or b"\0" in part for part in parts)
        assert all(parts) or (directory, entry.name) == (b"", b"")
