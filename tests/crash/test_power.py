"""Power losses on a folder: a disk that keeps what was flushed, and of the rest what it likes."""

from __future__ import annotations

import base64
import random
from typing import TYPE_CHECKING

import pytest
from tests.crash.losses import losses, losses_after_deaths
from tests.crash.power import Disk
from tests.crash.scenes import SCENES
from tests.fault_harness import ROUNDS, SEED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.crash.campaign import Campaign
    from tests.crash.power import Event, Tree

DATA = base64.b64encode(b"data").decode()


def left(*events: Event) -> tuple[set[str], set[str]]:
    """The files there are after a power loss: at least, and at most."""
    disk = Disk()
    for _ in disk.happen([("folder", "/a"), ("names", "/"), *events]):
        pass
    least, most = disk.lose_power(lambda path, count: 0, None), disk.lose_power(lambda path, count: count - 1, None)
    return {path for path in least if path != "/a"}, {path for path in most if path != "/a"}


def test_a_disk_keeps_what_was_flushed() -> None:
    made: Event = ("make", "/a/x", 1)
    flushed: Event = ("names", "/a")
    assert left(made) == (set(), {"/a/x"})
    assert left(made, flushed) == ({"/a/x"}, {"/a/x"})
    assert left(made, flushed, ("move", "/a/x", "/a/y")) == ({"/a/x"}, {"/a/y"})
    assert left(made, ("link", "/a/x", "/a/y"), flushed, ("remove", "/a/x")) == ({"/a/x", "/a/y"}, {"/a/y"})
    assert left(("folder", "/a/b"), ("make", "/a/b/x", 1), ("names", "/a/b")) == (set(), {"/a/b", "/a/b/x"})


def test_a_disk_keeps_no_more_than_that() -> None:
    """Of a file that was not flushed there may be anything; of a name what it has stood for."""
    disk, chance = Disk(), random.Random(1)
    events: list[Event] = [
        ("make", "/x", 1),
        ("names", "/"),
        ("data", 1, DATA),
        ("make", "/y", 2),
        ("move", "/y", "/x"),
    ]
    moments: list[Tree] = []
    seen = []
    for _ in disk.happen(events):
        moments = [disk.lose_power(lambda _, count: chance.randrange(count), chance) for _ in range(200)]
        seen.append({tree["/x"][0] if "/x" in tree else None for tree in moments})
    assert seen[0] >= {None, b"", b"data", bytes(4)}
    assert None not in seen[1]
    assert seen[2] == {b"data"}
    assert seen[4] == {b"data", b""}
    assert {frozenset(tree) for tree in moments} == {frozenset(["/x"]), frozenset(("/x", "/y"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_power_losses(campaign_on: Callable[[str], Campaign], name: str, tmp_path: Path) -> None:
    """At moments by chance, and when the command has ended."""
    campaign, chance = campaign_on("local"), random.Random(f"{SEED} {name}")
    every = [*losses(campaign, name, tmp_path / "log", f"{SEED}")]
    ended = [loss for loss in every if loss[2] is not None]
    assert len(every) > len(ended) >= 1
    for loss in (*chance.sample(every, ROUNDS), ended[0]):
        campaign.after_loss(name, *loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call"),
    [("create", "create"), ("create", "put config"), ("sync", "put snapshots/"), ("clone again", "put packs/")],
)
def test_a_name_that_a_dead_process_did_not_flush(
    campaign_on: Callable[[str], Campaign], name: str, call: str, tmp_path: Path
) -> None:
    """Who finds it, and goes by it, has it flushed."""
    campaign = campaign_on("local")
    *_, last = (number for number, each in enumerate(campaign.calls(name)) if each.startswith(call))
    for loss in losses_after_deaths(campaign, name, tmp_path / "log", [(last, "unflushed")]):
        campaign.after_loss(name, *loss)


@pytest.mark.parametrize("kept", ["nothing", "three snapshots", "maintenance"])
def test_a_cache_from_an_earlier_day(campaign_on: Callable[[str], Campaign], kept: str) -> None:
    """It knows chunks that maintenance has swept since: a backup of these stores them again."""
    campaign = campaign_on("local")
    campaign.set_up("maintenance")
    campaign.run(*SCENES["maintenance"].words)
    campaign.remember_only(kept)
    swept = campaign.earlier[0]
    campaign.make_source(swept)
    campaign.run("backup", "@source", "--workers", "1")
    campaign.run("check", "--workers", "1")
    campaign.check_restored("latest", campaign.contents[swept])
