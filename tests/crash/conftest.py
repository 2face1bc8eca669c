"""The process that runs commands, and what they are tried on: made once for all tests here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.crash.campaign import Campaign
from tests.crash.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def campaign_on(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Campaign]:
    """The campaign on a kind of storage."""
    made: dict[str, Campaign] = {}

    def find(kind: str) -> Campaign:
        if kind not in made:
            made[kind] = Campaign(runner, tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return find
