"""The protocol loses nothing; it loses something when any one of its rules is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.model.rules import Rule
from tests.model.scheduler import campaign
from tests.model.stories import STORIES

SCALE = int(os.environ.get("COFFRET_MODEL_SCALE", "1"))  # times the usual number of runs, for a long campaign
CAMPAIGN_RUNS = 1_000
STORY_RUNS = 600  # the least likely story takes some fifty runs to come true


def test_nothing_is_lost_in_random_runs() -> None:
    tally = campaign(range(CAMPAIGN_RUNS * SCALE))
    assert not tally.violations
    assert tally.sweeps > tally.runs / 2  # they did reach what they are about


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name.lower())
def test_a_violation_is_found_without_the_rule(rule: Rule) -> None:
    assert campaign(range(STORY_RUNS), frozenset([rule]), STORIES[rule]).violations


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name.lower())
def test_the_story_of_the_rule_ends_well_with_it(rule: Rule) -> None:
    assert not campaign(range(30 * SCALE), play=STORIES[rule]).violations


def test_the_readme_has_every_rule_with_its_sentence() -> None:
    readme = (Path(__file__).parent / "README.md").read_text()
    missing = [rule for rule in Rule if f"| {rule.name} | {rule.value} |" not in readme]
    assert not missing
