"""Maintenance: mirrors that are closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.attempts.storage import mirrors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough: channels, threads and processes, where loops differ, have tests of their own."""
    return "asyncio"


@pytest.fixture
async def closed_mirrors() -> AsyncIterator[None]:
    """For tests that open a storage."""
    yield
    while mirrors:
        await mirrors.pop().close()
