"""Attempts: a source, and mirrors that are closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import mirrors
from tests.fault_harness import make_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough: channels, threads and processes, where loops differ, have tests of their own."""
    return "asyncio"


@pytest.fixture(autouse=True)
async def _mirrors_are_closed() -> AsyncIterator[None]:
    yield
    while mirrors:
        await mirrors.pop().close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", files=20, large_bytes=1 << 20)
