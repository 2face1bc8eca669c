"""What tests of the command line share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


SNAPSHOT = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)   ([0-9a-f]{8}) +([\d.]+ k?B) +(\S+)   (/.*)"


def make_source(home: Path) -> Path:
    source = home / "source"
    (source / "ssh").mkdir(parents=True)
    (source / "hosts").write_text("127.0.0.1 localhost\n")
    (source / "ssh" / "config").write_text("Host *\n")
    return source
