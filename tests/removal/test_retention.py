"""What a policy keeps: restic's rules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from coffret.engine.errors import UsageError
from coffret.engine.records import Counts, SnapshotHeader
from coffret.engine.retention import (
    UNLIMITED,
    Duration,
    Policy,
    decide,
    grouped,
    parse_duration,
    parse_group_by,
    selected,
    tag_sets,
)
from coffret.engine.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTED = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
# However busy the machine is.
PATIENT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def snapshot(
    when: datetime,
    number: int = 0,
    *,
    tags: Sequence[str] = (),
    host: str = "host",
    roots: Sequence[bytes] = (b"/etc",),
) -> Snapshot:
    header = SnapshotHeader(
        snapshot_id=number.to_bytes(16, "big"),
        time_ns=int(when.timestamp()) * 10**9,
        duration_ns=0,
        host=host,
        user="",
        roots=list(roots),
        catalog=b"",
        depth=0,
        counts=Counts(),
        tags=list(tags),
    )
    return Snapshot(number.to_bytes(16, "big"), header)


# Gaps of minutes to months: some buckets have many snapshots, some none.
gaps = st.one_of(st.integers(0, 90), st.integers(0, 3000), st.integers(0, 100_000))


@st.composite
def histories(draw: st.DrawFn) -> list[Snapshot]:
    when, found = BEGIN, []
    for number, gap in enumerate(draw(st.lists(gaps, min_size=1, max_size=40))):
        when += timedelta(minutes=gap)
        found.append(snapshot(when, number, tags=draw(st.sets(st.sampled_from("abc"), max_size=2).map(sorted))))
    return draw(st.permutations(found))


counts = st.one_of(st.just(0), st.integers(0, 12), st.just(UNLIMITED))
policies = st.builds(
    Policy,
    **dict.fromkeys(COUNTED, counts),
    within=st.builds(Duration, *[st.integers(0, n) for n in (1, 3, 20, 40)]),
    tags=st.lists(st.frozensets(st.sampled_from("abc"), min_size=1, max_size=2), max_size=2).map(tuple),
)


def kept(found: Sequence[Snapshot], policy: Policy) -> set[str]:
    return {decision.snapshot.id for decision in decide(found, policy, UTC) if decision.keep}


def more(count: int, by: int) -> int:
    return UNLIMITED if UNLIMITED in (count, by) else count + by


@PATIENT
@given(histories(), policies)
def test_each_snapshot_is_decided_about_once(found: list[Snapshot], policy: Policy) -> None:
    decisions = decide(found, policy, UTC)
    assert sorted(each.snapshot.id for each in decisions) == sorted(each.id for each in found)
    times = [each.snapshot.header.time_ns for each in decisions]
    assert times == sorted(times, reverse=True)
    assert all(each.keep == bool(each.reasons) and "" not in each.reasons for each in decisions)
    if any(getattr(policy, name) for name in COUNTED):
        assert decisions[0].keep


@PATIENT
@given(histories(), policies, policies)
def test_more_keeps_more(found: list[Snapshot], policy: Policy, other: Policy) -> None:
    larger = Policy(
        **{name: more(getattr(policy, name), getattr(other, name)) for name in COUNTED},
        within=Duration(*(getattr(policy.within, n) + getattr(other.within, n) for n in Duration.__struct_fields__)),
        tags=policy.tags + other.tags,
    )
    assert kept(found, policy) <= kept(found, larger)


@PATIENT
@given(histories(), policies)
def test_once_more_changes_nothing(found: list[Snapshot], policy: Policy) -> None:
    ids = kept(found, policy)
    left = [each for each in found if each.id in ids]
    assert kept(left, policy) == ids


@PATIENT
@given(histories(), st.integers(1, 12), st.sampled_from(["%Y%m%d%H", "%Y%m%d", "%G%V", "%Y%m", "%Y"]))
def test_a_bucket_keeps_its_last(found: list[Snapshot], number: int, form: str) -> None:
    name = {"%Y%m%d%H": "hourly", "%Y%m%d": "daily", "%G%V": "weekly", "%Y%m": "monthly", "%Y": "yearly"}[form]
    newest: dict[str, Snapshot] = {}
    ordered = sorted(found, key=lambda each: (each.header.time_ns, -int(each.id, 16)))
    for each in ordered:
        newest[datetime.fromtimestamp(each.header.time_ns / 1e9, UTC).strftime(form)] = each
    wanted = {newest[period].id for period in sorted(newest)[-number:]}
    if len(newest) < number:
        wanted.add(ordered[0].id)  # there are some left: the history is to reach as far as it can
    policy: dict[str, Any] = {name: number}
    assert kept(found, Policy(**policy)) == wanted


@PATIENT
@given(histories(), st.integers(1, 50), st.integers(0, 60), st.integers(0, 60))
def test_last_within_and_tags(found: list[Snapshot], number: int, days: int, hours: int) -> None:
    ordered = [each.snapshot for each in decide(found, Policy(), UTC)]
    assert kept(found, Policy(last=number)) == {each.id for each in ordered[:number]}
    since_ns = ordered[0].header.time_ns - (days * 24 + hours) * 3600 * 10**9
    expected = {each.id for each in ordered if (days or hours) and each.header.time_ns > since_ns}
    assert kept(found, Policy(within=Duration(days=days, hours=hours))) == expected
    tagged = {each.id for each in found if {"a", "b"} <= set(each.header.tags) or "c" in each.header.tags}
    assert kept(found, Policy(tags=(frozenset("ab"), frozenset("c")))) == tagged


def test_a_year_of_days() -> None:
    """The example that people know: by days, weeks, months and years, with reasons."""
    days = [datetime(2024, 12, 31, 12, tzinfo=UTC) - timedelta(days=number) for number in range(800)]
    policy = Policy(daily=7, weekly=4, monthly=12, yearly=5)
    decisions = decide([snapshot(day, number) for number, day in enumerate(days)], policy, UTC)
    reasons = {
        f"{datetime.fromtimestamp(each.snapshot.header.time_ns / 1e9, UTC):%Y-%m-%d}": each.reasons
        for each in decisions
        if each.keep
    }
    assert reasons["2024-12-31"] == tuple(f"{name} snapshot" for name in ("daily", "weekly", "monthly", "yearly"))
    assert reasons["2024-12-29"] == ("daily snapshot", "weekly snapshot")  # a Sunday
    assert reasons["2024-12-22"] == reasons["2024-12-15"] == ("weekly snapshot",)
    assert reasons["2024-02-29"] == ("monthly snapshot",)
    assert reasons["2023-12-31"] == reasons["2022-12-31"] == ("yearly snapshot",)
    assert reasons[f"{days[-1]:%Y-%m-%d}"] == ("oldest yearly snapshot",)
    assert len(reasons) == 7 + 2 + 11 + 2 + 1


def test_hours_and_days_are_those_of_a_zone() -> None:
    late = [snapshot(datetime(2024, 6, 1, 21, 30, tzinfo=UTC), 1), snapshot(datetime(2024, 6, 1, 23, tzinfo=UTC), 2)]
    policy = Policy(daily=1)
    assert [each.keep for each in decide(late, policy, UTC)] == [True, False]
    more_days = Policy(daily=2)
    assert [each.reasons for each in decide(late, more_days, ZoneInfo("Europe/Berlin"))] == [("daily snapshot",)] * 2
    assert decide(late, more_days, UTC)[1].reasons == ("oldest daily snapshot",)


@pytest.mark.parametrize(
    ("text", "day", "before"),
    [
        ("1m", "2023-03-31", "2023-03-03"),
        ("1y", "2024-02-29", "2023-03-01"),
        ("1y2m3d", "2024-05-05", "2023-03-02"),
        ("14m", "2024-01-31", "2022-12-01"),
        ("36h", "2024-01-02", "2024-01-01"),
        ("3000y", "2024-01-02", ""),
        ("999999d", "2024-01-02", ""),
    ],
)
def test_durations(text: str, day: str, before: str) -> None:
    found = parse_duration(text).before(datetime.fromisoformat(f"{day}T12:00:00+00:00"))
    assert f"{found:%Y-%m-%d}" == before if found else not before


@pytest.mark.parametrize("text", ["", "1", "d", "1w", "-1d", "1d1y", "1.5d", "1 d", "٣d", "9999999d"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


def test_durations_are_shown_as_they_are_written() -> None:
    for text in ("1y2m3d4h", "14d", "0h"):
        assert str(parse_duration(text)) == text


def test_any_time_can_be_stored() -> None:
    """Whatever a header says, by the limits of its integers."""
    strange = [Snapshot(bytes(16), replace_time(time_ns)) for time_ns in (0, 1, 2**64 - 1, -(2**63))]
    decisions = decide(strange, Policy(last=1, yearly=3, within=Duration(years=2000)), UTC)
    assert all(each.keep for each in decisions)


def replace_time(time_ns: int) -> SnapshotHeader:
    header = snapshot(BEGIN).header
    header.time_ns = time_ns
    return header


def test_groups_and_selection() -> None:
    one = snapshot(BEGIN, 1, host="a", roots=[b"/etc", b"/home"], tags=["x", "y"])
    two = snapshot(BEGIN, 2, host="a", roots=[b"/home", b"/etc"])
    three = snapshot(BEGIN, 3, host="b", roots=[b"/etc"], tags=["y"])
    found = [one, two, three]
    assert [*grouped(found, ("host", "paths")).values()] == [[one, two], [three]]
    assert [*grouped(found, ("host", "paths", "tags")).values()] == [[two], [one], [three]]
    assert [*grouped(found, ()).values()] == [found]
    assert parse_group_by("tags,host") == ("host", "tags")
    assert parse_group_by("none") == ()
    with pytest.raises(UsageError):
        parse_group_by("hosts")
    assert selected(found) == found
    assert selected(found, hosts=["b", "c"]) == [three]
    assert selected(found, tags=tag_sets("x,y")) == [one]
    assert selected(found, tags=[*tag_sets("x"), *tag_sets("y")]) == [one, three]
    assert selected(found, paths=[b"/etc"]) == found
    assert selected(found, paths=[b"/etc", b"/home"]) == [one, two]
    with_comma = snapshot(BEGIN, 4, tags=["a,b"])
    assert selected([with_comma], tags=tag_sets("a,b")) == [with_comma]
    with pytest.raises(UsageError):
        tag_sets(" , ")
