"""Prune: remove the snapshots that a policy does not keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coffret.engine.errors import CoffretError
from coffret.engine.ops.rm import remove
from coffret.engine.retention import GROUP_BY, Decision, Policy, decide, grouped, selected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.repository import Repository
    from coffret.engine.retention import Group

__all__ = ["PruneOptions", "Refused", "plan", "prune"]


class Refused(CoffretError):
    """A policy would leave nothing of a group."""

    remedy = "add an option that keeps something, --keep-last 1 say; `coffret at REPO rm` removes what is named"


class PruneOptions(msgspec.Struct, frozen=True):
    """What to keep, of which snapshots (see `retention.selected`), and how they are grouped."""

    policy: Policy
    hosts: Sequence[str] = ()
    tags: Sequence[frozenset[str]] = ()
    paths: Sequence[bytes] = ()
    group_by: Sequence[str] = GROUP_BY[:2]


async def plan(repository: Repository, options: PruneOptions) -> dict[Group, list[Decision]]:
    """Decide about each snapshot that is selected, by group.

    :raises Refused: if nothing would be left of a group
    """
    commits = await repository.commits()
    chosen = selected(commits.snapshots, hosts=options.hosts, tags=options.tags, paths=options.paths)
    decided = {group: decide(found, options.policy) for group, found in grouped(chosen, options.group_by).items()}
    for decisions in decided.values():
        if not any(decision.keep for decision in decisions):
            newest = decisions[0].snapshot
            raise Refused(
                f"nothing would be left of the {len(decisions)} snapshots like {newest.short_id}"
                if len(decisions) > 1
                else f"snapshot {newest.short_id}, the only one of its group, would be removed"
            )
    return decided


async def prune(repository: Repository, decided: dict[Group, list[Decision]]) -> None:
    """Remove what is not kept, the oldest first: whenever it is interrupted, what is left is what one expects."""
    going = [each.snapshot for decisions in decided.values() for each in decisions if not each.keep]
    await remove(repository, sorted(going, key=lambda snapshot: snapshot.header.time_ns))
