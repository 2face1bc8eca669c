"""Random runs of the model by a fast scheduler.

    python -m tests.model.campaign RUNS [RULE...]     RULE is one to leave out, such as ADOPT
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from tests.model.rules import Rule
from tests.model.stepping import Fate
from tests.model.world import ROLES, World

if TYPE_CHECKING:
    from collections.abc import Iterable

CALLS_A_RUN = 1500
SPEEDS = (0.01, 0.3, 1, 1)
BURSTS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Mood:
    """What a run is made of: weights of roles, chances per storage call."""

    roles: dict[str, float] = field(
        default_factory=lambda: {"backup": 5, "remove": 2, "maintain": 4, "merge": 2, "restore": 2, "check": 1}
    )
    kill: float = 0.002
    lost_answer: float = 0.01
    pause: float = 0.01
    deliver: float = 0.003


@dataclass
class Tally:
    """What some runs did. `violations`: seed -> what was seen."""

    runs: int = 0
    calls: int = 0
    sweeps: int = 0
    violations: dict[int, str] = field(default_factory=dict)


def run(seed: int, left_out: frozenset[Rule], mood: Mood) -> World:
    """One random run, to the first violation or the last actor."""
    random = Random(seed)
    world = World(random, left_out)
    roles, weights = list(mood.roles), list(mood.roles.values())
    speeds = []
    for _ in range(random.randint(3, 6)):
        world.start(*random.choices(roles, weights))
        speeds.append(random.choice(SPEEDS))
    burst, which = random.choice(BURSTS), None
    while world.actors and not world.violation and world.store.calls < CALLS_A_RUN:
        if which is None or random.random() * burst < 1:
            which = random.choices(range(len(speeds)), speeds)[0]
        actor, fate = world.actors[which], Fate.DONE
        if random.random() < mood.lost_answer:
            fate = random.choice((Fate.NOT_SENT, Fate.UNANSWERED, Fate.LATE))
        if random.random() < mood.kill:
            world.kill(actor)
            alive = False
        else:
            alive = world.step(actor, fate)
        if not alive:
            del speeds[which]
            which = None
            if world.store.calls < CALLS_A_RUN * 0.7:
                world.start(*random.choices(roles, weights))
                speeds.append(random.choice(SPEEDS))
        elif random.random() < mood.pause:
            speeds[which] = random.choice(SPEEDS)
            which = None
        if world.store.late and random.random() < mood.deliver:
            world.deliver()
    world.close()
    return world


def campaign(seeds: Iterable[int], left_out: frozenset[Rule] = frozenset(), mood: Mood | None = None, *, losses: int = 1) -> Tally:
    """Runs, until so many violations are seen."""
    tally = Tally()
    for seed in seeds:
        world = run(seed, left_out, mood or Mood())
        tally.runs += 1
        tally.calls += world.store.calls
        tally.sweeps += world.journal.sweeps
        if world.violation:
            tally.violations[seed] = world.violation
            if len(tally.violations) >= losses:
                break
    return tally


if __name__ == "__main__":
    began = time.perf_counter()
    total = campaign(range(int(sys.argv[1])), frozenset(Rule[name] for name in sys.argv[2:]), losses=10**9)
    print(f"{total.runs} runs, {total.calls} calls, {total.sweeps} sweeps, {len(total.violations)} violations, {time.perf_counter() - began:.1f} s", list(total.violations.items())[:3])
