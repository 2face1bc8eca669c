"""The golden repositories: what was written in format version 1 is read, checked, restored, and gone on with."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from blake3 import blake3
from tests.golden import make_repository, tree
from tests.golden.make_repository import FOLDER, PASSPHRASES, REMOVED_PASSPHRASE, name_of
from tests.golden.reader import Reader
from tests.harness import IS_ROOT, Recorder

from coffret.engine.attempt import open_marks
from coffret.engine.catalog import join_path, split_path
from coffret.engine.catalog_reader import Catalog
from coffret.engine.errors import WrongPassphrase
from coffret.engine.fetch import Fetcher
from coffret.engine.known import KnownChunks
from coffret.engine.objects import TRASH, list_objects
from coffret.engine.opening import open_repository
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.restore import RestoreOptions
from coffret.engine.packfile import pack_name
from coffret.engine.records import Entry, pack_ref
from coffret.engine.repository import OpenOptions, Repository

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from tests.golden.tree import Node

    Opener = Callable[..., AbstractAsyncContextManager[Repository]]

KINDS = ["encrypted", "clear"]
SNAPSHOTS = [("first", tree.FIRST), ("second", tree.SECOND)]
# With which the files there were made; another may compress otherwise.
LIBZSTD = (1, 5, 7)


def stored(kind: str) -> dict[str, bytes]:
    folder = FOLDER / kind
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=KINDS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens a copy of a golden repository."""
    folder = tmp_path / "repository"
    shutil.copytree(FOLDER / request.param, folder)
    options = OpenOptions(cache_dir=tmp_path / "cache", state_dir=tmp_path / "state")

    def opened(passphrase: bytes = PASSPHRASES[0]) -> AbstractAsyncContextManager[Repository]:
        return open_repository(str(folder), passphrase=lambda: passphrase, options=options)

    return opened


def expected(nodes: list[Node]) -> list[Node]:
    """The nodes of a tree in the order of a catalog."""

    def key(node: Node) -> Any:
        directory, name = split_path(node.path)
        return directory.split(b"/") if directory else [], name

    return sorted(nodes, key=key)


# BLAKE3 of the names and contents of all objects. Never to be changed: see tests/golden/README.md.
FROZEN = {
    "encrypted": "ca1e5cde117f80fffe34c966da1a45f386011c5266327bb88720712d80e90541",
    "clear": "c23f1d8a152ccb46ee371133b1ed5f474e323f3cc13b1a833538fee42c718465",
}


@pytest.mark.parametrize("kind", KINDS)
def test_they_never_change(kind: str) -> None:
    digest = blake3()
    for name, data in sorted(stored(kind).items()):
        digest.update(f"{name} {len(data)}\n".encode() + data)
    assert digest.hexdigest() == FROZEN[kind]


def test_they_are_small() -> None:
    assert sum(len(data) for kind in KINDS for data in stored(kind).values()) < 60_000


