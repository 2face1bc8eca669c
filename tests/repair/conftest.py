"""Repair: a source, and a repository in memory whose mirrors are closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import Storage, mirrors
from tests.fault_harness import make_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough: channels, threads and processes, where loops differ, have tests of their own."""
    return "asyncio"


@pytest.fixture
async def storage() -> AsyncIterator[Storage]:
    yield Storage()
    while mirrors:
        await mirrors.pop().close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", files=20, large_bytes=1 << 20)
