"""What tests of the S3 connector share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.connectors.test_conformance import MIB, listed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from coffret.connectors.base import Connector
    from coffret.connectors.s3 import S3Connector


PART = 5 * MIB  # the least a server takes


async def uploads(connector: S3Connector) -> list[str]:
    """The uploads in parts that nobody ended."""
    answer = await connector._client.ask("list_multipart_uploads", "")
    return [upload["Key"] for upload in answer.get("Uploads", ())]


def calls(connector: Connector) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Each call of the contract."""
    return {
        "create": connector.create,
        "put": lambda: connector.put("index/a", [b"1"]),
        "put large": lambda: connector.put("index/a", [bytes(2 * MIB)]),
        "put if absent": lambda: connector.put("index/a", [b"1"], if_absent=True),
        "get": lambda: connector.get("index/a"),
        "get a range": lambda: connector.get("index/a", offset=1, length=1),
        "get into": lambda: connector.get_into("index/a", 0, memoryview(bytearray(1))),
        "get nothing": lambda: connector.get("index/a", offset=0, length=0),
        "list": lambda: listed(connector),
        "stat": lambda: connector.stat("index/a"),
        "delete": lambda: connector.delete("index/a"),
    }
