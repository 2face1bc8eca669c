"""Restore into a directory that holds something: what is refused, replaced, kept."""

from __future__ import annotations

import os
import shutil
import stat
from typing import TYPE_CHECKING

import pytest
from tests.restore.case import ALL, Case, case
from tests.trees import describe, differences

from coffret.engine.errors import TargetError
from coffret.engine.filters import PathPatterns

if TYPE_CHECKING:
    from pathlib import Path


class TestOverwrite:
    pytestmark = pytest.mark.anyio

    async def prepare(self, c: Case) -> None:
        """A target with an older state: files that differ, are missing, are another kind, or are only there."""
        assert await c.restore() == {}
        for name in ("a/d", "large"):
            (c.target / name).write_bytes(b"older")
        os.utime(c.target / "a" / "large", ns=(0, 0))
        (c.target / "e").unlink()
        (c.target / "empty").unlink()
        (c.target / "empty").symlink_to("fifo")
        (c.target / "fifo").unlink()
        (c.target / "fifo").write_bytes(b"no fifo")
        (c.target / "own").write_bytes(b"kept")

    async def test_refuse(self, place: Path) -> None:
        async with case(place) as c:
            await self.prepare(c)
            before = describe(c.target)
            with pytest.raises(TargetError, match="is there already"):
                await c.restore()
            assert differences(before, describe(c.target)) == []

    @pytest.mark.parametrize("policy", ["always", "if-changed"])
    async def test_replace(self, place: Path, policy: str) -> None:
        async with case(place) as c:
            await self.prepare(c)
            inode = (c.target / "a" / "b" / "c").stat().st_ino
            assert await c.restore(overwrite=policy) == {}
            assert (c.target / "own").read_bytes() == b"kept"
            (c.target / "own").unlink()
            os.utime(c.target, ns=(0, c.source.stat().st_mtime_ns))
            c.same()
            # What looks the same was not touched.
            assert ((c.target / "a" / "b" / "c").stat().st_ino == inode) == (policy == "if-changed")

    async def test_never(self, place: Path) -> None:
        async with case(place) as c:
            await self.prepare(c)
            assert (await c.restore(overwrite="never")).keys() == {"empty", "fifo"}  # they are of another type
            for name in ("a/d", "large"):
                assert (c.target / name).stat().st_size == len(b"older")
            assert (c.target / "fifo").read_bytes() == b"no fifo"
            assert (c.target / "e").read_bytes() == (c.source / "e").read_bytes()
            assert (c.target / "empty").is_symlink()

    async def test_a_file_that_others_have_open_keeps_its_content(self, place: Path) -> None:
        """A file is replaced whole, under its name; it is never seen half written."""
        async with case(place) as c:
            await self.prepare(c)
            with (c.target / "a" / "d").open("rb") as small, (c.target / "large").open("rb") as large:
                assert await c.restore(overwrite="always") == {}
                assert small.read(10) == large.read(10) == b"older"

    async def test_never_touches_nothing_that_is_there(self, place: Path) -> None:
        async with case(place) as c:
            (c.target / "a").mkdir(parents=True)
            for path in (c.target / "a", c.target):
                path.chmod(0o711)
                os.utime(path, ns=(0, 7))
            await c.restore(overwrite="never")
            for path in (c.target / "a", c.target):
                assert stat.S_IMODE(path.stat().st_mode) == 0o711
            assert (c.target / "a" / "b").stat().st_mtime_ns == (c.source / "a" / "b").stat().st_mtime_ns
            assert c.progress.notes == []
            assert await c.restore(overwrite="never") == {}
            assert c.progress.notes == ["entries kept as they are, since they were there already: 9"]

    async def test_if_changed_compares_links_and_sets_metadata(self, place: Path) -> None:
        async with case(place) as c:
            assert await c.restore() == {}
            link, file = c.target / "a" / "link", c.target / "a" / "d"
            mtime_ns = link.lstat().st_mtime_ns
            link.unlink()
            link.symlink_to("x")
            os.utime(link, ns=(0, mtime_ns), follow_symlinks=False)
            file.chmod(0o777)
            os.setxattr(file, "user.own", b"not in the snapshot")
            inode = file.stat().st_ino
            before = (c.target / "a" / "b" / "c").stat().st_ctime_ns
            assert await c.restore(overwrite="if-changed") == {}
            c.same()
            assert file.stat().st_ino == inode
            assert (c.target / "a" / "b" / "c").stat().st_ctime_ns == before

    async def test_a_target_that_holds_other_things(self, place: Path) -> None:
        async with case(place) as c:
            (c.target / "lost+found").mkdir(parents=True)
            assert await c.restore() == {}
            assert c.target.stat().st_mtime_ns == c.source.stat().st_mtime_ns
            shutil.rmtree(c.target)
            c.target.mkdir(mode=0o711)
            (c.target / "own").touch()
            mode = c.target.stat().st_mode
            assert await c.restore() == {}
            assert c.restored() == {*ALL, "own"}
            assert c.target.stat().st_mode == mode
            with pytest.raises(TargetError, match="target/a is there already"):
                await c.restore()
            with pytest.raises(TargetError, match="target/d is there already"):
                (c.target / "d").touch()
                await c.restore(f"{c.source}/a/d")
            shutil.rmtree(c.target / "a")
            assert await c.restore(patterns=PathPatterns(["a"])) == {}
