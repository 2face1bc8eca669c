"""Commands that die: on a folder at each call, elsewhere at some. `python -m tests.crash` tries all there are."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from tests.crash.deaths import DONE, NOT_DONE
from tests.crash.halves import HALVES
from tests.crash.scenes import SCENES
from tests.fault_harness import ROUNDS, SEED

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crash.campaign import Campaign

# What a death at the put of a snapshot leaves beside what was there before it: files in tmp/, snapshots, uploads.
LEFT = {
    ("local", "cut"): (1, 0, 0), ("local", "unnamed"): (1, 0, 0), ("local", "two names"): (1, 1, 0),
    ("local", "unflushed"): (0, 1, 0), ("sftp", "cut"): (1, 0, 0), ("sftp", "unnamed"): (1, 0, 0),
    ("sftp", "two names"): (1, 1, 0), ("s3", "cut"): (0, 0, 0), ("s3", "unfinished"): (0, 0, 1),
    ("sqlite", "cut"): (0, 0, 0), ("sqlite", "uncommitted"): (0, 0, 0),
}  # fmt: skip
# What a command must have to do, for its points to be worth much.
WORK = {
    "maintenance": {"put trash", "put packs", "put index", "put snapshots", "delete index", "delete packs"},
    "passphrase change": {"put keys", "delete keys"},
    "repair snapshots": {"put packs", "put index", "put snapshots", "put removed"},
}
MANY_CALLS = 8


@pytest.mark.parametrize("kind", HALVES)
def test_each_death_leaves_what_it_says(campaign_on: Callable[[str], Campaign], kind: str) -> None:
    campaign = campaign_on(kind)
    calls = campaign.calls("backup")
    number = next(at for at, call in enumerate(calls) if call.startswith("put snapshots/"))
    for mode in (NOT_DONE, *HALVES[kind], DONE):
        before, after = campaign.die("backup", (number, mode))
        left = tuple(
            sum(name.startswith(folder) for name in after - before) for folder in ("tmp/", "snapshots/", ".sgwtmp/")
        )
        assert left == LEFT.get((kind, mode), (0, mode == DONE, 0)), mode
        assert sum(name.startswith("packs/") for name in after - before) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_a_death_at_each_call(campaign_on: Callable[[str], Campaign], name: str) -> None:
    """Each time in another way, with more rounds in more; of commands with many calls at every second."""
    campaign = campaign_on("local")
    points = campaign.points(name)
    assert {call.partition("/")[0] for call in campaign.calls(name)} >= WORK.get(name, set())
    chance = random.Random(f"{SEED} {name}")
    numbers = range(len(campaign.calls(name)))
    for number in numbers if len(numbers) <= MANY_CALLS else numbers[SEED % 2 :: 2]:
        modes = [mode for at, mode in points if at == number]
        for mode in chance.sample(modes, min(ROUNDS, len(modes))):
            campaign.one(name, (number, mode), briefly=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sftp", "s3", "sqlite"])
def test_deaths_elsewhere(campaign_on: Callable[[str], Campaign], kind: str) -> None:
    """Commands and points by chance, but each way to die."""
    campaign, chance = campaign_on(kind), random.Random(f"{SEED} {kind}")
    for mode in (NOT_DONE, *HALVES[kind], DONE) * ROUNDS:
        name = chance.choice([*SCENES])
        points = [point for point in campaign.points(name) if point[1] == mode]
        if points:
            campaign.one(name, chance.choice(points), briefly=True)
