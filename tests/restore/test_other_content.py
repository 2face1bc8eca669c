"""Validly sealed packs and index objects that hold other content than they say: each reader of chunks compares ids.

Whoever has the keys, or a repository without encryption, can seal anything; a fault of memory before sealing does too.
"""

from __future__ import annotations

import os
import shutil
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from tests.harness import Recorder, repository
from tests.restore.case import Case, case, catalog_packs

from coffret.engine import sealing
from coffret.engine.errors import ChunkMissing, reported
from coffret.engine.index import open_index
from coffret.engine.ops.check import CheckOptions
from coffret.engine.packfile import PackBuilder, PackReader, pack_name
from coffret.engine.records import PackTable, encode
from coffret.engine.sealing import HEADER_BYTES, RAW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from coffret.engine.records import IndexObject

pytestmark = pytest.mark.anyio


async def forge_index(c: Case, change: Callable[[IndexObject], None]) -> None:
    """Seal the index anew, under its name."""
    for path in (c.place / "repository" / "index").iterdir():
        name = f"index/{path.name}"
        index = open_index(c.opened.sealer, name, path.read_bytes())
        change(index)
        attempt = bytes.fromhex(path.name.partition("-")[0])
        body = c.opened.sealer.seal(sealing.INDEX, name, attempt, encode(index))
        await c.opened.connector.put(name, [body])


async def forge_pack(c: Case, old: bytes, new: bytes, *, catalog: bool) -> None:
    """Replace a pack by one that says it holds the same chunks, one of which has `new` in place of `old`."""
    of_catalog, changed = await catalog_packs(c), 0
    forged: dict[bytes, PackTable] = {}
    for path in list((c.place / "repository" / "packs").rglob("*")):
        if not path.is_file() or (bytes.fromhex(path.name) in of_catalog) != catalog:
            continue
        data = path.read_bytes()
        reader = PackReader(data, c.opened.sealer)
        builder = PackBuilder(memoryview(bytearray(64 << 20)), c.opened.sealer, reader.attempt)
        for block in reader.open_footer(data, len(data)):
            stored = data[block.offset : block.offset + block.stored_bytes]
            raw = bytes(reader.open_block(stored, block.offset, block.raw_bytes, block.codec))
            changed += raw.count(old)
            raw = raw.replace(old, new)
            offset = builder.reserve(len(raw), len(raw), RAW, block.refs)
            assert offset is not None
            builder.seal(raw, offset)
        pack, length = builder.finish()
        await c.opened.connector.put(pack_name(pack), [bytes(builder.buffer[:length])])
        path.unlink()
        header = bytes(builder.buffer[:HEADER_BYTES])
        forged[bytes.fromhex(path.name)] = PackTable(pack, header, length, builder.blocks)
    assert changed == 1

    def renamed(index: IndexObject) -> None:
        for number, each in enumerate(index.packs):
            if each.pack in forged:
                index.packs[number] = forged[each.pack]

    await forge_index(c, renamed)


@asynccontextmanager
async def as_a_stranger(c: Case) -> AsyncIterator[Case]:
    """The repository opened by somebody who has nothing of it in a cache."""
    shutil.rmtree(c.place / "cache")
    async with repository(c.place) as opened:
        other = Case(opened, c.place)
        other.snapshot = c.snapshot
        await opened.commits()
        yield other


async def damage_found(c: Case, *, one: bool) -> set[str]:
    """The reasons that a check gives."""
    progress = Recorder()
    summary = await c.opened.check([(c.snapshot, None)] if one else None, CheckOptions(), progress)
    assert not summary.clean
    return set(progress.faults.values())


async def test_a_pack_of_other_content(place: Path) -> None:
    async with case(place) as c:
        content = (c.source / "a" / "d").read_bytes()
        await forge_pack(c, content, bytes(reversed(content)), catalog=False)
        async with as_a_stranger(c) as other:
            faults = await other.restore()
            assert faults.keys() == {"a/d"}
            assert "does not have its id" in faults["a/d"]
            assert not (other.target / "a" / "d").exists()
            for one in (False, True):
                assert any("does not have its id" in why for why in await damage_found(other, one=one))


async def test_a_piece_of_a_large_file_is_other_content(place: Path) -> None:
    async with case(place) as c:
        content = (c.source / "large").read_bytes()[-500:]
        await forge_pack(c, content, bytes(reversed(content)), catalog=False)
        async with as_a_stranger(c) as other:
            faults = await other.restore()
            assert faults.keys() == {"large"}
            assert "does not have its id" in faults["large"]
            for one in (False, True):
                assert any("does not have its id" in why for why in await damage_found(other, one=one))


async def test_a_catalog_of_other_content(place: Path) -> None:
    """It decodes, with a file of another name."""
    async with case(place) as c:
        await forge_pack(c, b"empty", b"emptz", catalog=True)
        async with as_a_stranger(c) as other:
            with pytest.raises(Exception) as raised:
                _ = [each async for each in other.opened.entries(c.snapshot, os.fsencode(c.source)[1:], recursive=True)]
            assert isinstance(reported(raised.value), ChunkMissing)
            assert "does not have its id" in str(reported(raised.value))
            with pytest.raises(Exception) as raised:
                faults = await other.restore()
                raise ChunkMissing(str(faults))
            assert "does not have its id" in str(reported(raised.value))
            assert "emptz" not in other.restored()
            for one in (False, True):
                assert any("does not have its id" in why for why in await damage_found(other, one=one))


async def test_an_index_that_names_other_content(place: Path) -> None:
    """Two files of one length, the index having each of their chunks where the other's lies."""

    def exchanged(index: IndexObject) -> None:
        found = 0
        for table in index.packs:
            for block in table.blocks:
                refs = list(struct.iter_unpack("<32sI", block.refs))
                alike = [number for number, (_, length) in enumerate(refs) if length == 2000]
                if len(alike) > 1:
                    one, two = alike[:2]
                    refs[one], refs[two] = refs[two], refs[one]
                    block.refs = b"".join(struct.pack("<32sI", *ref) for ref in refs)
                    found += 1
        assert found == 1

    async with case(place) as c:
        await forge_index(c, exchanged)
        async with as_a_stranger(c) as other:
            faults = await other.restore()
            assert len([name for name in faults if name in ("a/b/c", "a/d", "e")]) >= 2
            assert all("does not have its id" in why for why in faults.values())
            for one in (False, True):
                assert await damage_found(other, one=one)
