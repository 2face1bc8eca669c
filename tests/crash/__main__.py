"""The whole campaign: `PYTHONPATH=.pkg:. python -m tests.crash [SECONDS [STORAGE|power]...]`.

Every command on every storage, or on those named, dies at each of its calls in each way there is; and `power`: power is
lost at each moment of every command on a folder: first with nothing left but what was fsynced, then in other ways. They
share the time, and go in random order, so that a short campaign tries some of everything. Prints what was tried.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tests.crash.campaign import Campaign
from tests.crash.deaths import DONE
from tests.crash.losses import losses, losses_after_deaths
from tests.crash.places import PLACES
from tests.crash.runner import Runner
from tests.crash.scenes import SCENES
from tests.fault_harness import SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.crash.losses import Loss

    # What is tried, in words.
    Try = tuple[str, Callable[[], None]]

T = TypeVar("T")
POWER = "power"


def main() -> None:
    """Run until all is tried, the time is over, or something is not survived."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3600.0
    whats = sys.argv[2:] or [*PLACES, POWER]
    for what in whats:
        with Runner() as runner, tempfile.TemporaryDirectory(prefix="coffret-crash-") as folder:
            campaign = Campaign(runner, Path(folder), "local" if what == POWER else what)
            parts = _losses(campaign, Path(folder)) if what == POWER else [_deaths(campaign)]
            end = time.monotonic() + seconds / len(whats)
            try:
                for number, part in enumerate(parts):
                    now = time.monotonic()  # what one leaves of its share is for those after it
                    _try(part, now + (end - now) / (len(parts) - number))
            finally:
                print(told(what, campaign.tally), flush=True)


def _try(part: Iterable[Try], end: float) -> None:
    for number, (what, attempt) in enumerate(part):
        if number and time.monotonic() > end:
            print(f"left out, for want of time: {what}, and more")
            return
        try:
            attempt()
        except BaseException:
            print(what, flush=True)
            raise


def _deaths(campaign: Campaign) -> Iterator[Try]:
    every = [(name, point) for name in SCENES for point in campaign.points(name)]
    for command, at in _shuffled(every):
        yield f"{command} {at}", partial(campaign.one, command, at)


def _losses(campaign: Campaign, folder: Path) -> list[Iterator[Try]]:
    def during(name: str) -> Iterator[Loss]:
        yield from _by_turns(losses(campaign, name, folder / "log", f"{SEED}"))

    def after_deaths(name: str) -> Iterator[Loss]:
        points = [point for point in campaign.points(name) if point[1] != DONE]
        yield from losses_after_deaths(campaign, name, folder / "log", _shuffled(points))

    def tries(name: str, found: Iterator[Loss]) -> Iterator[Try]:
        for number, tree, reported in found:
            yield f"{name} {number}", partial(campaign.after_loss, name, number, tree, reported)

    # Those with the most moments last.
    return [tries(name, find(name)) for find in (after_deaths, during) for name in reversed(SCENES)]


def _by_turns(found: Iterable[Loss]) -> list[Loss]:
    """The first state of each moment, the poorest, then the second of each."""
    turns = Counter[int]()
    ranked: list[tuple[int, Loss]] = []
    for loss in found:
        ranked.append((turns[loss[0]], loss))
        turns[loss[0]] += 1
    return [loss for _, loss in sorted(_shuffled(ranked), key=itemgetter(0))]


def _shuffled(found: list[T]) -> list[T]:
    return random.Random(SEED).sample(found, len(found))


def told(what: str, tally: Counter[tuple[str, str]]) -> str:
    """How much was tried, by command and by way."""
    lines = [f"{what}: {tally.total():,} tried"]
    for part, by in enumerate(("by command", "by way")):
        counts = Counter[str]()
        for key, count in tally.items():
            counts[key[part]] += count
        lines.append(f"  {by}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
