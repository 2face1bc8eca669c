"""Syncs: a source, and mirrors that are closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.fault_harness import make_source
from tests.sync.sides import mirrors

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
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that counts as old: nothing of it is read again for being fresh."""
    monkeypatch.setattr("coffret.engine.settings.RACY_NS", 0)
    (tmp_path / "cache").mkdir()  # else the directory above the source would change when it is made
    return make_source(tmp_path / "source", files=40, large_bytes=3 << 20)
