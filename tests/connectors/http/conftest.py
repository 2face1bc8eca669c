"""Servers for what only a served repository has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.server.conftest import make_folder
from tests.server.serving import Serving

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("http")
    make_folder(folder)
    with Serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("https")
    make_folder(folder)
    with Serving(folder, tls=True) as server:
        yield server
