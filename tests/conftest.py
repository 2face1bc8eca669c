"""Shared fixtures: what is asynchronous runs on asyncio's own loop and on uvloop's."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.harness import scratch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Temporary folders are made in one of this process's own, which others may enter.

    A snapshot holds the directories above its source: where tests run side by side, /tmp would change all the time.
    """
    tmp_path_factory.getbasetemp()  # stays where pytest looks for it the next time
    folder = tempfile.mkdtemp(prefix="coffret-test-")
    Path(folder).chmod(0o755)
    # Handlers run the last one first: servers that tests share end before.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tempfile.tempdir = folder


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that is removed whatever lies in it."""
    with scratch() as path:
        yield path
