"""A repository with one object of each kind, to be damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.bad_input.stage import Stage

from coffret.engine import check_packs
from coffret.engine.ops import restore

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are what costs time here."""
    monkeypatch.setattr(check_packs, "OPEN_WORKERS", 1)
    monkeypatch.setattr(restore, "OPEN_WORKERS", 1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    yield Stage(tmp_path_factory.mktemp("stage"))
