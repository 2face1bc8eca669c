"""What reads stored bytes, each as a function of bytes that either returns or raises an error of the engine.

With each come inputs that are good. Where the bytes are authenticated there are two targets: of the sealed object, and
of what is in it, since a client with the keys can write anything there.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import anyio
import msgspec
import zstandard
from blake3 import blake3

from coffret.connectors.memory import MemoryConnector
from coffret.engine import configuration, keys, sealing, seen, state
from coffret.engine.attempt import open_marks
from coffret.engine.catalog_reader import Catalog
from coffret.engine.catalog_walk import open_node, open_page
from coffret.engine.errors import CoffretError
from coffret.engine.footers import read_footer
from coffret.engine.index import open_index
from coffret.engine.kdf import Cost
from coffret.engine.keyring import read_keyring
from coffret.engine.mirror_store import Store
from coffret.engine.objects import list_objects
from coffret.engine.ops import recovery
from coffret.engine.packfile import TRAILER, PackBuilder, open_block
from coffret.engine.records import (
    Block,
    Counts,
    End,
    Entry,
    Extra,
    IndexObject,
    Mark,
    PackTable,
    PageRef,
    Section,
    SnapshotHeader,
    SourceFault,
    encode,
    pack_ref,
)
from coffret.engine.sealing import Sealer, Secrets, decompress
from coffret.engine.snapshot import open_end, open_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SECRETS = Secrets(bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96)))
CLEAR = Secrets(b"", SECRETS.id_key, SECRETS.chunker_key)
REPOSITORY = bytes(32)
ATTEMPT = bytes(range(16))
CHUNK = b"a chunk " * 20
REF = pack_ref(blake3(CHUNK, key=SECRETS.id_key).digest(), len(CHUNK))
# Nobody guesses: what a mutation of a slot costs is bounded by its own numbers, and by time.
_CHEAP = Cost(memory_kib=32, passes=1, lanes=1)

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True, slots=True)
class Target:
    """`run` reads bytes; `good` are some that it takes; `text`: they are text, so that mutations stay near it."""

    name: str
    run: Callable[[bytes], object]
    good: tuple[bytes, ...]
    text: bool = False

    def __call__(self, data: bytes) -> bool:
        """Whether the bytes were taken. What is raised else is the engine's, or this fails."""
        try:
            self.run(data)
        except CoffretError:
            return False
        return True

    def corpus(self) -> list[bytes]:
        """Inputs that are kept: the good ones, and those that once broke something."""
        return [*self.good, *(path.read_bytes() for path in sorted((CORPUS / self.name).glob("*")))]


def _entry(name: bytes, **fields: object) -> Entry:
    made = Entry(name, 0o100644, 1, 2, "user", "group", len(CHUNK), 10**18, 10**18, 7, 8, False, REF)
    return msgspec.structs.replace(made, **fields)


_DIRECTORY = _entry(b"", mode=0o040755, size=0, content=b"")
_EXTRA = Extra(xattrs=[(b"user.x", b"value")], xattrs_ref=b"", nlink=2)
_SECTIONS = [
    Section(b"", [_DIRECTORY, _entry(b"etc", mode=0o040755, size=0, content=b"")]),
    Section(b"etc", [_entry(b"hosts", extra=_EXTRA), _entry(b"link", mode=0o120777, size=0, content=b"",
                                                            extra=Extra(target=b"hosts"))]),
]  # fmt: skip
_NODE = [PageRef(b"", b"", REF, 4, 2, 2 * len(CHUNK)), PageRef(b"usr", b"bin", REF, 1, 0, 0)]
_HEADER = SnapshotHeader(
    bytes(16), 10**18, 5, "host", "user", [b"/etc"], REF, 1, Counts(files=1), ["tag"], [SourceFault(b"/x", "why")],
    bytes(16), "coffret",
)  # fmt: skip


def _pack(secrets: Secrets) -> bytes:
    buffer = memoryview(bytearray(1 << 16))
    builder = PackBuilder(buffer, Sealer(secrets, REPOSITORY), ATTEMPT)
    for body, codec in ((CHUNK, sealing.RAW), (zstandard.ZstdCompressor().compress(CHUNK), sealing.ZSTD)):
        offset = builder.reserve(len(body), len(CHUNK), codec, REF)
        assert offset is not None
        builder.seal(body, offset)
        builder.sealing -= 1
    return bytes(buffer[: builder.finish()[1]])


def _table() -> list[Block]:
    return [Block(64, 176, 160, 0, REF), Block(240, 50, 160, 1, REF)]


