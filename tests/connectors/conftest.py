"""The second event loop tells little about a server: on those elsewhere its tests count as slow."""

from __future__ import annotations

import pytest

_ELSEWHERE = ("/s3/", "/sftp/", "/http/", "[uvloop-s3", "[uvloop-sftp", "[uvloop-http", "[s3", "[sftp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Where requests over TLS are cut off uvloop's sockets outlast it; the program runs on asyncio's loop.
    items[:] = [item for item in items if "[uvloop-httptls" not in item.nodeid]
    for item in items:
        if "uvloop" in item.nodeid and any(part in item.nodeid for part in _ELSEWHERE):
            item.add_marker(pytest.mark.slow)
