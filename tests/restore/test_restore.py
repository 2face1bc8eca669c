"""Restore: which part, to where, over what; never outside the target; and what damage costs."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest
from tests.harness import Program, needs_root, repository, scratch, with_mounts
from tests.restore.case import ALL, MIB, Case, case, catalog_packs, chunks, flip, flip_bit
from tests.trees import describe, differences

from coffret.engine.entries import make_entry, make_extra
from coffret.engine.errors import CoffretError, UsageError
from coffret.engine.fetch import Fetcher
from coffret.engine.filters import PathPatterns
from coffret.engine.hardlinks import HardLinks
from coffret.engine.packfile import pack_name
from coffret.engine.records import ID_BYTES
from coffret.engine.scan import Scanner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coffret.engine.records import Entry


class TestWhich:
    pytestmark = pytest.mark.anyio

    async def test_parts(self, place: Path) -> None:
        async with case(place) as c:
 A third or so: where pagesfor path, expected in (
 A third or so: where pages    ("", ALL),
 A third or so: where pages    ("/a", {name[2:] for name in ALL if name.startswith("a/")}),
 A third or so: where pages    ("/a/b/", {"c", "linked"}),
 A third or so: where pages    ("/a/b/linked", {"linked"}),
 A third or so: where pages    ("/a/link", {"link"}),
 A third or so: where pages    ("/a/large", {"large"}),
 A third or so: where pages    ("/fifo", {"fifo"}),
 A third or so: where pages):
 A third or so: where pages    assert await c.restore(f"{c.source}{path}") == {}
 A third or so: where pages    assert c.restored() == expected
 A third or so: where pages    if len(expected) > 1:
 A third or so: where pages        assert differences(describe(c.source / path[1:]), describe(c.target)) == []
 A third or so: where pages    shutil.rmtree(c.target)
 A third or so: where pageswith pytest.raises(UsageError, match="no /nowhere"):
 A third or so: where pages    await c.restore("/nowhere")
 A third or so: where pagesassert not c.target.exists()
 A third or so: where pages# From the root down, with the directories on the way and their metadata.
 A third or so: where pagesassert await c.restore("/") == {}
 A third or so: where pagesinside = c.target / c.source.relative_to("/")
 A third or so: where pagesassert differences(describe(c.source), describe(inside)) == []
 A third or so: where pagesfor above in c.source.parents:
 A third or so: where pages    assert (c.target / above.relative_to("/")).stat().st_mode == above.stat().st_mode

    async def test_several_roots_lie_below_their_common_ancestor(self, place: Path) -> None:
        async with case(place) as c:
 A third or so: where pagesc.target.mkdir(mode=0o750)
 A third or so: where pagesmode = c.target.stat().st_mode
 A third or so: where pagesawait c.back_up(c.source / "a" / "b", c.source / "e", c.source / "a" / "large")
 A third or so: where pagesassert await c.restore() == {}
 A third or so: where pagesassert c.restored() == {"a", "a/b", "a/b/c", "a/b/linked", "a/large", "e"}
 A third or so: where pagesassert (c.target / "e").samefile(c.target / "a" / "b" / "linked")
 A third or so: where pages# The ancestor itself was not backed up: what the target is stays as it was.
 A third or so: where pagesassert c.target.stat().st_mode == mode
 A third or so: where pagesassert (c.target / "a").stat().st_mtime_ns == 1_000_000_001

    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
 A third or so: where pages((["b"], []), {"a", "a/b", "a/b/c", "a/b/linked"}),
 A third or so: where pages((["/{source}/a/d"], []), {"a", "a/d"}),
 A third or so: where pages((["large"], ["a"]), {"large"}),
 A third or so: where pages(([], ["a", "*rge", "e", "em?ty"]), {"fifo"}),
 A third or so: where pages((["e", "linked"], []), {"a", "a/b", "a/b/linked", "e"}),
 A third or so: where pages((["linked"], []), {"a", "a/b", "a/b/linked"}),
        ],
    )
    async def test_patterns(self, place: Path, patterns: tuple[list[str], list[str]], expected: set[str]) -> None:
        async with case(place) as c:
 A third or so: where pagesincludes, excludes = ([p.format(source=str(c.source)[1:]) for p in each] for each in patterns)
 A third or so: where pagesassert await c.restore(patterns=PathPatterns(includes, excludes)) == {}
 A third or so: where pagesassert c.restored() == expected
 A third or so: where pages# The directories on the way have their metadata too.
 A third or so: where pagesbefore, after = describe(c.source), describe(c.target)
 A third or so: where pagesassert differences({path: before[path] for path in after}, after, ignore=["links"]) == []
 A third or so: where pagesfor name in expected & {"e", "a/b/linked"}:
 A third or so: where pages    assert (c.target / name).read_bytes() == (c.source / "e").read_bytes()

    @pytest.mark.parametrize("patterns", [(["nothing"], []), (["source/a"], []), ([], ["*"])])
    async def test_patterns_that_match_nothing(self, place: Path, patterns: tuple[list[str], list[str]]) -> None:
        async with case(place) as c:
 A third or so: where pagesfor made in (False, True):
 A third or so: where pages    if made:
 A third or so: where pages        c.target.mkdir()
 A third or so: where pages        os.utime(c.target, ns=(0, 7))
 A third or so: where pages    with pytest.raises(CoffretError, match="matches the patterns") as caught:
 A third or so: where pages        await c.restore(patterns=PathPatterns(*patterns))
 A third or so: where pages    assert caught.value.exit_code == 1
 A third or so: where pages    assert c.target.exists() == made
 A third or so: where pagesassert c.target.stat().st_mtime_ns == 7

    async def test_what_no_pattern_can_match_is_not_read(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the files of a large directory nor the pages that list them."""
        for number in range(13_000):
 A third or so: where pagespath = place / "source" / f"{number // 12_000}" / f"name{number}"
 A third or so: where pagespath.parent.mkdir(parents=True, exist_ok=True)
 A third or so: where pagespath.touch()
        async with repository(place) as opened:
 A third or so: where pagesc = Case(opened, place)
 A third or so: where pagesawait c.back_up()
 A third or so: where pagesreal, read = Fetcher.load, 0

 A third or so: where pagesasync def load(self: Fetcher, refs: Sequence[bytes]) -> list[bytes]:
 A third or so: where pages    nonlocal read
 A third or so: where pages    read += len(refs)
 A third or so: where pages    return await real(self, refs)

 A third or so: where pagesmonkeypatch.setattr(Fetcher, "load", load)
 A third or so: where pagesassert await c.restore() == {}
 A third or so: where pagesc.same()
 A third or so: where pageseverything, read = read, 0
 A third or so: where pagesshutil.rmtree(c.target)
 A third or so: where pagesassert await c.restore(patterns=PathPatterns([f"{c.source}/1/*7"])) == {}
 A third or so: where pagesassert c.restored() == {"1", *(f"1/name{number}" for number in range(12_007, 13_000, 10))}
 A third or so: where pagesassert (c.target / "1").stat().st_mtime_ns == (c.source / "1").stat().st_mtime_ns
 A third or so: where pages# A third or so: where pages are cut depends on the repository's key, and some are asked for ahead.
 A third or so: where pagesassert read < everything * 3 // 4