@pytest.mark.skipif(zstandard.ZSTD_VERSION != LIBZSTD, reason=f"made with libzstd {LIBZSTD}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.anyio
async def test_they_are_what_is_made_today(kind: str) -> None:
    """If this fails the format has changed: see tests/golden/README.md."""
    assert await make_repository.make(encrypted=kind == "encrypted") == stored(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_document_is_enough_to_read_them(kind: str) -> None:
    reader = Reader(stored(kind), PASSPHRASES[1])
    headers = reader.snapshots()
    assert [header["tags"] for header in headers] == [["golden", name] for name, _ in SNAPSHOTS]
    for header, (_, nodes) in zip(headers, SNAPSHOTS, strict=True):
        assert header["depth"] == 1
        found = list(reader.entries(header["catalog"], header["depth"]))
        for (directory, entry), node in zip(found, expected(nodes), strict=True):
            assert join_path(directory, entry[0]) == node.path
            assert reader.content(entry) == node.content
            assert (entry[1], entry[6], entry[7]) == (node.mode, node.size, node.mtime_ns)
            xattrs, extents = reader.attributes(entry)
            assert ([tuple(pair) for pair in xattrs], extents) == (list(node.xattrs), node.packed_extents)


def test_the_removed_passphrase_opens_nothing_by_the_document_either() -> None:
    with pytest.raises(ValueError, match="no slot"):
        Reader(stored("encrypted"), REMOVED_PASSPHRASE)


@pytest.mark.anyio
async def test_passphrases(golden: Opener) -> None:
    for passphrase in PASSPHRASES:
        async with golden(passphrase) as repository:
            encrypted = repository.config.encrypted
    if encrypted:
        with pytest.raises(WrongPassphrase):
            async with golden(REMOVED_PASSPHRASE):
                pass


@pytest.mark.anyio
async def test_what_became_of_each_attempt(golden: Opener) -> None:
    async with golden() as repository:
        commits = await repository.commits()
        assert [snapshot.attempt for snapshot in commits.snapshots] == [name_of(name) for name, _ in SNAPSHOTS]
        assert commits.snapshots[1].header.parent == commits.snapshots[0].header.snapshot_id
        assert commits.revoked == {name_of("revoked").hex()}
        assert commits.committed == {name_of(n).hex() for n in ("first", "second", "removed", "merged", "gone")}
        assert not commits.damaged


@pytest.mark.anyio
async def test_catalogs(golden: Opener) -> None:
    """Every field of every entry, and all contents, through the engine."""
    async with golden() as repository:
        fetcher = Fetcher(repository.connector, repository.sealer, repository.mirror, id_key=repository.secrets.id_key)
        for snapshot, (_, nodes) in zip((await repository.commits()).snapshots, SNAPSHOTS, strict=True):
            catalog, found = Catalog(snapshot.header.catalog, snapshot.header.depth, fetcher.load), list[Entry]()
            async for _, entries in catalog.walk():
                found += entries
            for entry, node in zip(found, expected(nodes), strict=True):
                pieces = [refs async for refs in catalog.file_refs(entry)] if stat.S_ISREG(entry.mode) else []
                assert b"".join(await fetcher.load(pieces) if pieces else []) == node.content
                attributes = await catalog.attributes(entry)
                assert (tuple(attributes.xattrs), attributes.extents) == (node.xattrs, node.packed_extents)
                extra = entry.extra
                assert (node.target, node.rdev, node.nlink) == (
                    (extra.target, extra.rdev, extra.nlink) if extra else (b"", 0, 1)
                )
                assert entry == Entry(
                    split_path(node.path)[1],
                    *(
                        node.mode,
                        1000,
                        100,
                        "golden",
                        "",
                        node.size,
                        node.mtime_ns,
                        node.mtime_ns + 1,
                        node.inode,
                        2049,
                    ),
                    content=entry.content,
                    extra=extra,
                )


@pytest.mark.anyio
@pytest.mark.parametrize("fast", [False, True])
async def test_check(golden: Opener, fast: bool) -> None:
    """Nothing is damaged: that a revoked attempt names a pack that is gone is as it should be."""
    async with golden() as repository:
        recorder = Recorder()
        summary = await repository.check(None, CheckOptions(fast=fast), recorder)
        assert summary.clean, recorder.faults
        assert summary.snapshots == 2


@pytest.mark.anyio
async def test_restore(golden: Opener, tmp_path: Path) -> None:
    async with golden() as repository:
        snapshot, recorder = await repository.find_snapshot("latest"), Recorder()
        await repository.restore(snapshot, os.fsencode(tmp_path / "out"), options=RestoreOptions(), progress=recorder)
    compare(tmp_path / "out", tree.SECOND)


def compare(root: Path, nodes: list[Node]) -> None:
    """A restored tree with what it must be, but for attributes, which not every file system keeps."""
    prefix = tree.ROOT + b"/"
    for node in nodes:
        name = node.path.removeprefix(prefix)
        if name == node.path or (stat.S_ISCHR(node.mode) and not IS_ROOT):
            continue
        path = os.fsencode(root) + b"/" + name
        status = os.lstat(path)
        assert stat.S_IFMT(status.st_mode) == stat.S_IFMT(node.mode)
        assert status.st_mtime_ns == node.mtime_ns
        if stat.S_ISLNK(node.mode):
            assert os.readlink(path) == node.target
        if stat.S_ISREG(node.mode):
            assert (status.st_size, status.st_nlink) == (node.size, node.nlink)
            assert Path(os.fsdecode(path)).read_bytes() == whole(node)
        if IS_ROOT:
            assert (status.st_uid, status.st_gid, status.st_mode) == (1000, 100, node.mode) or stat.S_ISLNK(node.mode)


def whole(node: Node) -> bytes:
    """The content of a file, holes included."""
    if not node.extents:
        return node.content
    content, at = bytearray(node.size), 0
    for offset, length in node.extents:
        content[offset : offset + length] = node.content[at : at + length]
        at += length
    return bytes(content)


@pytest.mark.anyio
async def test_a_backup_goes_on_from_there(golden: Opener, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "known").write_bytes(tree.lines(0, 120))
    (source / "abandoned").write_bytes(tree.ABANDONED)
    async with golden() as repository:
        summary = await repository.backup([os.fsencode(source)])
    assert summary.counts.added_bytes < len(tree.ABANDONED) + 3000, "lines that the golden repository has are stored"
    async with golden() as repository:
        assert len((await repository.commits()).snapshots) == 3
        assert (await repository.check()).clean
        await repository.restore(await repository.find_snapshot("latest"), os.fsencode(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        "known": tree.lines(0, 120),
        "abandoned": tree.ABANDONED,
    }


@pytest.mark.anyio
async def test_what_the_open_mark_names_is_absent(golden: Opener) -> None:
    async with golden() as repository:
        await repository.commits()
        marked = await open_marks(
            repository.connector, repository.sealer, await list_objects(repository.connector, TRASH)
        )
        assert len(marked) == 1
        maker = make_repository.Maker(encrypted=repository.config.encrypted)
        assert maker.secrets == repository.secrets
        refs = [pack_ref(maker.id_of(piece), len(piece)) for piece in maker.chunks_of(tree.ABANDONED)]
        known = KnownChunks(repository.mirror, marked=marked)
        assert all(await known.claim(b"".join(refs)))
        unmarked = KnownChunks(repository.mirror, marked=frozenset())
        assert not any(await unmarked.claim(b"".join(refs)))


@pytest.mark.anyio
async def test_check_of_a_path_reads_what_lies_behind_lists(golden: Opener) -> None:
    path = tree.ROOT + b"/very sparse"
    async with golden() as repository:
        snapshot = await repository.find_snapshot("latest")
        fetcher = Fetcher(repository.connector, repository.sealer, repository.mirror, id_key=repository.secrets.id_key)
        catalog = Catalog(snapshot.header.catalog, snapshot.header.depth, fetcher.load)
        entry = await catalog.find(path)
        assert entry is not None
        assert entry.extra is not None
        assert entry.extra.depth == 1
        assert (await repository.check([(snapshot, path)])).clean
        refs = b"".join([piece async for piece in catalog.file_refs(entry)])
        [location] = await repository.mirror.locate([refs[-36:-4]])
        assert location is not None
        name = pack_name(location.pack)
        data = bytearray(await repository.connector.get(name))
        data[location.offset] ^= 1
        await repository.connector.put(name, [data])
        summary = await repository.check([(snapshot, path)])
        assert (summary.damaged_packs, summary.damaged_files) == ([name], 1)
