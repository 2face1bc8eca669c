"""A place for sources, and the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.harness import Program

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One loop is enough for what is tested here."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def program(place: Path) -> Program:
    """The program, with a repository beside a directory `source`."""
    made = Program(place)
    made("create", "--no-encryption")
    for name in ("one/a", "one/sub/b", "two/c", "file"):
        path = place / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return made