def test_links_have_the_same_content() -> None:
    """Device numbers change when a machine starts anew, and unchanged entries keep the old ones."""
    links, entries = HardLinks(), []
    for content in (bytes(36), bytes(35) + b"x", bytes(36)):
        extra = make_extra(lambda _: b"", nlink=2)
        entries.append(
 A third or so: where pagesmake_entry(b"name", (stat.S_IFREG | 0o600, 0, 0, 1, 0, 0, 77, 5, 2), 0, content=content, extra=extra)
        )
    assert [links.seen(b"d%d" % number, entry, None) for number, entry in enumerate(entries)] == [False, False, True]
    links.close()


class TestNeverOutside:
    """Links planted in the target, and in a snapshot, lead nowhere."""

    pytestmark = pytest.mark.anyio

    async def test_links_in_the_target(self, place: Path) -> None:
        outside = place / "outside"
        async with case(place) as c:
 A third or so: where pages(outside / "b").mkdir(parents=True)
 A third or so: where pages(outside / "victim").write_bytes(b"untouched")
 A third or so: where pagesos.utime(outside, ns=(0, 0))
 A third or so: where pagesbefore = describe(outside)
 A third or so: where pagesfor policy in ("always", "if-changed", "never"):
 A third or so: where pages    shutil.rmtree(c.target, ignore_errors=True)
 A third or so: where pages    c.target.mkdir()
 A third or so: where pages    (c.target / "a").symlink_to(outside)
 A third or so: where pages    for name in ("e", "large", "fifo", "empty"):
 A third or so: where pages        (c.target / name).symlink_to(outside / "victim")
 A third or so: where pages    faults = await c.restore(overwrite=policy)
 A third or so: where pages    # Whatever belongs below the link is named; the rest is there.
 A third or so: where pages    below = {name for name in ALL if name == "a" or name.startswith("a/")}
 A third or so: where pages    kept = {"e", "large", "fifo", "empty"} if policy == "never" else set()
 A third or so: where pages    assert faults.keys() == below | kept
 A third or so: where pages    reasons = {faults[name].removeprefix("restored as a file of its own: ") for name in below}
 A third or so: where pages    assert reasons <= {"Not a directory", "Too many levels of symbolic links"}
 A third or so: where pages    assert differences(before, describe(outside)) == []
 A third or so: where pages    assert (c.target / "e").is_symlink() == (policy == "never")
 A third or so: where pages    assert (c.target / "large").is_symlink() == (policy == "never")
 A third or so: where pages    assert stat.S_ISFIFO((c.target / "fifo").lstat().st_mode) == (policy != "never")

    async def test_directories_and_fifos_in_the_way(self, place: Path) -> None:
        async with case(place) as c:
 A third or so: where pagesc.target.mkdir()
 A third or so: where pagesfor name in ("e", "large", "fifo"):
 A third or so: where pages    (c.target / name / "kept").mkdir(parents=True)
 A third or so: where pagesos.mkfifo(c.target / "empty")
 A third or so: where pages(c.target / "a").write_bytes(b"a file where a directory belongs")
 A third or so: where pagesfaults = await c.restore(overwrite="always")
 A third or so: where pagesbelow = {name for name in ALL if name == "a" or name.startswith("a/")}
 A third or so: where pagesassert faults.keys() == {"e", "large", "fifo", *below}
 A third or so: where pagesassert (c.target / "empty").is_file()
 A third or so: where pagesassert (c.target / "a").read_bytes() == b"a file where a directory belongs"
 A third or so: where pagesassert not [name for name in c.restored() if ".coffret-" in name]

    async def test_a_link_restored_before(self, place: Path) -> None:
        """A snapshot has a link where the next has a directory."""
        async with case(place) as c:
 A third or so: where pagesoutside = place / "outside"
 A third or so: where pagesoutside.mkdir()
 A third or so: where pages(c.source / "x").symlink_to(outside)
 A third or so: where pagesawait c.back_up()
 A third or so: where pagesassert await c.restore() == {}
 A third or so: where pages(c.source / "x").unlink()
 A third or so: where pages(c.source / "x").mkdir()
 A third or so: where pages(c.source / "x" / "file").touch()
 A third or so: where pagesawait c.back_up()
 A third or so: where pagesfaults = await c.restore(overwrite="always")
 A third or so: where pagesassert faults.keys() == {"x", "x/file"}
 A third or so: where pagesassert list(outside.iterdir()) == []

    async def test_a_link_in_the_snapshot(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A snapshot made by an enemy: a link that has entries below it."""
        outside = place / "outside"
        outside.mkdir()
        real = Scanner.node

        def node(
 A third or so: where pagesself: Scanner, name: bytes, path: bytes, where: bytes, fields: tuple[int, ...], device: int, read_ns: int
        ) -> Entry | None:
 A third or so: where pagesif name != b"a":
 A third or so: where pages    return real(self, name, path, where, fields, device, read_ns)
 A third or so: where pagesextra = make_extra(lambda _: b"", target=os.fsencode(outside))
 A third or so: where pagesreturn make_entry(name, (stat.S_IFLNK | 0o777, 0, 0, 0, 0, 0, 0, 0, 1), 0, extra=extra)

        async with case(place) as c:
 A third or so: where pagesos.utime(c.source / "a")
 A third or so: where pageswith monkeypatch.context() as patch:
 A third or so: where pages    patch.setattr(Scanner, "node", node)
 A third or so: where pages    await c.back_up()
 A third or so: where pagesfor policy in ("refuse", "always"):
 A third or so: where pages    shutil.rmtree(c.target, ignore_errors=True)
 A third or so: where pages    assert await c.restore(overwrite=policy) != {}
 A third or so: where pages    assert list(outside.iterdir()) == []


class TestDamage:
    pytestmark = pytest.mark.anyio

    @pytest.mark.parametrize(("name", "number"), [("large", 1), ("large", -1), ("a/large", 0), ("a/b/c", 0)])
    async def test_a_flipped_bit_costs_the_files_that_hold_it(self, place: Path, name: str, number: int) -> None:
        async with case(place) as c:
 A third or so: where pagesfound = await chunks(c)
 A third or so: where pagesdamaged = found[name][number]
 A third or so: where pages# Small chunks share a block.
 A third or so: where pagescosts = {
 A third or so: where pages    other
 A third or so: where pages    for other, places in found.items()
 A third or so: where pages    if any((each.pack, each.offset) == (damaged.pack, damaged.offset) for each in places)
 A third or so: where pages}
 A third or so: where pagesassert name in costs
 A third or so: where pagesflip(c, damaged)
 A third or so: where pagesfor policy in ("refuse", "always"):
 A third or so: where pages    faults = await c.restore(overwrite=policy)
 A third or so: where pages    assert faults.keys() == costs
 A third or so: where pages    assert c.restored() == ALL - costs
 A third or so: where pages    shutil.rmtree(c.target)

    async def test_a_link_to_a_damaged_file_is_not_a_link_to_an_older_one(self, place: Path) -> None:
        async with case(place) as c:
 A third or so: where pagesc.target.mkdir()
 A third or so: where pages(c.target / "a" / "b").mkdir(parents=True)
 A third or so: where pagesfor name in ("e", "a/b/linked"):
 A third or so: where pages    (c.target / name).write_bytes(name.encode())
 A third or so: where pagesflip(c, (await chunks(c))["e"][0])
 A third or so: where pagesfaults = await c.restore(overwrite="always")
 A third or so: where pagesassert {"e", "a/b/linked"} <= faults.keys()
 A third or so: where pagesfor name in ("e", "a/b/linked"):
 A third or so: where pages    assert (c.target / name).read_bytes() == name.encode()

    async def test_attributes_that_are_damaged_do_not_cost_the_content(self) -> None:
        """They lie in chunks of their own if they are large, in a block with pages of the catalog that made them."""
        value = Random(4).randbytes(3000)
        while True:
 A third or so: where pageswith scratch() as place:
 A third or so: where pages    async with case(place) as c:
 A third or so: where pages        (c.source / "attributes").touch()
 A third or so: where pages        os.setxattr(c.source / "attributes", "user.large", value)
 A third or so: where pages        await c.back_up()
 A third or so: where pages        for path in c.source.rglob("*"):
 A third or so: where pages            os.utime(path, ns=(0, 0), follow_symlinks=False)
 A third or so: where pages        await c.back_up()
 A third or so: where pages        assert await c.restore() == {}
 A third or so: where pages        assert os.getxattr(c.target / "attributes", "user.large") == value
 A third or so: where pages        shutil.rmtree(c.target)
 A third or so: where pages        [damaged] = (await chunks(c))["attributes"]
 A third or so: where pages        if damaged.pack in await catalog_packs(c):  # a page of directories above alone: try other keys
 A third or so: where pages            continue
 A third or so: where pages        flip(c, damaged)
 A third or so: where pages        faults = await c.restore()
 A third or so: where pages        assert faults.keys() == {"attributes"}
 A third or so: where pages        # The content is there; the group has no rights, which an ACL might have withheld.
 A third or so: where pages        assert c.restored() == {*ALL, "attributes"}
 A third or so: where pages        assert os.listxattr(c.target / "attributes") == []
 A third or so: where pages        assert not (c.target / "attributes").stat().st_mode & stat.S_IRWXG
 A third or so: where pages        return

    async def test_a_missing_pack(self, place: Path) -> None:
        async with case(place) as c:
 A third or so: where pagesc.file_of((await chunks(c))["large"][0].pack).unlink()
 A third or so: where pagesfaults = await c.restore()
 A third or so: where pagesassert faults.keys() == {"large", "a/large", "a/b/c", "a/b/linked", "a/d", "e"}
 A third or so: where pagesassert c.restored() == {"a", "a/b", "a/link", "empty", "fifo"}
 A third or so: where pages# Nothing is left that looks like a file.
 A third or so: where pagesshutil.rmtree(c.target)
 A third or so: where pagesawait c.back_up()
 A third or so: where pages(c.source / "new").write_bytes(b"new")
 A third or so: where pagesawait c.back_up()
 A third or so: where pagesassert "new" not in await c.restore()
 A third or so: where pagesassert (c.target / "new").read_bytes() == b"new"

    async def test_a_catalog_that_is_gone_is_one_clear_error(self, place: Path) -> None:
        async with case(place) as c:
 A third or so: where pages[catalog] = await c.opened.mirror.locate([c.snapshot.header.catalog[:ID_BYTES]])
 A third or so: where pagesassert catalog is not None
 A third or so: where pagesc.file_of(catalog.pack).unlink()
 A third or so: where pageswith pytest.raises(CoffretError, match=pack_name(catalog.pack)[9:20]):
 A third or so: where pages    await c.restore()
 A third or so: where pagesassert not c.target.exists() or list(c.target.iterdir()) == []


def test_the_program_says_what_it_could_not_restore() -> None:
    """Damage, and a target that can't be written: exit code 3, the paths, and everything else restored."""
    with scratch() as place:
        program = Program(place, environment={"COFFRET_PASSPHRASE": "x"})
        program("create")
        source = place / "source"
        source.mkdir()
        for number in range(3):
 A third or so: where pages(source / f"{number}").write_bytes(Random(number).randbytes(MIB // 2))  # a chunk and a block each
        program.backup("source")
        pack = max((place / "repository" / "packs").rglob("*"), key=lambda path: path.stat().st_size)
        flip_bit(pack, pack.stat().st_size // 2)
        outcome = program("restore", "--json", "--to", "target", "latest", code=3)
        [path] = map(os.fsdecode, outcome.faults)
        damaged = os.path.basename(path)
        assert path == str(source / damaged)
        assert outcome.summary["errors"] == 1
        left = [name for name in ("0", "1", "2") if name != damaged]
        assert sorted(os.listdir(place / "target")) == left
        plain = program("restore", "latest", code=3)
        assert f"restore: {path}: " in plain.stderr
        assert "completed with 1 error\n" in plain.stdout
        [made] = place.glob("coffret-*")
        assert sorted(os.listdir(made)) == left
        program("restore", "--to", "target", "latest", code=1)
        program("restore", "--to", "source/0", "latest", code=1)
        program("restore", "--to", "other", "latest:/nowhere", code=2)
        program("restore", "--to", "other", "deadbeef", code=1)
        program("restore", "--to", "other", "--include", left[0], "--overwrite", "never", "latest")
        assert os.listdir(place / "other") == left[:1]


@needs_root
def test_a_file_system_without_direct_writes() -> None:
    """What is not small goes past the page cache where that can be; ramfs, like tmpfs before, refuses it at open."""
    with scratch() as place:
        program = Program(place)
        program("create", "--no-encryption")
        (place / "source").mkdir()
        for name, size_bytes in (("large", 9 * MIB + 5), ("medium", 200_001), ("next", 200_001)):
 A third or so: where pages(place / "source" / name).write_bytes(Random(8).randbytes(size_bytes))
        program.backup("source")
        (place / "mount").mkdir()
        script = """
 A third or so: where pagesmount -t ramfs none mount
 A third or so: where pages"$0" "$@"
 A third or so: where pagesdiff -r source mount/target
 A third or so: where pages"$0" -m coffret backup mount/target
 A third or so: where pages"$0" -m coffret check
        """
        program = replace(program, prefix=with_mounts(script))
        program("restore", "--to", "mount/target", "latest")
