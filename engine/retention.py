"""Retention: which snapshots a policy keeps, and why. Pure; the rules are those of restic's `forget`.

Of each group, the newest snapshot first: `last` keeps so many; `hourly` … `yearly` keep the newest of each hour … year,
for so many hours … years that have one; while a rule has some left, it keeps the oldest snapshot as well, so that the
history reaches as far back as it can. `within` goes back from the newest snapshot that is not in the future, not from
now. What one rule keeps is kept. Hours, days, weeks (from Monday), months and years are those of a time zone.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from time import time_ns
from typing import TYPE_CHECKING

import msgspec

from coffret.engine.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import tzinfo

    from coffret.engine.snapshot import Snapshot

#: A rule that keeps as many as there are.
UNLIMITED = -1
GROUP_BY = ("host", "paths", "tags")
_DURATION = re.compile(r"(?:(\d{1,6})y)?(?:(\d{1,6})m)?(?:(\d{1,6})d)?(?:(\d{1,6})h)?", re.ASCII)

Group = tuple[tuple[str, tuple[str | bytes, ...]], ...]


class Duration(msgspec.Struct, frozen=True):
    """A time as people mean it: a month is as long as the month that it leads to."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    def __str__(self) -> str:
        parts = ((self.years, "y"), (self.months, "m"), (self.days, "d"), (self.hours, "h"))
        return "".join(f"{number}{unit}" for number, unit in parts if number) or "0h"

    def before(self, time: datetime) -> datetime | None:
        """The moment that lies so long before another; None if there is none so early.

        As Go's `AddDate` has it: a month before the 31st of March is the 31st of February, which is the 3rd of March.
        """
        month = time.year * 12 + time.month - 1 - self.years * 12 - self.months
        try:
            first = time.replace(year=month // 12, month=month % 12 + 1, day=1)
            there = first + timedelta(days=time.day - 1 - self.days)
            return (there.astimezone(UTC) - timedelta(hours=self.hours)).astimezone(time.tzinfo)
        except (OverflowError, ValueError):
            return None


def parse_duration(text: str) -> Duration:
    """A duration such as `2y5m7d3h`: years, months, days, hours, each of which may be missing.

    :raises UsageError: if it is none
    """
    found = _DURATION.fullmatch(text)
    if not text or found is None:
        raise UsageError(
            f"not a duration: {text!r}", remedy="write years, months, days and hours as in 1y6m, 14d or 2d12h"
        )
    return Duration(*(int(number or 0) for number in found.groups()))


class Policy(msgspec.Struct, frozen=True):
    """How many to keep by each rule, or UNLIMITED; `tags`: keep what has all tags of one of these sets."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration = msgspec.field(default_factory=Duration)
    tags: tuple[frozenset[str], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it keeps nothing: then it says nothing."""
        return self == Policy()


class Decision(msgspec.Struct, frozen=True):
    """What is to become of a snapshot: it is kept for these reasons, and goes if there is none."""

    snapshot: Snapshot
    reasons: tuple[str, ...]

    @property
    def keep(self) -> bool:
        """Whether it stays."""
        return bool(self.reasons)


class _Rule(msgspec.Struct):
    """One of the rules that count: how many are left, and the period of the one that was kept last."""

    name: str
    left: int
    period: Callable[[datetime, int], object]
    latest: object = None

    def keeps(self, time: datetime, number: int, *, oldest: bool) -> str:
        """Whether it keeps the next snapshot: the reason, or ""."""
        if not self.left:
            return ""
        period = self.period(time, number)
        new = period != self.latest
        if not new and not oldest:
            return ""
        self.latest = period
        self.left -= self.left > 0
        return f"{self.name} snapshot" if new else f"oldest {self.name} snapshot"


_PERIODS: Mapping[str, Callable[[datetime, int], object]] = {
    "last": lambda time, number: number,
    "hourly": lambda time, number: (time.year, time.month, time.day, time.hour),
    "daily": lambda time, number: time.date(),
    "weekly": lambda time, number: time.isocalendar()[:2],
    "monthly": lambda time, number: (time.year, time.month),
    "yearly": lambda time, number: time.year,
}
assert [*_PERIODS] == [*Policy.__struct_fields__][: len(_PERIODS)]


def decide(
    snapshots: Iterable[Snapshot], policy: Policy, zone: tzinfo | None = None, *, now_ns: int | None = None
) -> list[Decision]:
    """Decide about the snapshots of one group, the newest first. `zone`: None for this machine's.

    `within` counts from the newest that is not later than `now_ns` (None: than now): a clock that is fast by years must
    not age all others.
    """
    now_ns = time_ns() if now_ns is None else now_ns
    ordered = sorted(snapshots, key=lambda snapshot: (-snapshot.header.time_ns, snapshot.id))
    times = [_local(snapshot, zone) for snapshot in ordered]
    rules = [_Rule(name, getattr(policy, name), period) for name, period in _PERIODS.items()]
    within = policy.within != Duration()
    past = [time for snapshot, time in zip(ordered, times, strict=True) if snapshot.header.time_ns <= now_ns]
    begin = policy.within.before((past or times)[0]) if times else None
    decisions = []
    for number, (snapshot, time) in enumerate(zip(ordered, times, strict=True)):
        oldest = number == len(ordered) - 1
        reasons = [f"has tags {_listed(tags)}" for tags in policy.tags if tags <= set(snapshot.header.tags)]
        if within and (begin is None or time > begin):
            reasons.append(f"within {policy.within}")
        reasons += [reason for rule in rules if (reason := rule.keeps(time, number, oldest=oldest))]
        decisions.append(Decision(snapshot, tuple(reasons)))
    return decisions


def _listed(tags: Iterable[str]) -> str:
    return ", ".join(sorted(tags))


def _local(snapshot: Snapshot, zone: tzinfo | None) -> datetime:
    return datetime.fromtimestamp(snapshot.header.time_ns / 1e9, UTC).astimezone(zone)


def tag_sets(text: str) -> tuple[frozenset[str], ...]:
    """The tags that a snapshot must have all, of `TAG[,TAG…]`; or one tag that has commas in it.

    :raises UsageError: if it is none
    """
    split = frozenset(tag.strip() for tag in text.split(",") if tag.strip())
    if not split:
        raise UsageError(f"not a tag: {text!r}", remedy="give a tag, or several with commas between them")
    return tuple({split, frozenset([text])})


def parse_group_by(text: str) -> tuple[str, ...]:
    """What snapshots must have in common to be of one group, of `host,paths,tags` in any order, or `none`.

    :raises UsageError: if it names something else
    """
    names = () if text == "none" else tuple(name.strip() for name in text.split(","))
    if not set(names) <= set(GROUP_BY):
        raise UsageError(f"snapshots can't be grouped by {text!r}", remedy="name some of host,paths,tags, or none")
    return tuple(name for name in GROUP_BY if name in names)


def grouped(snapshots: Iterable[Snapshot], by: Sequence[str]) -> dict[Group, list[Snapshot]]:
    """Snapshots by what they have in common; groups in order."""
    groups: dict[Group, list[Snapshot]] = {}
    for snapshot in snapshots:
        header = snapshot.header
        of: dict[str, tuple[str | bytes, ...]] = {
            "host": (header.host,),
            "paths": tuple(sorted(header.roots)),
            "tags": tuple(sorted(set(header.tags))),
        }
        groups.setdefault(tuple((name, of[name]) for name in by), []).append(snapshot)
    return dict(sorted(groups.items()))


def selected(
    snapshots: Iterable[Snapshot],
    *,
    hosts: Sequence[str] = (),
    tags: Sequence[frozenset[str]] = (),
    paths: Sequence[bytes] = (),
) -> list[Snapshot]:
    """Those of one of the hosts, with all tags of one of the sets, of all the paths; what is empty asks for nothing."""
    return [
        snapshot
        for snapshot in snapshots
        if (not hosts or snapshot.header.host in hosts)
        and (not tags or any(wanted <= set(snapshot.header.tags) for wanted in tags))
        and set(paths) <= set(snapshot.header.roots)
    ]
