"""Sizes and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coffret.engine.errors import UsageError
from coffret.engine.units import format_duration, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1b", 1),
        ("10M", 10 << 20),
        ("10m", 10 << 20),
        ("10MB", 10_000_000),
        ("500 kB", 500_000),
        ("1.5GiB", 3 << 29),
        (" .5K ", 512),
        ("0.0001K", 0),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("16E", 16 << 60),
    ],
)
def test_sizes_are_parsed(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "M", "-1", "1.M", "1X", "10iB", "1e3", "nan", "1,5M", "١", "1 0", "10MM"])
def test_other_text_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_123_456, "3.1 MB"),
        (9_949_999, "9.9 MB"),
        (9_950_000, "10 MB"),
        (13_000_000, "13 MB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (2_500_000_000_000, "2.5 TB"),
        (10**22, "10000 EB"),
    ],
)
def test_sizes_are_shown(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, 1 << 64))
def test_a_shown_size_is_the_size_to_within_what_is_shown(size_bytes: int) -> None:
    shown = parse_size(format_size(size_bytes))
    assert abs(shown - size_bytes) <= 0.051 * size_bytes


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0s"),
        (-0.5, "0s"),
        (1e-9, "0s"),
        (0.00085, "850µs"),
        (0.003, "3ms"),
        (0.07254875, "72.5ms"),
        (0.99994, "999.9ms"),
        (0.99996, "1s"),
        (4.3, "4.3s"),
        (4, "4s"),
        (59.94, "59.9s"),
        (59.96, "1m0s"),
        (123.4, "2m3s"),
        (3599.6, "1h0m0s"),
        (18012, "5h0m12s"),
    ],
)
def test_durations_are_shown(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text
