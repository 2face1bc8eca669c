"""Catalogs that an enemy made: each is damage, at once, whatever it says."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.catalog_reader.reading import _FINE, TREES, collect, flat, run
from tests.catalogs import DIRECTORY, FILE, Chunks, build, node, ordered

from coffret.engine.catalog import describe, key_of
from coffret.engine.catalog_reader import Attributes, Catalog, ParentCursor
from coffret.engine.errors import Damaged
from coffret.engine.records import Entry, Extra, PageRef, Section, encode, pack_ref

if TYPE_CHECKING:
    from coffret.engine.catalog import Key


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
