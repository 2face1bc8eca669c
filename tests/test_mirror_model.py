"""The index mirror against a model: two processes' mirrors in one folder, whatever is listed, ended, marked or lost."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.mirror_samples import REPOSITORY, chunk, expected, files, index, name, small_runs, table

from coffret.engine.mirror import Mirror, attempt_of

if TYPE_CHECKING:
    from coffret.engine.mirror import Location
    from coffret.engine.records import IndexObject

CHUNKS, PACKS, ATTEMPTS, OWN = 40, 6, 6, 100
which = st.integers(0, 1)
packs = st.dictionaries(
    st.integers(0, PACKS - 1).map("pack {}".format), st.lists(st.integers(0, CHUNKS - 1), max_size=9), max_size=3
)


class Process:
    """A mirror and what it must go by."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.settled: set[str] = set()
        #: Whether others have removed or damaged something since this one listed, or it has not listed.
        self.overtaken = True
        #: Whether its answers are to be complete, not only true.
        self.complete = True


class MirrorMachine(RuleBasedStateMachine):
    """Publish, end, drop, list, merge, damage and reopen in any order; look up at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.stack.enter_context(small_runs())
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.run = self.stack.enter_context(asyncio.Runner()).run
        self.listed: dict[str, IndexObject] = {}
        self.ever: dict[str, IndexObject] = {}
        self.settled: set[str] = {attempt_of(name(OWN + n)) for n in (0, 1)}
        self.revoked: set[str] = set()

    @initialize()
    def start(self) -> None:
        self.processes = [Process(self.run(Mirror.open(self.folder, REPOSITORY))) for _ in (0, 1)]

    def teardown(self) -> None:
        self.stack.close()

    def put(self, attempt: int, content: dict[str, list[int]]) -> tuple[str, IndexObject]:
        held = name(attempt, len(self.ever))
        self.listed[held] = self.ever[held] = index(content)
        return held, self.ever[held]

    def overtake(self, but: int | None = None) -> None:
        for number, process in enumerate(self.processes):
            process.overtaken |= number != but

    @rule(attempt=st.integers(0, ATTEMPTS - 1), content=packs)
    def publish(self, attempt: int, content: dict[str, list[int]]) -> None:
        self.put(attempt, content)

    @rule(attempt=st.integers(0, ATTEMPTS - 1).map(name).map(attempt_of), well=st.booleans())
    def end(self, attempt: str, well: bool) -> None:
        if attempt not in self.settled | self.revoked:
            (self.settled if well else self.revoked).add(attempt)

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.listed[data.draw(st.sampled_from(sorted(self.listed)))]

    @rule(number=which)
    def refresh(self, number: int) -> None:
        process = self.processes[number]
        before = {path.name for path in files(self.folder, "*.run")}
        process.settled = set(self.settled)

        async def bring_up_to_date() -> None:
            wanted = await process.mirror.reconcile(
                list(self.listed), settled=frozenset(self.settled), revoked=frozenset(self.revoked)
            )
            await process.mirror.merge([(held, self.listed[held]) for held in wanted])

        self.run(bring_up_to_date())
        assert set(process.mirror.objects) == {held for held in self.listed if attempt_of(held) not in self.revoked}
        process.overtaken, process.complete = False, True
        if before - {path.name for path in files(self.folder, "*.run")}:
            self.overtake(but=number)

    @rule(number=which, content=packs)
    def merge_own(self, number: int, content: dict[str, list[int]]) -> None:
        process = self.processes[number]
        held, made = self.put(OWN + number, content)
        self.run(process.mirror.merge([(held, made)]))
        process.settled.add(attempt_of(held)) if process.complete and not process.overtaken else None
        process.complete &= not process.overtaken
        assert held in process.mirror.objects

    @rule(number=which)
    def reopen(self, number: int) -> None:
        self.run(self.processes[number].mirror.close())
        self.processes[number] = Process(self.run(Mirror.open(self.folder, REPOSITORY)))

    @rule(which_file=st.integers(0, 5), kept=st.floats(0, 1), removed=st.booleans())
    def damage(self, which_file: int, kept: float, removed: bool) -> None:
        found = sorted(
            (path for path in files(self.folder) if path.name != "lock"), key=lambda path: path.stat().st_size
        )
        if found:
            path = found[which_file % len(found)]
            whole = path.read_bytes()
            path.unlink()  # others have it mapped: a file under a map must not become shorter
            if not removed:
                path.write_bytes(whole[: int(len(whole) * kept)])
            self.overtake()

    @rule(number=which, marked=st.sets(st.integers(0, PACKS - 1).map("pack {}".format), max_size=3))
    def look_up(self, number: int, marked: set[str]) -> None:
        process = self.processes[number]
        avoid = frozenset(table(pack, []).pack for pack in marked)
        ids = [chunk(n) for n in range(CHUNKS)]
        sifted = self.run(process.mirror.sift(ids, marked=avoid))
        located = self.run(process.mirror.locate(ids, avoid=avoid))
        seen = {held: self.ever[held] for held in process.mirror.objects}
        anywhere = expected(seen)
        sure = expected({held: made for held, made in seen.items() if attempt_of(held) in process.settled})
        absent, adopt = set(sifted.absent), dict(sifted.adopt)
        for position, chunk_id in enumerate(ids):
            usable = {found for found in anywhere.get(chunk_id, set()) if found.pack not in avoid}
            reliable = {found for found in sure.get(chunk_id, set()) if found.pack not in avoid}
            self.check_sifted(position in absent, adopt.get(position), usable, reliable, process.complete)
            self.check_located(located[position], anywhere.get(chunk_id, set()), usable, reliable, process.complete)

    @staticmethod
    def check_sifted(
        absent: bool, adopt: Location | None, usable: set[Location], reliable: set[Location], complete: bool
    ) -> None:
        if absent:
            assert not (usable and complete)
        elif adopt:
            assert adopt in usable
            assert not (reliable and complete)
        else:
            assert reliable

    @staticmethod
    def check_located(
        found: Location | None, anywhere: set[Location], usable: set[Location], reliable: set[Location], complete: bool
    ) -> None:
        assert found in anywhere if found else not (anywhere and complete)
        if complete:
            assert found in (reliable or usable or anywhere) if found else True


TestMirrorMachine = MirrorMachine.TestCase
TestMirrorMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
