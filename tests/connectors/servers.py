"""What the servers of the tests have in common: a port, and what it means that one is not there."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from typing import NoReturn

import pytest

# Below those that the system gives to whoever asks for any: a server that is started again finds its own still free.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("no port is free")


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail in CI, where everything has to be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
