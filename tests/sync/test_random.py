"""Random backups, syncs and interruptions: at the end each side has what was asked of it, whole."""

from __future__ import annotations

import random  # noqa: TC003 - hypothesis reads annotations
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fault_harness import ROUNDS, make_source
from tests.harness import scratch
from tests.sync.sides import Side, is_whole, sync

from coffret.connectors.errors import StorageFull
from coffret.connectors.faults import FaultyConnector
from coffret.engine.errors import OutOfSpace, reported
from coffret.engine.selection import Selection

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
STEPS = st.lists(st.tuples(st.sampled_from(["backup", "sync", "interrupted", "some"]), st.booleans()), max_size=7)


@settings(max_examples=10 * ROUNDS, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, cached=st.booleans(), alike=st.booleans(), encrypted=st.booleans(), seed=st.randoms())
async def test_the_union_of_what_was_asked(
    steps: list[tuple[str, bool]], cached: bool, alike: bool, encrypted: bool, seed: random.Random
) -> None:
    with scratch() as folder:
        a = Side.made(folder / "cache" if cached else None)
        b = Side.made(folder / "cache" if cached else None, like=a if alike else None, encrypted=encrypted)
        play = _Play(folder, [a, b])
        for what, reverse in [("backup", False), *steps]:
            await play.step(what, 1 if reverse else 0, seed.randrange(30))
        for side, ids in zip(play.sides, play.expected, strict=True):
            assert await side.ids() == ids
            assert await is_whole(side)


class _Play:
    """Two repositories, a directory that changes, and which snapshots each repository must have."""

    def __init__(self, folder: Path, sides: list[Side]) -> None:
        self.sides, self.expected = sides, [set[str](), set[str]()]
        self._tree, self._count = make_source(folder / "tree", files=6, large_bytes=2 << 20), 0

    async def step(self, what: str, number: int, at: int) -> None:
        """One thing that happens to a side, or from it to the other; `at` says where, or with which snapshot."""
        side, other = self.sides[number], self.sides[1 - number]
        mine, theirs = self.expected[number], self.expected[1 - number]
        if what == "backup":
            self._count += 1
            (self._tree / "changing").write_bytes(b"%d" % self._count * 1000)
            mine.add(await side.backup(self._tree))
        elif what == "interrupted":
            failing = FaultyConnector(other.memory, fail_before={at: StorageFull("full")})
            try:
                await sync(await side.open(), await other.open(failing))
            except Exception as error:
                assert isinstance(reported(error), OutOfSpace)
            found = await other.ids()
            assert theirs <= found <= theirs | mine
            theirs |= found
        elif what == "some" and mine:
            chosen = sorted(mine)[at % len(mine)]
            await sync(await side.open(), await other.open(), Selection(named=[chosen]))
            theirs.add(chosen)
        else:
            await sync(await side.open(), await other.open())
            theirs |= mine