def _index() -> IndexObject:
    return IndexObject([PackTable(bytes(32), _pack(SECRETS)[:64], 400, _table())], b"config", {"0" * 64: b"slot"})


async def _open_footer(sealer: Sealer, data: bytes) -> None:
    storage = MemoryConnector()
    await storage.put("packs/00/x", [data])
    await read_footer(storage, sealer, "packs/00/x", len(data))


async def _marks(sealer: Sealer, data: bytes) -> None:
    storage = MemoryConnector()
    await storage.put("trash/1", [data])
    await open_marks(storage, sealer, await list_objects(storage, "trash/"))


async def _keyring(name: str, data: bytes) -> None:
    storage = MemoryConnector()
    await storage.put(name, [data])
    await read_keyring(storage)


async def _file_of(entry: Entry, payload: bytes) -> None:
    """Read the chunk list of an entry, each list of which is this."""

    async def load(refs: Sequence[bytes]) -> list[bytes]:
        return [payload for _ in refs]

    catalog = Catalog(REF, 0, load)
    async for _ in catalog.file_refs(entry):
        pass


def _page(payload: bytes) -> None:
    ref = pack_ref(bytes(32), len(payload)) if payload else b""
    page = open_page(PageRef(b"", b"", ref, -1, 0, 0), payload)

    async def load(refs: Sequence[bytes]) -> list[bytes]:
        return [CHUNK for _ in refs]

    async def entries() -> None:
        catalog = Catalog(ref, 0, load)
        for section in page.sections:
            for entry in section.entries:
                with suppress(CoffretError):
                    await catalog.attributes(entry)
                with suppress(CoffretError):
                    async for _ in catalog.file_refs(entry):
                        pass

    anyio.run(entries)


def _node(payload: bytes) -> None:
    open_node(PageRef(b"", b"", pack_ref(bytes(32), len(payload)) if payload else b"", -1, 0, 0), payload)


def _sealed(kind: bytes, name: str, payload: bytes, secrets: Secrets = SECRETS) -> bytes:
    return Sealer(secrets, REPOSITORY).seal(kind, name, ATTEMPT, payload)


def _lists(payload: bytes) -> None:
    ref = pack_ref(bytes(32), len(payload)) if payload else b""
    anyio.run(_file_of, _entry(b"x", content=ref, extra=Extra(depth=1)), payload)


def _attribute(field: str) -> Callable[[bytes], None]:
    def read(payload: bytes) -> None:
        ref = pack_ref(bytes(32), len(payload)) if payload else b""
        entry = _entry(b"x", size=1000, extra=Extra(**{field: ref}))  # type: ignore[arg-type]

        async def load(refs: Sequence[bytes]) -> list[bytes]:
            return [payload for _ in refs]

        anyio.run(Catalog(REF, 0, load).attributes, entry)

    return read


def _slot(data: bytes) -> None:
    slot = keys.parse_slot(blake3(data).hexdigest(), data)
    if slot.cost <= Cost(1024, 2, 2):  # what a dearer one may cost is bounded elsewhere
        keys.unwrap(slot, b"passphrase", bytes(32))


def _recovery(data: bytes) -> None:
    content = recovery._parse(data.decode("utf-8", "replace"))
    configuration.parse_config(content.config)


@contextmanager
def _folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="coffret-test-") as folder:
        yield Path(folder)


def _pins(data: bytes) -> None:
    with _folder() as folder:
        path = state.file_of("here", "pins", folder)
        path.parent.mkdir()
        path.write_bytes(data)
        state.check("here", "11" * 32, True, bytes(32), folder=folder)


def _seen(data: bytes) -> None:
    with _folder() as folder:
        (folder / "x.seen").write_bytes(data)
        seen.read_seen(folder / "x.seen")


def _manifest(data: bytes) -> None:
    with _folder() as folder:
        store = Store(folder, "11" * 32)
        (folder / "manifest").write_bytes(data)
        store.load()


@dataclass(slots=True)
class _Made:
    targets: list[Target] = field(default_factory=list)

    def add(self, name: str, run: Callable[[bytes], object], *good: bytes, text: bool = False) -> None:
        self.targets.append(Target(name, run, good, text))

    def both(self, name: str, kind: bytes, place: str, run: Callable[[Sealer, bytes], object], payload: bytes) -> None:
        """The sealed object, with and without encryption; and what is in it, sealed by somebody with the keys."""
        for suffix, secrets in (("", SECRETS), ("-clear", CLEAR)):
            sealer = Sealer(secrets, REPOSITORY)
            self.add(f"{name}{suffix}", partial(run, sealer), _sealed(kind, place, payload, secrets))
        sealer = Sealer(SECRETS, REPOSITORY)
        self.add(f"{name}-payload", lambda data: run(sealer, _sealed(kind, place, data)), payload)


