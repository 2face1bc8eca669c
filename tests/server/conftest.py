"""Servers over a folder each, which is made as `create` makes it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tests.server.serving import Serving

from coffret.connectors.local import LocalConnector

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def make_folder(folder: Path) -> None:
    """What a repository consists of, without anything in it."""

    async def make() -> None:
        async with LocalConnector(folder / "repository") as connector:
            await connector.create()

    # In a thread, since the test may have a loop of its own.
    thread = threading.Thread(target=anyio.run, args=(make,))
    thread.start()
    thread.join()


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
