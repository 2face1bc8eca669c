"""The catalog's order, cuts and trees, against their definitions."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.catalogs import DIRECTORY, FILE, KEY, PATHS, Chunks, build, components, cut, node, ordered, tree

from coffret.engine._scan import entry_weight
from coffret.engine.catalog import (
    Cutter,
    RefList,
    TreeBuilder,
    describe,
    directory_key,
    join_path,
    key_of,
    section_weight,
    split_path,
)
from coffret.engine.records import (
    REF_BYTES,
    Entry,
    Extra,
    PageRef,
    Section,
    decode_node,
    decode_page,
    encode,
    iter_refs,
    pack_ref,
)
from coffret.engine.settings import INLINE_REFS, LIST_MAX_REFS, NODE_MAX_ENTRIES, PAGE_MAX_ENTRIES, PAGE_MAX_WEIGHT

if TYPE_CHECKING:
    from collections.abc import Iterable

# What `Cutter(KEY)` says of the root, and of the names "name0" … "name99999" in usr/share/doc.
SEED_OF_ROOT = 6503772487167931494
FIRST_CUTS = [255, 581, 1684, 1708, 2062, 2666, 2959, 2971]
HIGHER_CUTS = {43863: 2, 66530: 2, 71648: 2}


def pages_of(entries: Iterable[tuple[bytes, Entry]]) -> list[bytes]:
    return [encode(sections) for sections, _ in cut(Cutter(KEY), entries)]


def numbered(count: int, directories: int = 20) -> list[tuple[bytes, Entry]]:
    return ordered(tree((b"dir%03d" % (n % directories), b"file%06d" % n) for n in range(count)))


# Order ----------------------------------------------------------------------------------------------------------------


@given(st.lists(PATHS, max_size=20))
def test_keys_sort_as_tuples_of_components(files: list[tuple[bytes, ...]]) -> None:
    keys = list(tree(files))
    assert sorted(keys, key=lambda key: key_of(*key)) == sorted(keys, key=components)


def test_listings_are_contiguous_and_directories_depth_first() -> None:
    files = [(b"a", b"x", b"1"), (b"a.b", b"2"), (b"a", b"y"), (b"b",)]
    assert [join_path(directory, entry.name) for directory, entry in ordered(tree(files))] == [
        *(b"", b"a", b"a.b", b"b"),
        *(b"a/x", b"a/y", b"a/x/1", b"a.b/2"),
    ]
    assert directory_key(b"a/x") < directory_key(b"a.b")


@given(PATHS)
def test_paths_split_and_join(parts: tuple[bytes, ...]) -> None:
    path = b"/".join(parts)
    assert join_path(*split_path(path)) == path
    assert split_path(b"") == (b"", b"")


# Cuts -----------------------------------------------------------------------------------------------------------------


def test_cuts_never_change() -> None:
    """They are part of the format: other cuts would make every page of every repository new."""
    cutter = Cutter(KEY)
    seed = cutter.seed(b"usr/share/doc")
    found = {number: cutter.level(seed, b"name%d" % number) for number in range(100_000)}
    levels = {number: level for number, level in found.items() if level}
    assert cutter.seed(b"") == SEED_OF_ROOT
    assert [number for number in levels if number < 3000] == FIRST_CUTS
    assert {number: level for number, level in levels.items() if level > 1} == HIGHER_CUTS
    assert Cutter(bytes(32)).seed(b"") != SEED_OF_ROOT


def test_cuts_depend_on_the_directory() -> None:
    cutter = Cutter(KEY)
    one, two = cutter.seed(b"one"), cutter.seed(b"two")
    names = [b"%d" % number for number in range(5000)]
    assert [n for n in names if cutter.level(one, n)] != [n for n in names if cutter.level(two, n)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.booleans())
def test_an_edit_changes_the_pages_around_it_only(position: int, remove: bool) -> None:
    entries = numbered(10_000)
    before = pages_of(entries)
    directory, entry = entries[max(1, position)]
    if remove:
        del entries[max(1, position)]
    else:
        entries.insert(max(1, position) + 1, (directory, node(entry.name + b"+")))
    after = pages_of(entries)
    assert len(set(before) ^ set(after)) <= 4
    assert len(before) > 20


def test_an_edit_changes_one_path_of_the_tree_only() -> None:
    entries = numbered(60_000)
    chunks = Chunks()
    root, depth = build(chunks, entries)
    assert depth >= 1
    before = set(chunks.stored)
    directory, entry = entries[30_000]
    entries[30_000] = (directory, node(entry.name, FILE, 77))
    assert build(chunks, entries)[0] != root
    assert len(set(chunks.stored) - before) == depth + 1


def test_pages_that_names_do_not_cut_are_cut_by_their_limits() -> None:
    cutter = Cutter(KEY)
    seed = cutter.seed(b"d")
    names = [name for name in (b"%07d" % n for n in range(5000)) if not cutter.level(seed, name)]
    pages = list(cut(cutter, [(b"d", node(name)) for name in names]))
    assert [level for _, level in pages] == [1] * len(pages)
    assert all(describe(sections, b"").entries == PAGE_MAX_ENTRIES for sections, _ in pages[:-1])
    large = list(cut(cutter, [(b"d", node(name, FILE, 1 << 40)) for name in names]))
    assert len(large) > len(pages)
    deep = list(cut(cutter, [(b"d" * 100_000 + name, node(b"n")) for name in names[:100]]))
    for sections, _ in (*large, *deep):
        # The path of one directory more: its weight is known when its first entry is in.
        assert len(encode(sections)) <= PAGE_MAX_WEIGHT + len(sections[-1].directory)


@given(
    st.binary(max_size=255),
    st.integers(0, 1 << 50),
    st.sampled_from([FILE, DIRECTORY, 0o120777, 0o60600]),
    st.integers(0, 3000),
)
def test_weight_is_an_upper_estimate(name: bytes, size: int, mode: int, target_bytes: int) -> None:
    largest = (1 << 63) - 1
    content = extents = target = b""
    if mode == FILE:
        content = bytes(REF_BYTES) * min(INLINE_REFS, 1 + size // (512 << 10))
        extents = bytes(16) * min(32, size // 8192)
    elif mode == 0o120777:
        size, target = target_bytes, b"t" * target_bytes
    extra = Extra(target, largest, 1 << 31, 3, [(b"user.x", bytes(500))], b"", extents)
    user, group = "u" * 32, "g" * 32
    number = 1 << 31
    entry = Entry(
        name, mode, number, number, user, group, size, largest, largest, largest, largest, True, content, extra
    )
    assert len(encode(entry)) <= entry_weight(name, size, mode)
    section = [Section(b"d" * target_bytes, [entry])]
    assert len(encode(section)) <= entry_weight(name, size, mode) + section_weight(section[0].directory)


def test_describe_counts_regular_files() -> None:
    sections = [
        Section(b"", [node(b"", DIRECTORY, 4096), node(b"a", DIRECTORY, 4096), node(b"b", FILE, 5)]),
        Section(b"a", [node(b"c", FILE, 7), node(b"l", 0o120777, 3)]),
    ]
    assert describe(sections, b"ref") == PageRef(b"", b"", b"ref", 5, 2, 12)


# The page index -------------------------------------------------------------------------------------------------------


def leaves(chunks: Chunks, root: bytes, depth: int) -> list[bytes]:
    refs = [root]
    for _ in range(depth):
        nodes = [decode_node(payload) for payload in chunks.load_now(refs)]
        assert all(1 <= len(children) <= NODE_MAX_ENTRIES for children in nodes)
        refs = [child.ref for children in nodes for child in children]
    return refs


def page_ref(number: int) -> PageRef:
    return PageRef(b"d%07d" % number, b"n", pack_ref(blake3(b"%d" % number).digest(), 9), 3, 2, 10)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=60))
def test_a_tree_holds_its_pages_whatever_their_levels(levels: list[int]) -> None:
    chunks = Chunks()
    builder = TreeBuilder(chunks.store)
    for number, level in enumerate(levels):
        builder.add(page_ref(number), level)
    root, depth = builder.finish()
    assert depth == 0 or len(decode_node(chunks.stored[root])) > 1
    assert leaves(chunks, root, depth) == [page_ref(number).ref for number in range(len(levels))]
    if depth:
        top = decode_node(chunks.stored[root])
        assert (sum(n.entries for n in top), sum(n.files for n in top)) == (3 * len(levels), 2 * len(levels))


def test_nodes_have_limits() -> None:
    chunks = Chunks()
    builder = TreeBuilder(chunks.store)
    for number in range(2 * NODE_MAX_ENTRIES + 5):
        builder.add(page_ref(number), 1)
    root, depth = builder.finish()
    assert depth == 2
    assert len(leaves(chunks, root, depth)) == 2 * NODE_MAX_ENTRIES + 5


def test_nodes_of_very_long_paths_have_limits_and_an_end() -> None:
    chunks = Chunks()
    builder = TreeBuilder(chunks.store)
    for number in range(9):
        builder.add(PageRef(b"%d" % number * 600_000, b"n", page_ref(number).ref, 1, 1, 1), 1)
    root, depth = builder.finish()
    assert len(leaves(chunks, root, depth)) == 9
    assert sum(map(len, chunks.stored.values())) < 3 * 9 * 600_000


def test_pages_out_of_order_and_no_pages_are_refused() -> None:
    builder = TreeBuilder(Chunks().store)
    with pytest.raises(ValueError, match="without a page"):
        builder.finish()
    builder.add(page_ref(2), 1)
    for number in (2, 1):
        with pytest.raises(ValueError, match="out of order"):
            builder.add(page_ref(number), 1)


def test_building_needs_the_same_memory_however_many_pages() -> None:
    def peak(pages: int) -> int:
        chunks = 0

        def store(payload: bytes) -> bytes:
            nonlocal chunks
            chunks += 1
            return pack_ref(blake3(payload).digest(), len(payload))

        tracemalloc.start()
        builder = TreeBuilder(store)
        for number in range(pages):
            builder.add(page_ref(number), 2 if number % 64 == 0 else 1)
        builder.finish()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert chunks > pages // 64
        return most

    assert peak(30_000) < peak(3000) + (400 << 10)


# Chunk lists ----------------------------------------------------------------------------------------------------------


def chunk(number: int) -> tuple[bytes, int]:
    return blake3(b"chunk %d" % number).digest(), 1000 + number % 7


def listed(chunks: Chunks, refs: Iterable[tuple[bytes, int]]) -> tuple[bytes, int]:
    builder = RefList(chunks.store)
    for chunk_id, length in refs:
        builder.add(chunk_id, length)
    return builder.finish()


def flattened(chunks: Chunks, content: bytes, depth: int) -> list[tuple[bytes, int]]:
    for _ in range(depth):
        lists = [content[at : at + REF_BYTES] for at in range(0, len(content), REF_BYTES)]
        content = b"".join(chunks.stored[ref] for ref in lists)
    return list(iter_refs(content))


@pytest.mark.parametrize("count", [0, 1, INLINE_REFS, INLINE_REFS + 1, 300, 5000, 100_000])
def test_a_list_holds_its_refs(count: int) -> None:
    chunks = Chunks()
    refs = [chunk(number) for number in range(count)]
    content, depth = listed(chunks, refs)
    assert len(content) <= INLINE_REFS * REF_BYTES
    assert (depth == 0) == (count <= INLINE_REFS)
    assert flattened(chunks, content, depth) == refs
    assert all(len(payload) <= LIST_MAX_REFS * REF_BYTES for payload in chunks.stored.values())


@pytest.mark.parametrize("wanted", [True, False], ids=["every ref ends a list", "none does"])
def test_a_file_of_one_chunk_repeated(wanted: bool) -> None:
    number = next(n for n in range(10_000) if (chunk(n)[0][0] == 0) == wanted)
    chunks = Chunks()
    content, depth = listed(chunks, [chunk(number)] * 200_000)
    assert flattened(chunks, content, depth) == [chunk(number)] * 200_000
    assert depth <= 3
    assert len(chunks.stored) < 20


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 19_999), st.booleans())
def test_an_edit_changes_the_lists_around_it_only(position: int, remove: bool) -> None:
    refs = [chunk(number) for number in range(20_000)]
    chunks = Chunks()
    listed(chunks, refs)
    before = set(chunks.stored)
    if remove:
        del refs[position]
    else:
        refs.insert(position, chunk(-1))
    listed(chunks, refs)
    assert len(before) > 50
    assert len(set(chunks.stored) - before) <= 8


def test_cut_points_of_random_trees_follow_one_another() -> None:
    random_names = random.Random(1)
    files = {(b"d%d" % random_names.randrange(50), random_names.randbytes(6).hex().encode()) for _ in range(5000)}
    entries = ordered(tree(files))
    pages = [decode_page(page) for page in pages_of(entries)]
    flat = [(section.directory, entry.name) for page in pages for section in page for entry in section.entries]
    assert flat == [(directory, entry.name) for directory, entry in entries]
    assert all(a < b for a, b in pairwise(key_of(*key) for key in flat))
