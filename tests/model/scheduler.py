"""A fast random scheduler, and what it plays: any cast by chance, or a told story.

Every actor has a priority, and the highest that is alive makes the next call, until at a few random moments it falls
to the lowest or dies: few switches, each at any call, find what a fair coin a call hardly ever does. (Burckhardt et
al., "A randomized scheduler with probabilistic guarantees of finding bugs", ASPLOS 2010.) Some runs toss that coin.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from tests.model.stepping import Fate
from tests.model.world import World

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tests.model.rules import Rule
    from tests.model.world import Actor

LOST = (Fate.NOT_SENT, Fate.UNANSWERED, Fate.LATE)
ROLES: Mapping[str, float] = {"backup": 5, "remove": 2, "maintain": 4, "merge": 2, "restore": 2, "check": 1}


@dataclass(frozen=True)
class Play:
    """What a run is made of.

    `story`: the actors in order of their priority, each a role and the calls before which it falls to the lowest, one
    after the other ("backup until put snapshots/ until put snapshots/"); without one they are cast by chance, and
    switched and killed anywhere. `lost`: how often the answer of a put is, among those that start with `losing`, and
    `fates` what becomes of such a put; `deliver`: how often, a call, a late request arrives.
    """

    story: tuple[str, ...] = ()
    lost: float = 0.01
    losing: str = "put "
    fates: tuple[Fate, ...] = LOST
    deliver: float = 0.003


@dataclass
class Tally:
    """What some runs did. `violations`: seed -> what was seen."""

    runs: int = 0
    calls: int = 0
    sweeps: int = 0
    violations: dict[int, str] = field(default_factory=dict)


class Scheduler:
    """One random run."""

    def __init__(self, seed: int, left_out: frozenset[Rule], play: Play) -> None:
        self.random = random = Random(seed)
        self.world = World(random, left_out)
        self.play = play
        self.order: list[Actor] = []  # the last has the highest priority
        self.until: dict[Actor, list[str]] = {}
        self.switches: set[int] = set()
        self.fair = False
        cast = play.story
        if not cast:
            self.fair = random.random() < 0.3
            cast = tuple(random.choices(list(ROLES), list(ROLES.values()), k=random.randint(3, 12)))
            span = random.choice((40, 120, 360))  # a short run makes some 40 calls, an actor of maintenance 50
            self.switches = {random.randrange(span) for _ in range(random.randint(1, 6))}
        for part in reversed(cast):
            role, *until = part.split(" until ")
            actor = self.world.start(role)
            self.order.append(actor)
            self.until[actor] = until

    def run(self) -> World:
        """Step until the first violation, or until all actors have ended."""
        step, random, world = 0, self.random, self.world
        while self.order and not world.violation:
            if self.fair and random.random() < 0.5:
                self.order.append(self.order.pop(random.randrange(len(self.order))))
            actor, step = self.order[-1], step + 1
            if step in self.switches and random.random() < 0.2:
                world.kill(self.order.pop())
            elif step in self.switches or self._is_awaited(actor):
                self.order.insert(0, self.order.pop())
            elif not world.step(actor, self._fate(str(actor.pending))):
                self.order.remove(actor)
            if world.store.late and self._chance(self.play.deliver):
                world.deliver()
        world.close()
        return world

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _fate(self, call: str) -> Fate:
        if call.startswith(self.play.losing) and self._chance(self.play.lost):
            return self.random.choice(self.play.fates)
        return Fate.DONE

    def _is_awaited(self, actor: Actor) -> bool:
        """Whether the actor has come to the call before which the story lets others go on."""
        if (until := self.until[actor]) and str(actor.pending).startswith(until[0]):
            del until[0]
            return True
        return False


def campaign(
    seeds: Iterable[int], left_out: frozenset[Rule] = frozenset(), play: Play | None = None, *, losses: int = 1
) -> Tally:
    """One run a seed, until so many have ended in a violation."""
    tally = Tally()
    for seed in seeds:
        world = Scheduler(seed, left_out, play or Play()).run()
        tally.runs += 1
        tally.calls += world.store.calls
        tally.sweeps += world.journal.sweeps
        if world.violation:
            tally.violations[seed] = world.violation
            if len(tally.violations) >= losses:
                break
    return tally
