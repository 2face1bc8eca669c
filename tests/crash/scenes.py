"""The commands that change a repository, each with a repository on which it has something to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.fault_harness import PASSPHRASE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.crash.ground import Ground

ANOTHER, FRESH = "another one", "a fresh one"


def change_nothing(ground: Ground) -> None:
    """The repository will do as it is."""


@dataclass(frozen=True)
class Scene:
    """A command line. In its words `@url`, `@source`, `@first` and `@slot` stand for what the campaign has.

    `prepare` brings the repository, which has three snapshots and two passphrases, into the state in which the command
    finds it. `peer`: the command is run on the other repository. `fresh`: there is no repository yet. `stays`: which
    of the earlier snapshots can be restored at any moment. `check`: how `check` may end before the command has been
    repeated, `ends`: afterwards, until maintenance. `again`: how the command may end when it is repeated and all was
    done, beside well. `opens`: passphrases that open the repository in the end, `closed`: those that do not any more.
    """

    words: tuple[str, ...]
    prepare: Callable[[Ground], None] = change_nothing
    peer: bool = False
    fresh: bool = False
    stays: tuple[int, ...] = (0, 1, 2)
    check: tuple[int, ...] = (0,)
    ends: tuple[int, ...] = (0,)
    again: tuple[int, ...] = ()
    opens: tuple[str, ...] = (PASSPHRASE,)
    closed: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def change_source(ground: Ground) -> None:
    """There is something to back up."""
    ground.change_source("more")


def copy_partly(ground: Ground) -> None:
    """A copy was made when the peer had one snapshot less."""
    ground.run("clone", "to", "@url", peer=True)
    ground.back_up("@peer source", peer=True)


def make_garbage(ground: Ground) -> None:
    """Two snapshots are removed, and a backup was killed before it committed: to be marked, swept, copied and ended."""
    ground.change_source("garbage")
    ground.run("backup", "@source", "--workers", "1", death=(4, "not done"))
    ground.place.age(hours=2)
    ground.run("rm", *ground.earlier[:2])


def lose_index(ground: Ground) -> None:
    """The index object of the last snapshot is gone."""
    [lost] = (name for name in ground.made_last if name.startswith("index/"))
    ground.place.delete(lost)


def damage_pack(ground: Ground) -> None:
    """The pack of the last snapshot's new files is damaged."""
    packs = [name for name in ground.made_last if name.startswith("packs/")]
    ground.place.damage(max(packs, key=ground.place.size_of))


_NEW = {"COFFRET_NEW_PASSPHRASE": FRESH}
SCENES = {
    "create": Scene(("create",), fresh=True, stays=(), check=(0, 10), again=(2,)),
    "backup": Scene(("backup", "@source", "--workers", "1"), change_source),
    "sync": Scene(("sync", "to", "@url"), peer=True),
    "clone": Scene(("clone", "to", "@url"), peer=True, fresh=True, stays=(), check=(0, 10)),
    "clone again": Scene(("clone", "to", "@url"), copy_partly, peer=True, fresh=True, stays=()),
    "rm": Scene(("rm", "@first"), stays=(1, 2), again=(2,)),
    "prune": Scene(("prune", "--keep-last", "1"), stays=(2,)),
    "maintenance": Scene(("maintenance", "--grace", "0"), make_garbage, stays=(2,)),
    "passphrase add": Scene(("passphrase", "add"), opens=(PASSPHRASE, ANOTHER, FRESH), environment=_NEW),
    "passphrase change": Scene(
        ("passphrase", "change"), opens=(FRESH, ANOTHER), closed=(PASSPHRASE,), environment=_NEW
    ),
    "passphrase rm": Scene(("passphrase", "rm", "@slot"), again=(2,), closed=(ANOTHER,)),
    "repair index": Scene(("repair", "index"), lose_index, stays=(0, 1), check=(0, 4)),
    "repair snapshots": Scene(("repair", "snapshots", "--forget"), damage_pack, stays=(0, 1), check=(4,), ends=(4,)),
}
