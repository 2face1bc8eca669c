"""Make catalogs for tests: a store of payloads, trees with treacherous names, and the cutting a scan does."""

from __future__ import annotations

import stat
from itertools import groupby
from typing import TYPE_CHECKING

from blake3 import blake3
from hypothesis import strategies as st

from coffret.engine._scan import entry_weight
from coffret.engine.catalog import Cutter, Key, TreeBuilder, describe, section_weight
from coffret.engine.errors import ChunkMissing
from coffret.engine.records import REF_BYTES, Entry, Section, encode, pack_ref
from coffret.engine.settings import PAGE_MAX_ENTRIES, PAGE_MAX_WEIGHT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


KEY = bytes(range(32))
FILE, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
# Names that sort otherwise joined than as components, or that look like something else.
NAMES = st.sampled_from(
    [b"a", b"a.b", b"a b", b"a\x01", b"ab", b"b", b"...", b".a", b"\xff", b"\xc3\xa9", b"-", b"A" * 255]
)
PATHS = (
    st.lists(NAMES | st.binary(min_size=1, max_size=3), min_size=1, max_size=5)
    .map(tuple)
    .filter(lambda parts: all(b"/" not in part and b"\0" not in part and part not in (b".", b"..") for part in parts))
)


class Chunks:
    """Payloads by ref, as a repository would have them, cut if they are large; counts what is asked for."""

    def __init__(self, piece_bytes: int = 1 << 20) -> None:
        self.piece_bytes = piece_bytes
        self.stored: dict[bytes, bytes] = {}
        self.loaded: list[bytes] = []
        self.calls = 0

    def store(self, payload: bytes) -> bytes:
        refs = b""
        for at in range(0, max(1, len(payload)), self.piece_bytes):
            piece = payload[at : at + self.piece_bytes]
            ref = pack_ref(blake3(piece, key=KEY).digest(), len(piece))
            self.stored[ref] = piece
            refs += ref
        return refs

    def load_now(self, refs: Sequence[bytes]) -> list[bytes]:
        assert refs
        self.calls += 1
        self.loaded += refs
        return [b"".join(self._chunk(ref[at : at + REF_BYTES]) for at in range(0, len(ref), REF_BYTES)) for ref in refs]

    async def load(self, refs: Sequence[bytes]) -> list[bytes]:
        return self.load_now(refs)

    def _chunk(self, ref: bytes) -> bytes:
        if ref not in self.stored:
            raise ChunkMissing(f"no chunk {ref.hex()}")
        return self.stored[ref]


def node(name: bytes, mode: int = FILE, size: int = 0, content: bytes = b"") -> Entry:
    return Entry(name, mode, 0, 0, "root", "root", size, 1, 1, 1, 1, content=content)


def tree(files: Iterable[tuple[bytes, ...]]) -> dict[Key, Entry]:
    """The entries of a tree that has these files, by (directory, name); a path that has others below is a directory."""
    entries = {(b"", b""): node(b"", DIRECTORY)}
    for parts in files:
        for depth in range(1, len(parts)):
            entries[b"/".join(parts[: depth - 1]), parts[depth - 1]] = node(parts[depth - 1], DIRECTORY)
        entries.setdefault((b"/".join(parts[:-1]), parts[-1]), node(parts[-1], FILE, len(parts[-1])))
    return entries


def components(key: Key) -> tuple[tuple[bytes, ...], bytes]:
    """The order by its definition."""
    directory, name = key
    return tuple(directory.split(b"/")) if directory else (), name


def ordered(entries: dict[Key, Entry]) -> list[tuple[bytes, Entry]]:
    return [(key[0], entries[key]) for key in sorted(entries, key=components)]


def cut(cutter: Cutter, entries: Iterable[tuple[bytes, Entry]]) -> Iterator[tuple[list[Section], int]]:
    """Pages and the levels of their cuts, of entries in order."""
    sections: list[Section] = []
    count = weight = 0
    level = 1
    for directory, listing in groupby(entries, key=lambda item: item[0]):
        seed = cutter.seed(directory)
        here: list[Entry] = []
        for _, entry in listing:
            cost = entry_weight(entry.name, entry.size, entry.mode)
            found = cutter.level(seed, entry.name)
            if count and (found or count >= PAGE_MAX_ENTRIES or weight + cost > PAGE_MAX_WEIGHT):
                yield sections, level
                sections, count, weight, level, here = [], 0, 0, found or 1, []
            if not here:
                sections.append(Section(directory, here))
                weight += section_weight(directory)
            here.append(entry)
            count += 1
            weight += cost
    yield sections, level


def build(chunks: Chunks, entries: Iterable[tuple[bytes, Entry]], cutter: Cutter | None = None) -> tuple[bytes, int]:
    """(root ref, depth) of the catalog of entries in order."""
    builder = TreeBuilder(chunks.store)
    for sections, level in cut(cutter or Cutter(KEY), entries):
        builder.add(describe(sections, chunks.store(encode(sections))), level)
    return builder.finish()


class FineCutter(Cutter):
    """Cuts as `Cutter` does, but every third entry or so, so that few entries make a tree of many levels."""

    __slots__ = ()

    def level(self, seed: int, name: bytes) -> int:
        bits = blake3(name, key=seed.to_bytes(32, "little")).digest(8)
        level = 0
        while level < len(bits) and bits[level] % 3 == 0:
            level += 1
        return level
