"""What bad networks do between a served repository and its client, and what the two agree on."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from tests.connectors.proxy import Proxy
from tests.connectors.s3.tools import calls
from tests.connectors.test_conformance import MIB, aligned, listed

from coffret.connectors.base import READ_ONLY
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    NotFound,
    PermissionRefused,
)
from coffret.connectors.registry import Transfers, connect
from coffret.connectors.retry import RetryConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.server.serving import Serving

pytestmark = pytest.mark.anyio


class TestNetworks:
    """What bad networks do between the two."""

    @pytest.fixture
    async def proxy(self, server: Serving) -> AsyncIterator[Proxy]:
        async with Proxy(server.port) as proxy:
            yield proxy

    async def test_silence_ends(self, server: Serving, proxy: Proxy) -> None:
        async with server.connector(port=proxy.port, stall_s=0.3) as connector:
            await connector.put("index/a", [b"123"])
            proxy.blackhole = True
            for name, call in calls(connector).items():
                with pytest.raises(ConnectionLost, match="no answer"):
                    await call()
                assert name
            body = aligned(bytes(4 * MIB))
            with pytest.raises(ConnectionLost):
                await connector.put("index/b", [body])
            body[:] = b"1" * len(body)  # the buffer is its owner's again

    async def test_a_lost_answer_is_found_out(self, server: Serving, proxy: Proxy) -> None:
        name = f"snapshots/{os.urandom(16).hex()}"
        inner = server.connector(port=proxy.port)
        async with RetryConnector(inner, first_wait_s=0.01, on_retry=lambda *_: _heal(proxy)) as connector:
            await connector.put("index/a", [b"1"])
            proxy.cut_answers = True
            await connector.put(name, [b"mine"], if_absent=True)
            proxy.cut_answers = True
            with pytest.raises(AlreadyExists):
                await connector.put(name, [b"other"], if_absent=True)
        assert (server.path / name).read_bytes() == b"mine"

    async def test_cut_anywhere(self, server: Serving, proxy: Proxy) -> None:
        data = os.urandom(MIB)
        async with server.connector(port=proxy.port) as connector:
            await connector.put("index/large", [data])
            for cut in (10, 400, 100_000, 700_000):
                proxy.cut_after_bytes = cut
                proxy.cut()
                with pytest.raises(ConnectionLost):
                    await connector.get("index/large")
                with pytest.raises(ConnectionLost):
                    await connector.put("index/none", [data], if_absent=True)
            proxy.cut_after_bytes = None
            proxy.cut()
            with pytest.raises(NotFound):
                await connector.get("index/none")
            assert await connector.get("index/large") == data

    async def test_a_connection_that_was_closed_meanwhile(self, server: Serving, proxy: Proxy) -> None:
        """By the server, or by a proxy that has waited for long: nobody notices."""
        async with RetryConnector(server.connector(port=proxy.port), first_wait_s=0.01) as connector:
            for name, call in calls(connector).items():
                if name != "create":
                    await connector.put("index/a", [b"12"])
                    proxy.cut()
                    with suppress(AlreadyExists):
                        await call()

    async def test_a_refusal_arrives_before_the_body_has_gone(self, server: Serving) -> None:
        async with server.connector(READ_ONLY) as connector:
            with pytest.raises(PermissionRefused, match="read-only"):
                await connector.put("packs/aa/large", [bytes(100 * MIB)])

    async def test_what_it_can_do_is_known_after_the_first_request(self, server: Serving) -> None:
        async with server.connector() as connector:
            await listed(connector)
            assert (connector.capabilities.parallel_puts, connector.capabilities.parallel_gets) == (3, 16)
            assert connector.capabilities.exclusive_puts
        chosen = server.connector()
        chosen.set_connections(7)
        async with chosen:
            await listed(chosen)
            assert (chosen.capabilities.parallel_puts, chosen.capabilities.parallel_gets) == (7, 7)

    async def test_limits(self, server: Serving) -> None:
        """Objects are moved piece by piece, and whole."""
        data = os.urandom(300_000)
        url = f"http://127.0.0.1:{server.port}/"
        file = server.folder / "token-limit"
        file.write_text(server.token())
        transfers = Transfers(upload=2e6, download=2e6)
        connector, _ = connect(url, {"token-file": str(file)}, transfers)
        async with connector:
            await connector.put("index/limited", [data])
            assert await connector.get("index/limited") == data


def _heal(proxy: Proxy) -> None:
    proxy.cut_answers = False
