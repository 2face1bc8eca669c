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
            for path, expected in (
                ("", ALL),
                ("/a", {name[2:] for name in ALL if name.startswith("a/")}),
                ("/a/b/", {"c", "linked"}),
                ("/a/b/linked", {"linked"}),
                ("/a/link", {"link"}),
                ("/a/large", {"large"}),
                ("/fifo", {"fifo"}),
            ):
                assert await c.restore(f"{c.source}{path}") == {}
                assert c.restored() == expected
                if len(expected) > 1:
                    assert differences(describe(c.source / path[1:]), describe(c.target)) == []
                shutil.rmtree(c.target)
            with pytest.raises(UsageError, match="no /nowhere"):
                await c.restore("/nowhere")
            assert not c.target.exists()
            # From the root down, with the directories on the way and their metadata.
            assert await c.restore("/") == {}
            inside = c.target / c.source.relative_to("/")
            assert differences(describe(c.source), describe(inside)) == []
            for above in c.source.parents:
                assert (c.target / above.relative_to("/")).stat().st_mode == above.stat().st_mode

    async def test_several_roots_lie_below_their_common_ancestor(self, place: Path) -> None:
        async with case(place) as c:
            c.target.mkdir(mode=0o750)
            mode = c.target.stat().st_mode
            await c.back_up(c.source / "a" / "b", c.source / "e", c.source / "a" / "large")
            assert await c.restore() == {}
            assert c.restored() == {"a", "a/b", "a/b/c", "a/b/linked", "a/large", "e"}
            assert (c.target / "e").samefile(c.target / "a" / "b" / "linked")
            # The ancestor itself was not backed up: what the target is stays as it was.
            assert c.target.stat().st_mode == mode
            assert (c.target / "a").stat().st_mtime_ns == 1_000_000_001

    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            ((["b"], []), {"a", "a/b", "a/b/c", "a/b/linked"}),
            ((["/{source}/a/d"], []), {"a", "a/d"}),
            ((["large"], ["a"]), {"large"}),
            (([], ["a", "*rge", "e", "em?ty"]), {"fifo"}),
            ((["e", "linked"], []), {"a", "a/b", "a/b/linked", "e"}),
            ((["linked"], []), {"a", "a/b", "a/b/linked"}),
        ],
    )
    async def test_patterns(self, place: Path, patterns: tuple[list[str], list[str]], expected: set[str]) -> None:
        async with case(place) as c:
            includes, excludes = ([p.format(source=str(c.source)[1:]) for p in each] for each in patterns)
            assert await c.restore(patterns=PathPatterns(includes, excludes)) == {}
            assert c.restored() == expected
            # The directories on the way have their metadata too.
            before, after = describe(c.source), describe(c.target)
            assert differences({path: before[path] for path in after}, after, ignore=["links"]) == []
            for name in expected & {"e", "a/b/linked"}:
                assert (c.target / name).read_bytes() == (c.source / "e").read_bytes()

    @pytest.mark.parametrize("patterns", [(["nothing"], []), (["source/a"], []), ([], ["*"])])
    async def test_patterns_that_match_nothing(self, place: Path, patterns: tuple[list[str], list[str]]) -> None:
        async with case(place) as c:
            for made in (False, True):
                if made:
                    c.target.mkdir()
                    os.utime(c.target, ns=(0, 7))
                with pytest.raises(CoffretError, match="matches the patterns") as caught:
                    await c.restore(patterns=PathPatterns(*patterns))
                assert caught.value.exit_code == 1
                assert c.target.exists() == made
            assert c.target.stat().st_mtime_ns == 7

    async def test_what_no_pattern_can_match_is_not_read(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the files of a large directory nor the pages that list them."""
        for number in range(13_000):
            path = place / "source" / f"{number // 12_000}" / f"name{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        async with repository(place) as opened:
            c = Case(opened, place)
            await c.back_up()
            real, read = Fetcher.load, 0

            async def load(self: Fetcher, refs: Sequence[bytes]) -> list[bytes]:
                nonlocal read
                read += len(refs)
                return await real(self, refs)

            monkeypatch.setattr(Fetcher, "load", load)
            assert await c.restore() == {}
            c.same()
            everything, read = read, 0
            shutil.rmtree(c.target)
            assert await c.restore(patterns=PathPatterns([f"{c.source}/1/*7"])) == {}
            assert c.restored() == {"1", *(f"1/name{number}" for number in range(12_007, 13_000, 10))}
            assert (c.target / "1").stat().st_mtime_ns == (c.source / "1").stat().st_mtime_ns
            # A quarter or so: where pages are cut depends on the repository's key, and some are asked for ahead.
            assert read < everything * 3 // 4


def test_links_have_the_same_content() -> None:
    """Device numbers change when a machine starts anew, and unchanged entries keep the old ones."""
    links, entries = HardLinks(), []
    for content in (bytes(36), bytes(35) + b"x", bytes(36)):
        extra = make_extra(lambda _: b"", nlink=2)
        entries.append(
            make_entry(b"name", (stat.S_IFREG | 0o600, 0, 0, 1, 0, 0, 77, 5, 2), 0, content=content, extra=extra)
        )
    assert [links.seen(b"d%d" % number, entry, None) for number, entry in enumerate(entries)] == [False, False, True]
    links.close()


class TestNeverOutside:
    """Links planted in the target, and in a snapshot, lead nowhere."""

    pytestmark = pytest.mark.anyio

    async def test_links_in_the_target(self, place: Path) -> None:
        outside = place / "outside"
        async with case(place) as c:
            (outside / "b").mkdir(parents=True)
            (outside / "victim").write_bytes(b"untouched")
            os.utime(outside, ns=(0, 0))
            before = describe(outside)
            for policy in ("always", "if-changed", "never"):
                shutil.rmtree(c.target, ignore_errors=True)
                c.target.mkdir()
                (c.target / "a").symlink_to(outside)
                for name in ("e", "large", "fifo", "empty"):
                    (c.target / name).symlink_to(outside / "victim")
                faults = await c.restore(overwrite=policy)
                # Whatever belongs below the link is named; the rest is there.
                below = {name for name in ALL if name == "a" or name.startswith("a/")}
                kept = {"e", "large", "fifo", "empty"} if policy == "never" else set()
                assert faults.keys() == below | kept
                reasons = {faults[name].removeprefix("restored as a file of its own: ") for name in below}
                assert reasons <= {"Not a directory", "Too many levels of symbolic links"}
                assert differences(before, describe(outside)) == []
                assert (c.target / "e").is_symlink() == (policy == "never")
                assert (c.target / "large").is_symlink() == (policy == "never")
                assert stat.S_ISFIFO((c.target / "fifo").lstat().st_mode) == (policy != "never")

    async def test_directories_and_fifos_in_the_way(self, place: Path) -> None:
        async with case(place) as c:
            c.target.mkdir()
            for name in ("e", "large", "fifo"):
                (c.target / name / "kept").mkdir(parents=True)
            os.mkfifo(c.target / "empty")
            (c.target / "a").write_bytes(b"a file where a directory belongs")
            faults = await c.restore(overwrite="always")
            below = {name for name in ALL if name == "a" or name.startswith("a/")}
            assert faults.keys() == {"e", "large", "fifo", *below}
            assert (c.target / "empty").is_file()
            assert (c.target / "a").read_bytes() == b"a file where a directory belongs"
            assert not [name for name in c.restored() if ".coffret-" in name]

    async def test_a_link_restored_before(self, place: Path) -> None:
        """A snapshot has a link where the next has a directory."""
        async with case(place) as c:
            outside = place / "outside"
            outside.mkdir()
            (c.source / "x").symlink_to(outside)
            await c.back_up()
            assert await c.restore() == {}
            (c.source / "x").unlink()
            (c.source / "x").mkdir()
            (c.source / "x" / "file").touch()
            await c.back_up()
            faults = await c.restore(overwrite="always")
            assert faults.keys() == {"x", "x/file"}
            assert list(outside.iterdir()) == []

    async def test_a_link_in_the_snapshot(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A snapshot made by an enemy: a link that has entries below it."""
        outside = place / "outside"
        outside.mkdir()
        real = Scanner.node

        def node(
            self: Scanner, name: bytes, path: bytes, where: bytes, fields: tuple[int, ...], device: int, read_ns: int
        ) -> Entry | None:
            if name != b"a":
                return real(self, name, path, where, fields, device, read_ns)
            extra = make_extra(lambda _: b"", target=os.fsencode(outside))
            return make_entry(name, (stat.S_IFLNK | 0o777, 0, 0, 0, 0, 0, 0, 0, 1), 0, extra=extra)

        async with case(place) as c:
            os.utime(c.source / "a")
            with monkeypatch.context() as patch:
                patch.setattr(Scanner, "node", node)
                await c.back_up()
            for policy in ("refuse", "always"):
                shutil.rmtree(c.target, ignore_errors=True)
                assert await c.restore(overwrite=policy) != {}
                assert list(outside.iterdir()) == []


class TestDamage:
    pytestmark = pytest.mark.anyio

    @pytest.mark.parametrize(("name", "number"), [("large", 1), ("large", -1), ("a/large", 0), ("a/b/c", 0)])
    async def test_a_flipped_bit_costs_the_files_that_hold_it(self, place: Path, name: str, number: int) -> None:
        async with case(place) as c:
            found = await chunks(c)
            damaged = found[name][number]
            # Small chunks share a block.
            costs = {
                other
                for other, places in found.items()
                if any((each.pack, each.offset) == (damaged.pack, damaged.offset) for each in places)
            }
            assert name in costs
            flip(c, damaged)
            for policy in ("refuse", "always"):
                faults = await c.restore(overwrite=policy)
                assert faults.keys() == costs
                assert c.restored() == ALL - costs
                shutil.rmtree(c.target)

    async def test_a_link_to_a_damaged_file_is_not_a_link_to_an_older_one(self, place: Path) -> None:
        async with case(place) as c:
            c.target.mkdir()
            (c.target / "a" / "b").mkdir(parents=True)
            for name in ("e", "a/b/linked"):
                (c.target / name).write_bytes(name.encode())
            flip(c, (await chunks(c))["e"][0])
            faults = await c.restore(overwrite="always")
            assert {"e", "a/b/linked"} <= faults.keys()
            for name in ("e", "a/b/linked"):
                assert (c.target / name).read_bytes() == name.encode()

    async def test_attributes_that_are_damaged_do_not_cost_the_content(self) -> None:
        """They lie in chunks of their own if they are large, in a block with pages of the catalog that made them."""
        value = Random(4).randbytes(3000)
        while True:
            with scratch() as place:
                async with case(place) as c:
                    (c.source / "attributes").touch()
                    os.setxattr(c.source / "attributes", "user.large", value)
                    await c.back_up()
                    for path in c.source.rglob("*"):
                        os.utime(path, ns=(0, 0), follow_symlinks=False)
                    await c.back_up()
                    assert await c.restore() == {}
                    assert os.getxattr(c.target / "attributes", "user.large") == value
                    shutil.rmtree(c.target)
                    [damaged] = (await chunks(c))["attributes"]
                    if damaged.pack in await catalog_packs(c):  # a page of directories above alone: try other keys
                        continue
                    flip(c, damaged)
                    faults = await c.restore()
                    assert faults.keys() == {"attributes"}
                    # The content is there; the group has no rights, which an ACL might have withheld.
                    assert c.restored() == {*ALL, "attributes"}
                    assert os.listxattr(c.target / "attributes") == []
                    assert not (c.target / "attributes").stat().st_mode & stat.S_IRWXG
                    return

    async def test_a_missing_pack(self, place: Path) -> None:
        async with case(place) as c:
            c.file_of((await chunks(c))["large"][0].pack).unlink()
            faults = await c.restore()
            assert faults.keys() == {"large", "a/large", "a/b/c", "a/b/linked", "a/d", "e"}
            assert c.restored() == {"a", "a/b", "a/link", "empty", "fifo"}
            # Nothing is left that looks like a file.
            shutil.rmtree(c.target)
            await c.back_up()
            (c.source / "new").write_bytes(b"new")
            await c.back_up()
            assert "new" not in await c.restore()
            assert (c.target / "new").read_bytes() == b"new"

    async def test_a_catalog_that_is_gone_is_one_clear_error(self, place: Path) -> None:
        async with case(place) as c:
            [catalog] = await c.opened.mirror.locate([c.snapshot.header.catalog[:ID_BYTES]])
            assert catalog is not None
            c.file_of(catalog.pack).unlink()
            with pytest.raises(CoffretError, match=pack_name(catalog.pack)[9:20]):
                await c.restore()
            assert not c.target.exists() or list(c.target.iterdir()) == []


def test_the_program_says_what_it_could_not_restore() -> None:
    """Damage, and a target that can't be written: exit code 3, the paths, and everything else restored."""
    with scratch() as place:
        program = Program(place, environment={"COFFRET_PASSPHRASE": "x"})
        program("create")
        source = place / "source"
        source.mkdir()
        for number in range(3):
            (source / f"{number}").write_bytes(Random(number).randbytes(MIB // 2))  # a chunk and a block each
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
            (place / "source" / name).write_bytes(Random(8).randbytes(size_bytes))
        program.backup("source")
        (place / "mount").mkdir()
        script = """
            mount -t ramfs none mount
            "$0" "$@"
            diff -r source mount/target
            "$0" -m coffret backup mount/target
            "$0" -m coffret check
        """
        program = replace(program, prefix=with_mounts(script))
        program("restore", "--to", "mount/target", "latest")
