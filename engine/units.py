"""Sizes and durations as people write and read them.

Written sizes follow coreutils and restic: `K`, `KiB` are 1024, `KB` is 1000. Sizes are shown in decimal
units, as disks are sold.
"""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal

from coffret.engine.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:([KMGTPE])(I?B)?|B)?", re.ASCII | re.IGNORECASE)
_DURATION = re.compile(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?|(\d{1,6})", re.ASCII)
_PREFIXES = "KMGTPE"
_AGO = re.compile(r"(\d+)([smhdw])(?: ago)?", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def parse_size(text: str) -> int:
    """A size such as `4096`, `10M`, `1.5GiB` or `500 kB` in bytes, rounded down.

    :raises UsageError: if it is none
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"not a size: {text!r}", remedy="write it as in 500K, 10M or 1.5GiB")
    number, prefix, unit = found.groups()
    power = _PREFIXES.index(prefix.upper()) + 1 if prefix else 0
    base = 1000 if unit and unit.upper() == "B" else 1024
    return int(Decimal(number) * base**power)


def parse_seconds(text: str) -> float:
    """A duration such as `0`, `90s`, `30m`, `24h`, `7d` or `1d12h` in seconds.

    :raises UsageError: if it is none
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None or not any(found.groups()):
        raise UsageError(f"not a duration: {text!r}", remedy="write it as in 90s, 30m, 24h or 7d")
    *parts, bare = found.groups()
    if bare and int(bare):
        raise UsageError(f"a duration without a unit: {text!r}", remedy="write it as in 90s, 30m, 24h or 7d")
    return float(sum(int(part or 0) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True)))


def parse_moment(text: str, now_ns: int) -> int:
    """A moment in ns since 1970, UTC: a date or time in ISO 8601 (local, unless it names its zone), or `30d` ago.

    :raises UsageError: if it is none
    """
    if found := _AGO.fullmatch(text.strip()):
        return now_ns - int(found[1]) * _SECONDS[found[2]] * 1_000_000_000
    try:
        return int(datetime.fromisoformat(text.strip()).timestamp()) * 1_000_000_000
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"not a time: {text!r}", remedy="write it as in 2026-11-22, 2026-11-22T21:38 or 30d (30 days ago)"
        ) from None


def format_size(size_bytes: int) -> str:
    """A size in decimal units: `0 B`, `999 B`, `3.1 MB`, `13 MB`."""
    value, power = float(size_bytes), 0
    # 999.5 kB and more would be shown as 1000 kB, which is 1.0 MB.
    while value >= 999.5 and power < len(_DECIMAL) - 1:
        value, power = value / 1000, power + 1
    # 9.95 and more would be shown as 10.0.
    digits = 1 if power and value < 9.95 else 0
    return f"{value:.{digits}f} {_DECIMAL[power]}"


def format_duration(duration_s: float) -> str:
    """A duration: `0s`, `850µs`, `72.5ms`, `4.3s`, `2m3s`, `5h0m12s`; for whole seconds give a whole number of them."""
    duration_us = round(duration_s * 1_000_000)
    if duration_us <= 0:
        return "0s"
    if duration_us < 1000:
        return f"{duration_us}µs"
    if duration_us < 999_950:
        return f"{_short(duration_us / 1000)}ms"
    if duration_us < 59_950_000:
        return f"{_short(duration_us / 1_000_000)}s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s"


def _short(value: float) -> str:
    """With one digit behind the point, unless it is 0."""
    return f"{value:.1f}".removesuffix(".0")
