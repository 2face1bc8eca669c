"""What the servers of the tests have in common: a port, and what it means that one is not there."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest
from bench.remote_servers import free_port

__all__ = ["free_port", "missing"]


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail in CI, where everything has to be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
