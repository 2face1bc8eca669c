"""The second event loop runs the conformance suite; what only one kind of server has is run on the program's own."""

from __future__ import annotations

import pytest

_ON_ONE_LOOP = ("/s3/", "/sftp/", "/http/")
_SERVERS = ("[uvloop-s3", "[uvloop-sftp", "[uvloop-http", "[s3", "[sftp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Where requests over TLS are cut off uvloop's sockets outlast it; names of hosts it looks up itself.
    items[:] = [item for item in items if not _is_left_out(item.nodeid)]
    for item in items:
        if "uvloop" in item.nodeid and any(part in item.nodeid for part in _SERVERS):
            item.add_marker(pytest.mark.slow)


def _is_left_out(test: str) -> bool:
    return "uvloop" in test and (
        "[uvloop-httptls" in test or "[uvloop-s3virtual" in test or any(part in test for part in _ON_ONE_LOOP)
    )
