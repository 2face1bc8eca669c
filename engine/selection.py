"""Select snapshots: by id, and by what they were made of, where and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coffret.engine.catalog_reader import clean_path
from coffret.engine.snapshot import find_snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.engine.snapshot import Commits, Snapshot


class Selection(msgspec.Struct, frozen=True):
    """Which snapshots are meant: those that pass every filter given, and, if any are `named`, only these.

    `named`: ids, prefixes, or `latest`. `tags`, `hosts` and `paths`: one of each is enough; a path is one of the
    snapshot's roots or lies below one. `since_ns` (inclusive) and `before_ns` (exclusive): ns since 1970. `latest`: so
    many of each host and set of roots.
    """

    named: Sequence[str] = ()
    tags: Sequence[str] = ()
    hosts: Sequence[str] = ()
    paths: Sequence[bytes] = ()
    since_ns: int | None = None
    before_ns: int | None = None
    latest: int | None = None

    def of(self, commits: Commits, elsewhere: Commits | None = None) -> list[Snapshot]:
        """The snapshots meant, by time. One that is named may be `elsewhere` only, if that is given.

        :raises NoSuchSnapshot: if one that is named is none, or several
        :raises Damaged: if `latest` is named, and may be one that can't be read
        """
        candidates = commits.snapshots
        if self.named:
            wanted = {self._find(commits, elsewhere, name) for name in self.named}
            candidates = [snapshot for snapshot in candidates if snapshot.id in wanted]
        return self._latest([snapshot for snapshot in candidates if self._passes(snapshot)])

    def names(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot is meant by its own id, or the beginning of it."""
        return any(name and snapshot.id.startswith(name.lower()) for name in self.named)

    @staticmethod
    def _find(commits: Commits, elsewhere: Commits | None, name: str) -> str:
        """The id of a snapshot that is named."""
        if elsewhere is None or (name == "latest" and commits.snapshots):
            return find_snapshot(commits, name).id
        both = {each.id: each for each in (*elsewhere.snapshots, *commits.snapshots)}
        return find_snapshot(msgspec.structs.replace(elsewhere, snapshots=list(both.values())), name).id

    def _passes(self, snapshot: Snapshot) -> bool:
        header = snapshot.header
        return (
            (not self.tags or not set(self.tags).isdisjoint(header.tags))
            and (not self.hosts or header.host in self.hosts)
            and (not self.paths or any(_covers(root, path) for root in header.roots for path in self.paths))
            and (self.since_ns is None or header.time_ns >= self.since_ns)
            and (self.before_ns is None or header.time_ns < self.before_ns)
        )

    def _latest(self, snapshots: list[Snapshot]) -> list[Snapshot]:
        if self.latest is None:
            return snapshots
        left: dict[tuple[str, ...], int] = {}
        chosen = []
        for snapshot in reversed(snapshots):
            group = (snapshot.header.host, *(repr(root) for root in snapshot.header.roots))
            if left.setdefault(group, self.latest):
                left[group] -= 1
                chosen.append(snapshot)
        return chosen[::-1]


def _covers(root: bytes, path: bytes) -> bool:
    """Whether a path is a root, or lies below it."""
    inner, outer = clean_path(path), clean_path(root)
    return inner == outer or not outer or inner.startswith(outer + b"/")
