"""Servers over a folder each, which is made as `create` makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.server.serving import Serving

from coffret.connectors.local import FOLDERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def make_folder(folder: Path) -> None:
    """An empty repository's folder, without the 256 for packs: those are made when they are needed."""
    for name in FOLDERS:
        (folder / "repository" / name).mkdir(parents=True)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One loop is enough: the server has its own, and the conformance suite runs on both."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    make_folder(tmp_path)
    with Serving(tmp_path) as server:
        yield server
    assert server.error is None


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """For tests that leave it as it was, or don't care."""
    folder = tmp_path_factory.mktemp("server")
    make_folder(folder)
    with Serving(folder) as server:
        yield server
    assert server.error is None
