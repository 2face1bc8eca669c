"""A short campaign of damage: some of everything. `make damage` is the long one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.damage.campaign import KINDS, Campaign

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    made = Campaign(tmp_path_factory.mktemp("damage"), density=1)
    yield made
    print(f"\n{made.tally}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(campaign: Campaign, kind: str) -> None:
    path, *_ = sorted(campaign.of_kind(kind), key=lambda path: -path.stat().st_size)
    seen = set[str]()
    for how, body in campaign.damages(kind, path):
        if how not in seen:  # one of each way
            campaign.one(kind, path, how, body)
        seen.add(how)
    assert {"deleted", "emptied", "cut short", "longer", "foreign", "a bit"} <= seen
