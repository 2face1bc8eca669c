"""The protocol as a hypothesis state machine: actors start, step, stop, lose answers and die in any order."""

from __future__ import annotations

import os
from random import Random
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.model.rules import Rule
from tests.model.scheduler import LOST
from tests.model.world import ROLES, Actor, World

if TYPE_CHECKING:
    from tests.model.stepping import Fate

SCALE = int(os.environ.get("COFFRET_MODEL_SCALE", "1"))
EXAMPLES = 250
STOPS = ("put leases/", "put index/", "put snapshots/", "delete index/", "get packs/", "to the end")
seeds = st.integers(0, 2**32 - 1)


class Repository(RuleBasedStateMachine):
    """A repository and its actors; whoever is not stepped is paused."""

    left_out: frozenset[Rule] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.world = World(Random(0), self.left_out)

    @property
    def actors(self) -> list[Actor]:
        return self.world.actors

    @initialize(seed=seeds)
    def begin(self, seed: int) -> None:
        self.world = World(Random(seed), self.left_out)

    @precondition(lambda self: len(self.actors) < 6)
    @rule(role=st.sampled_from(sorted(ROLES)), seed=seeds)
    def start(self, role: str, seed: int) -> None:
        self.world.start(role, Random(seed))

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 5), calls=st.integers(1, 60))
    def step(self, which: int, calls: int) -> None:
        actor = self.actors[which % len(self.actors)]
        while calls and not self.world.violation and self.world.step(actor):
            calls -= 1

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 5), call=st.sampled_from(STOPS))
    def step_until(self, which: int, call: str) -> None:
        """Step to the next call of a kind, or to the end."""
        actor = self.actors[which % len(self.actors)]
        while not str(actor.pending).startswith(call) and not self.world.violation and self.world.step(actor):
            pass

    @precondition(lambda self: any(actor.pending.method == "put" for actor in self.actors))
    @rule(which=st.integers(0, 5), fate=st.sampled_from(LOST))
    def lose_answer(self, which: int, fate: Fate) -> None:
        putting = [actor for actor in self.actors if actor.pending.method == "put"]
        self.world.step(putting[which % len(putting)], fate)

    @precondition(lambda self: self.world.store.late)
    @rule()
    def deliver(self) -> None:
        self.world.deliver()

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 5))
    def kill(self, which: int) -> None:
        self.world.kill(self.actors[which % len(self.actors)])

    @invariant()
    def nothing_is_lost(self) -> None:
        assert not self.world.violation

    def teardown(self) -> None:
        """Let all that are left come to their end, one after the other."""
        try:
            while self.actors and not self.world.violation:
                self.world.step(self.actors[0])
            assert not self.world.violation
        finally:
            self.world.close()


TestRepository = Repository.TestCase
TestRepository.settings = settings(
    max_examples=EXAMPLES * SCALE,
    stateful_step_count=50,
    deadline=None,
    database=None,
    derandomize=SCALE == 1,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("without", [Rule.COPY, Rule.WAIT, Rule.ADOPT], ids=lambda rule: rule.name.lower())
def test_the_machine_finds_what_a_rule_is_for(without: Rule) -> None:
    """The positive control: with one of the rules left out it does come to a loss."""

    class Without(Repository):
        left_out = frozenset([without])

    found = settings(TestRepository.settings, max_examples=20 * EXAMPLES, derandomize=True, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Without, settings=found)