def _resealed_footer(table: bytes) -> bytes:
    """A pack with this block table, sealed by somebody with the keys; the blocks are as long as in a good one."""
    pack = _pack(SECRETS)
    header, length = pack[:64], int.from_bytes(pack[-16:-12], "little")
    start = len(pack) - 16 - length
    packed = zstandard.ZstdCompressor().compress(table)
    target = bytearray(len(packed) + 16)
    sealer = Sealer(SECRETS, REPOSITORY)
    sealer.cipher_like(header, sealing.FOOTER).seal_into(packed, start, memoryview(target))
    count = 2
    with suppress(Exception):
        count = len(msgspec.msgpack.decode(table))
    return pack[:start] + bytes(target) + TRAILER.pack(len(target), count & 0xFFFFFFFF, b"COFFREND")


def _good_table() -> bytes:
    """The block table of the pack that `_resealed_footer` makes."""
    pack = _pack(SECRETS)
    length = int.from_bytes(pack[-16:-12], "little")
    start = len(pack) - 16 - length
    table = Sealer(SECRETS, REPOSITORY).cipher_like(pack[:64], sealing.FOOTER).open(pack[start:-16], start)
    return decompress(table, 1 << 20)


def targets() -> list[Target]:
    """All of them."""
    made, snapshot = _Made(), f"snapshots/{ATTEMPT.hex()}"
    sealer, clear = Sealer(SECRETS, REPOSITORY), Sealer(CLEAR, REPOSITORY)
    made.both("index", sealing.INDEX, "index/x-0", lambda s, d: open_index(s, "index/x-0", d), encode(_index()))
    made.both("snapshot", sealing.SNAPSHOT, snapshot, lambda s, d: open_snapshot(s, snapshot, d), encode(_HEADER))
    made.both("end", sealing.END, snapshot, lambda s, d: open_end(s, snapshot, d), encode(End("swept", 1)))
    made.both("mark", sealing.MARK, "trash/1", lambda s, d: anyio.run(_marks, s, d), encode(Mark(bytes(64))))
    made.add("pack", lambda data: anyio.run(_open_footer, sealer, data), _pack(SECRETS))
    made.add("pack-clear", lambda data: anyio.run(_open_footer, clear, data), _pack(CLEAR))
    made.add("table", lambda data: anyio.run(_open_footer, sealer, _resealed_footer(data)), _good_table())
    made.add(
        "block",
        lambda data: open_block(clear.cipher(_pack(CLEAR)[:64], sealing.PACK), data, 64, len(CHUNK), sealing.ZSTD),
    )
    made.add(
        "frame",
        lambda data: decompress(data, 1 << 20),
        zstandard.ZstdCompressor().compress(bytes(5000)),
        zstandard.ZstdCompressor().compress(CHUNK),
    )
    made.add("page", _page, encode(_SECTIONS))
    made.add("node", _node, encode(_NODE))
    made.add("lists", _lists, REF * 3)
    made.add("xattrs", _attribute("xattrs_ref"), encode([(b"user.x", b"value")] * 3))
    made.add("extents", _attribute("extents_ref"), (0).to_bytes(8, "little") + (10).to_bytes(8, "little"))
    config = configuration.config_bytes(configuration.new_config(SECRETS, created="2026-01-02T03:04:05Z"))
    made.add("config", configuration.parse_config, config, text=True)
    slot = keys.wrap(SECRETS, b"passphrase", bytes(32), label="host", cost=_CHEAP)
    made.add("slot", _slot, slot[1], text=True)
    made.add("keyring", lambda data: anyio.run(_keyring, "keys/removed-1", data), b"{}", text=True)
    storage = MemoryConnector()

    async def export() -> str:
        await storage.put(f"keys/{slot[0]}", [slot[1]])
        return await recovery.export(storage, config, SECRETS)

    made.add("recovery", _recovery, anyio.run(export).encode(), text=True)
    made.add("pins", _pins, b'{"location":"here","accepted":[["' + b"11" * 32 + b'",true,"' + b"00" * 32 + b'"]]}',
             text=True)  # fmt: skip
    made.add("seen", _seen, seen._encoded(seen.Seen({(bytes(16), bytes(16))}, {(bytes(16), os.urandom(16))})))
    made.add("manifest", _manifest, b"coffret mirror 0" + bytes(40))
    return made.targets
