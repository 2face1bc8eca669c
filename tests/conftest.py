"""Shared fixtures: what is asynchronous runs on asyncio's own loop and on uvloop's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.harness import scratch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that is removed whatever lies in it."""
    with scratch() as path:
        yield path
