"""Random runs of the model by a fast scheduler.

    python -m tests.model.campaign RUNS [RULE...]     RULE is one to leave out, such as ADOPT

Every actor has a priority, and the highest that is alive makes the next call, until at a few random moments it falls
to the lowest or dies: few switches, each at any call, find what a fair coin a call hardly ever does. (Burckhardt et
al., "A randomized scheduler with probabilistic guarantees of finding bugs", ASPLOS 2010.) One run in four is fair.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from tests.model.rules import Rule
from tests.model.stepping import Fate
from tests.model.world import World

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LOST = (Fate.NOT_SENT, Fate.UNANSWERED, Fate.LATE)


@dataclass(frozen=True)
class Mood:
    """What a run is made of: weights of roles, how many actors, chances."""

    roles: Mapping[str, float] = field(
        default_factory=lambda: {"backup": 5, "remove": 2, "maintain": 4, "merge": 2, "restore": 2, "check": 1}
    )
    cast: tuple[str, ...] = ()
    actors: tuple[int, int] = (4, 9)
    switches: tuple[int, int] = (1, 5)
    kill: float = 0.15
    lost_answer: float = 0.01
    deliver: float = 0.003
    fair: float = 0.25


@dataclass
class Tally:
    """What some runs did. `violations`: seed -> what was seen."""

    runs: int = 0
    calls: int = 0
    sweeps: int = 0
    violations: dict[int, str] = field(default_factory=dict)


def run(seed: int, left_out: frozenset[Rule], mood: Mood) -> World:
    """One random run, to the first violation or the last actor's end."""
    random = Random(seed)
    world = World(random, left_out)
    cast = reversed(mood.cast) if mood.cast else random.choices(list(mood.roles), list(mood.roles.values()), k=random.randint(*mood.actors))
    for role in cast:
        world.start(role)
    waiting = world.actors  # the last has the highest priority
    span = random.choice((30, 100, 300)) 
    switches = {random.randrange(span) for _ in range(random.randint(*mood.switches))}
    fair = random.random() < mood.fair
    step = 0
    while waiting and not world.violation:
        if fair and random.random() < 0.5:
            waiting.append(waiting.pop(random.randrange(len(waiting))))
        actor = waiting[-1]
        if step in switches:
            if random.random() < mood.kill:
                world.kill(actor)
            else:
                waiting.insert(0, waiting.pop())
        else:
            world.step(actor, random.choice(LOST) if random.random() < mood.lost_answer else Fate.DONE)
        if world.store.late and random.random() < mood.deliver:
            world.deliver()
        step += 1
    world.close()
    return world


def campaign(
    seeds: Iterable[int], left_out: frozenset[Rule] = frozenset(), mood: Mood | None = None, *, losses: int = 1
) -> Tally:
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
