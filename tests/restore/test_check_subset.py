"""`check --read-data-subset`: which packs are read, and that the others are still looked for."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import fault_harness
from tests.fault_harness import make_source, objects, put_in_place

from coffret.engine import check_packs
from coffret.engine.check_subset import Subset
from coffret.engine.errors import UsageError
from coffret.engine.packfile import pack_name

if TYPE_CHECKING:
    from pathlib import Path

_IDS = st.binary(min_size=32, max_size=32)
_SIZES = st.dictionaries(_IDS.map(pack_name), st.integers(1, 1 << 25), max_size=60)


@settings(deadline=None)
@given(sizes=_SIZES, parts=st.integers(1, 300))
def test_parts_are_all_of_it_and_do_not_overlap(sizes: dict[str, int], parts: int) -> None:
    chosen = [Subset.parse(f"{number}/{parts}").choose(sizes) for number in range(1, parts + 1)]
    assert sorted(name for names in chosen for name in names) == sorted(sizes)
    # A pack stays in its part, whatever else there is.
    for name in sizes:
        assert [name in names for names in chosen] == [
            name in Subset.parse(f"{number}/{parts}").choose({name: 1}) for number in range(1, parts + 1)
        ]


@settings(deadline=None)
@given(sizes=_SIZES, percent=st.floats(0.01, 100), seed=st.integers())
def test_percentage(sizes: dict[str, int], percent: float, seed: int) -> None:
    chosen = Subset(percent=percent).choose(sizes, random.Random(seed))
    assert chosen <= sizes.keys()
    assert len(chosen) == (max(1, int(len(sizes) * percent / 100)) if sizes else 0)


@settings(deadline=None)
@given(sizes=_SIZES, limit=st.integers(1, 1 << 28), seed=st.integers())
def test_size(sizes: dict[str, int], limit: int, seed: int) -> None:
    chosen = Subset.parse(str(limit)).choose(sizes, random.Random(seed))
    assert bool(chosen) == bool(sizes)
    assert len(chosen) < 2 or sum(sizes[name] for name in chosen) <= limit
    if sum(sizes.values()) <= limit:
        assert chosen == sizes.keys()


def test_random_parts_differ() -> None:
    """Each night other packs, and in the end all."""
    names = {pack_name(number.to_bytes(32, "big")): 100 for number in range(100)}
    drawn = [Subset.parse("10%").choose(names) for _ in range(200)]
    assert {len(each) for each in drawn} == {10}
    assert len(set(drawn)) > 100
    assert frozenset().union(*drawn) == names.keys()  # all but 7 in 10^8 times


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "1/70000", "0%", "101%", "0", "-1%", "1/2/3", "x", "", "½"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(UsageError):
        Subset.parse(text)


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_packs, "OPEN_WORKERS", 1)
    run = fault_harness.create(tmp_path)
    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    for number in range(3):
        (source / f"more{number}").write_bytes(random.Random(number).randbytes(20_000))
        run("backup", source, "--workers", "1")
    packs = objects(run.repository, "packs")
    parts = [run("check", "--json", "--read-data-subset", f"{number}/3").summary for number in (1, 2, 3)]
    assert sum(part["packs_read"] for part in parts) == len(packs) == parts[0]["packs"]
    assert sum(part["bytes_read"] for part in parts) == sum(path.stat().st_size for path in packs)
    told = run("check", "latest", "--read-data-subset", "1%").stdout
    assert "completed successfully; 1 of " in told

    bad = max(packs, key=lambda path: path.stat().st_size)
    data = bad.read_bytes()
    put_in_place(bad, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    for words in ([], ["--packs"]):
        found = [
            run("check", "--json", *words, "--read-data-subset", f"{number}/3", codes=(0, 4)) for number in (1, 2, 3)
        ]
        assert sorted(outcome.code for outcome in found) == [0, 0, 4]
        damaged = [name for outcome in found for name in outcome.summary["damaged_packs"]]
        assert damaged == [str(bad.relative_to(run.repository))]
    run("check", "--read-data-subset", "100%", codes=(4,))
    run("check", "--read-data-subset", "1T", codes=(4,))
    # What is missing or cut short is found whichever part is read.
    put_in_place(bad, data[:-1])
    for number in (1, 2, 3):
        run("check", "--read-data-subset", f"{number}/3", codes=(4,))
    run("check", "--fast", "--read-data-subset", "1/3", codes=(2,))
    run("check", "--read-data-subset", "4/3", codes=(2,))
