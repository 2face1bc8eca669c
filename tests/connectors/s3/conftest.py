"""Servers, buckets and connectors for what only S3 has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.connectors.s3_server import S3Server, shared_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coffret.connectors.s3 import S3Connector


@pytest.fixture
def server() -> S3Server:
    return shared_server(tls=False)


@pytest.fixture
def bucket() -> str:
    return f"test-{os.urandom(8).hex()}"


@pytest.fixture
async def connector(server: S3Server, bucket: str) -> AsyncIterator[S3Connector]:
    async with server.connector(bucket) as connector:
        await connector.create()
        yield connector
