"""Bare transfers beside `coffret server`: the same packs put and got over loopback, in turns.

    python -m bench.server                        24 packs of 32 MiB, three at a time, three rounds
    python -m bench.server --work /dev/shm        with the server's repository in memory

The bare server is aiohttp's, in a process of its own as Coffret's is: it reads a body and throws it away, and sends
ranges of the same bytes from memory. Its client puts whole packs and gets ranges of 8 MiB, as Coffret's does with all
that every storage gets around it; Coffret's server stores what it is sent, durably, and reads it from its files.
Without TLS. What is told are MB/s and CPU seconds of each round, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from bench.remote_servers import Server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Move = Callable[[str, bytes], Awaitable[None]]

_RANGE_BYTES = 8 << 20
_HOST = "127.0.0.1"


class BareServer(Server):
    """aiohttp's server, which keeps nothing."""

    def command(self) -> Sequence[str]:
        return [sys.executable, "-m", "bench.server", "--bare", str(self.port)]


class CoffretServer(Server):
    """`coffret server` on a folder, which anybody here may use."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "log")
        self._folder = folder

    def command(self) -> Sequence[str]:
        listen = f"{_HOST}:{self.port}"
        return [
            sys.executable, "-m", "coffret", "at", str(self._folder / "repository"), "server", "--no-auth",
            "--listen", listen,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return os.environ | {"XDG_STATE_HOME": str(self._folder / "state")}


def serve_bare(port: int) -> None:
    """Serve until killed."""
    from aiohttp import web

    kept = bytes(64 << 20)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "PUT":
            async for _ in request.content.iter_any():  # `read` would gather it, and takes twice as long
                pass
            return web.Response(status=204)
        first, last = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        return web.Response(status=206, body=kept[first : last + 1])

    async def run() -> None:
        listener = await asyncio.get_running_loop().create_server(web.Server(handle), _HOST, port)
        await listener.serve_forever()

    asyncio.run(run())


async def _bare(port: int, stack: AsyncExitStack) -> tuple[Move, Move]:
    """aiohttp's client with its defaults."""
    import aiohttp

    session = await stack.enter_async_context(aiohttp.ClientSession())
    base = f"http://{_HOST}:{port}/"

    async def put(name: str, body: bytes) -> None:
        async with session.put(base + name, data=body) as answer:
            answer.raise_for_status()

    async def get(name: str, body: bytes) -> None:
        for begin in range(0, len(body), _RANGE_BYTES):
            end = min(begin + _RANGE_BYTES, len(body))
            async with session.get(base + name, headers={"Range": f"bytes={begin}-{end - 1}"}) as answer:
                assert len(await answer.read()) == end - begin

    return put, get


async def _coffret(port: int, stack: AsyncExitStack) -> tuple[Move, Move]:
    """Coffret's connector with the wrappers that every storage gets."""
    from coffret.connectors.registry import Transfers, connect

    connector, _ = connect(f"http://{_HOST}:{port}/", {}, Transfers())
    await stack.enter_async_context(connector)
    await connector.create()
    buffers: list[memoryview] = []

    async def put(name: str, body: bytes) -> None:
        await connector.put(name, [body])

    async def get(name: str, body: bytes) -> None:
        buffer = buffers.pop() if buffers else memoryview(bytearray(_RANGE_BYTES))
        for begin in range(0, len(body), _RANGE_BYTES):
            await connector.get_into(name, begin, buffer[: len(body) - begin])
        buffers.append(buffer)

    return put, get


async def _timed(move: Move, packs: dict[str, bytes], connections: int, server: Server) -> tuple[float, float]:
    """MB/s of moving all packs, so many at a time, and the CPU seconds of both sides for each GB."""
    left = iter(packs.items())

    async def work() -> None:
        for name, body in left:
            await move(name, body)

    size_bytes = sum(map(len, packs.values()))
    begin, cpu_s = time.perf_counter(), time.process_time() + _cpu_s(server)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(connections):
            tasks.create_task(work())
    duration_s, cpu_s = time.perf_counter() - begin, time.process_time() + _cpu_s(server) - cpu_s
    return size_bytes / duration_s / 1e6, cpu_s / size_bytes * 1e9


def _cpu_s(server: Server) -> float:
    """What a server has used by now."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _compare(options: argparse.Namespace, folder: Path) -> None:
    packs: dict[str, bytes] = {}
    for _ in range(options.packs):
        body = os.urandom(options.pack_mib << 20)
        digest = blake3(body).hexdigest()
        packs[f"packs/{digest[:2]}/{digest}"] = body
    servers = {"bare": BareServer(folder / "bare.log"), "coffret": CoffretServer(folder)}
    ratios: dict[str, list[float]] = {"put": [], "get": []}
    try:
        async with AsyncExitStack() as stack:
            moves: dict[str, tuple[Move, Move]] = {}
            for name, open_client in (("bare", _bare), ("coffret", _coffret)):
                await asyncio.to_thread(servers[name].start)
                moves[name] = await open_client(servers[name].port, stack)
            for number in range(options.rounds):
                order = list(moves)[:: 1 if number % 2 else -1]
                for at, what in enumerate(("put", "get")):
                    found = {
                        name: await _timed(moves[name][at], packs, options.connections, servers[name]) for name in order
                    }
                    ratios[what].append(found["coffret"][0] / found["bare"][0])
                    told = (f"{name} {rate:.0f} MB/s, {cpu_s:.2f} CPU s/GB" for name, (rate, cpu_s) in found.items())
                    print(f"{what}: {'; '.join(told)}", flush=True)
    finally:
        for server in servers.values():
            server.kill()
    for what, shares in ratios.items():
        print(f"{what}: {statistics.median(shares):.2f} of bare ({', '.join(f'{share:.2f}' for share in shares)})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, or be the bare server."""
    parser = argparse.ArgumentParser(prog="bench.server", description="Packs over loopback, with Coffret and without.")
    parser.add_argument("--bare", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--packs", type=int, default=24, help="how many")
    parser.add_argument("--pack-mib", type=int, default=32, help="how large each is (MiB, 64 at most)")
    parser.add_argument("--connections", type=int, default=3, help="transfers at a time")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--work", type=Path, default=None, help="where the repository lies; default: temporary files")
    options = parser.parse_args(arguments)
    if options.bare is not None:
        serve_bare(options.bare)
        return
    folder = Path(tempfile.mkdtemp(prefix="coffret-bench-", dir=options.work))
    try:
        asyncio.run(_compare(options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
