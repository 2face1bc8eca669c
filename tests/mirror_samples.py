"""Made-up index objects, and what a mirror must say of them."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from coffret.engine import mirror_fold
from coffret.engine.mirror import Location, Mirror, attempt_of
from coffret.engine.records import Block, IndexObject, PackTable, pack_ref

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

REPOSITORY = "0123456789abcdef"
HEADER = b"h" * 64


def chunk(number: int) -> bytes:
    """The id of a made-up chunk."""
    return blake3(b"chunk %d" % number).digest()


def table(pack: str, chunks: Sequence[int], *, per_block: int = 3) -> PackTable:
    """A pack of made-up chunks; chunk n is n + 1 bytes long."""
    blocks, offset = [], 64
    for at in range(0, len(chunks), per_block):
        part = chunks[at : at + per_block]
        raw = sum(number + 1 for number in part)
        blocks.append(Block(offset, raw + 16, raw, 0, b"".join(pack_ref(chunk(n), n + 1) for n in part)))
        offset += raw + 16
    return PackTable(blake3(pack.encode()).digest(), HEADER, offset + 100, blocks)


def index(packs: Mapping[str, Sequence[int]]) -> IndexObject:
    return IndexObject([table(pack, chunks) for pack, chunks in packs.items()])


def two_packs(number: int) -> IndexObject:
    """One of any number of index objects, each of its own 40 chunks."""
    return index({f"{number}.{p}": range(number * 40 + p * 20, number * 40 + p * 20 + 20) for p in (0, 1)})


def name(attempt: int, number: int = 0) -> str:
    return f"index/{attempt:032x}-{number}"


def expected(objects: Mapping[str, IndexObject]) -> dict[bytes, set[Location]]:
    """Every location of every chunk, by the plainest reading of index objects."""
    found: dict[bytes, set[Location]] = {}
    for held in objects.values():
        for pack in held.packs:
            for block in pack.blocks:
                inner = 0
                for at in range(0, len(block.refs), 36):
                    length = int.from_bytes(block.refs[at + 32 : at + 36], "little")
                    where = (block.offset, block.stored_bytes, block.raw_bytes, block.codec, inner, length)
                    location = Location(pack.pack, pack.size_bytes, pack.header, *where)
                    found.setdefault(block.refs[at : at + 32], set()).add(location)
                    inner += length
    return found


def files(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder, sorted."""
    return sorted(folder.glob(pattern))


async def refresh(mirror: Mirror, objects: Mapping[str, IndexObject], **ended: Iterable[str]) -> list[str]:
    """Bring a mirror up to date as a writer does; return what it lacked."""
    settled = set(ended.get("settled", map(attempt_of, objects)))
    wanted = await mirror.reconcile(list(objects), settled=settled, revoked=set(ended.get("revoked", ())))
    await mirror.merge([(held, objects[held]) for held in wanted])
    return wanted


async def agrees(mirror: Mirror, objects: Mapping[str, IndexObject]) -> None:
    """Check every answer of a mirror that goes by exactly these index objects, all of them settled."""
    truth = expected(objects)
    ids = [*truth, *(chunk(-n) for n in range(1, 20))]
    assert set(mirror.objects) == set(objects)
    sifted = await mirror.sift(ids)
    assert sifted.absent == list(range(len(truth), len(ids)))
    assert sifted.adopt == []
    for chunk_id, location in zip(ids, await mirror.locate(ids), strict=True):
        assert location in truth[chunk_id] if chunk_id in truth else location is None
    for chunk_id in random.Random(1).sample(ids, min(20, len(ids))):
        assert set(await mirror.locate_all(chunk_id)) == truth.get(chunk_id, set())
    packs = [pack async for batch in mirror.packs() for pack in batch]
    assert sorted(packs) == sorted((p.pack, p.size_bytes) for held in objects.values() for p in held.packs)


@contextlib.contextmanager
def small_runs() -> Iterator[None]:
    """Make runs of a few rows and fold them by a few, so that little data passes through all of the code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror_fold, "FRESH_ROWS", 8)
        patch.setattr(mirror_fold, "_MIN_BITS", 3)
        patch.setattr(mirror_fold, "_PIECE_ROWS", 8)
        patch.setattr(mirror_fold, "_BUCKET_ROWS", 4)
        patch.setattr(mirror_fold, "_WRITE_BYTES", 100)
        patch.setattr(mirror_fold, "_FOLD_ROWS", 4)
        yield
