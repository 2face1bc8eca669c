"""Power losses during every command, on a folder: what may be left at each moment, and whether all is well then.

The user's machine loses power with the storage: cache and state are on the same disk, and are as old, or as new, as it
likes. What SQLite keeps in the cache is as old as it was before the command.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tests.crash.power import extremes, read_events

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.crash.campaign import Campaign, Point
    from tests.crash.power import Disk, Event, Tree

    # At which event, what is left, and the snapshots there were when the command had ended (None if it had not).
    Loss = tuple[int, Tree, list[str] | None]

# Beside the extremes, of each moment.
_RANDOM_STATES = 3


def losses(campaign: Campaign, name: str, log: Path, seed: str) -> Iterator[Loss]:
    """All that a power loss may leave of a command, at any moment, each state once; of random ones some."""
    disk = campaign.set_up(name)
    log.unlink(missing_ok=True)
    campaign.record(name, log)
    listed, events = campaign.listed_after(name), read_events(log)
    chance, seen = random.Random(seed), set[int]()
    for number, tree in _states(disk, events, str(campaign.place.folder), chance):
        key = hash((tuple(tree.items()), number == len(events)))
        if key not in seen:
            seen.add(key)
            yield number, tree, listed if number == len(events) else None


def losses_after_deaths(campaign: Campaign, name: str, log: Path, points: Sequence[Point]) -> Iterator[Loss]:
    """A command died at a point, and was repeated: what a power loss leaves then has all that was reported."""
    for point in points:
        disk = campaign.set_up(name)
        log.unlink(missing_ok=True)
        campaign.record(name, log, point)
        campaign.record(name, log)
        listed = campaign.listed_after(name)
        for _ in disk.happen(read_events(log)):
            pass
        least, _, _, machine_only = extremes(str(campaign.place.folder))
        for pick in (least, machine_only):
            yield point[0], disk.lose_power(pick, None), listed


def _states(disk: Disk, events: list[Event], repository: str, chance: random.Random) -> Iterator[tuple[int, Tree]]:
    for number, _ in enumerate(disk.happen(events), 1):
        for pick in extremes(repository):
            yield number, disk.lose_power(pick, None)
        for _ in range(_RANDOM_STATES):
            yield number, disk.lose_power(lambda _, count: chance.randrange(count), chance)
