"""Restores and checks of small trees: one loop is enough for them, and one worker."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further processes would take longer to start than these trees to restore."""
    monkeypatch.setattr("coffret.engine.ops.restore.OPEN_WORKERS", 1)
    monkeypatch.setattr("coffret.engine.check_packs.OPEN_WORKERS", 1)
