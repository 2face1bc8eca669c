"""Bare loops: the same packs put and got by the storage's client library alone, or by Coffret's connector alone.

    python -m bench.remote_loops put --url s3+http://127.0.0.1:7070/bucket --folder REPOSITORY --connections 4
    python -m bench.remote_loops get --url sftp://127.0.0.1:2222/srv/repository --connector --uvloop

What is moved are the packs of a local repository (`--folder`), one a connection at a time, from and to memory. A bare
loop does the least that moves an object: no temporary names, nothing flushed, nothing verified, nothing tried again.
Credentials are as for `coffret`; for SFTP the user's own home is that of $HOME.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Move = Callable[["Pack"], Awaitable[None]]

# Of a pack, as a restore asks for it.
_RANGE_BYTES = 8 << 20
# asyncssh's own first choice moves less: see connectors/sftplogin.py.
_CIPHERS = ["aes128-gcm@openssh.com"]


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack in a local repository."""

    file: Path
    size_bytes: int

    @property
    def name(self) -> str:
        """What it is called in any repository."""
        return "/".join(self.file.parts[-3:])

    def read(self) -> bytes:
        """All of it, from the page cache."""
        return self.file.read_bytes()


async def _bare_s3(url: str, connections: int, is_put: bool, stack: AsyncExitStack) -> list[Move]:
    """aiobotocore with its defaults, but for what was measured to cost it speed."""
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    parts = urlsplit(url)
    bucket, _, prefix = parts.path.strip("/").partition("/")
    config = AioConfig(
        max_pool_connections=connections,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path", "payload_signing_enabled": parts.scheme == "s3+http"},
    )
    client = await stack.enter_async_context(
        get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=f"http://{parts.netloc}",
            aws_access_key_id=os.environ["S3_REPOSITORY_USER"],
            aws_secret_access_key=os.environ["S3_REPOSITORY_PASSWORD"],
            config=config,
        )
    )

    async def put(pack: Pack) -> None:
        await client.put_object(Bucket=bucket, Key=f"{prefix}/{pack.name}", Body=pack.read())

    async def get(pack: Pack) -> None:
        for begin in range(0, pack.size_bytes, _RANGE_BYTES):
            wanted = f"bytes={begin}-{begin + _RANGE_BYTES - 1}"
            answer = await client.get_object(Bucket=bucket, Key=f"{prefix}/{pack.name}", Range=wanted)
            await answer["Body"].read()

    return [put if is_put else get] * connections


async def _bare_sftp(url: str, connections: int, is_put: bool, stack: AsyncExitStack) -> list[Move]:
    """asyncssh with its defaults but for the cipher, a connection each."""
    import asyncssh

    parts = urlsplit(url)

    async def open_one() -> Move:
        connection = await stack.enter_async_context(
            asyncssh.connect(
                parts.hostname or "", parts.port or 22, username=parts.username or (), encryption_algs=_CIPHERS
            )
        )
        client = await stack.enter_async_context(connection.start_sftp_client())

        async def put(pack: Pack) -> None:
            async with client.open(f"{parts.path}/{pack.name}", "wb") as remote:
                await remote.write(pack.read())

        async def get(pack: Pack) -> None:
            async with client.open(f"{parts.path}/{pack.name}", "rb") as remote:
                for begin in range(0, pack.size_bytes, _RANGE_BYTES):
                    await remote.read(_RANGE_BYTES, begin)

        return put if is_put else get

    return [await open_one() for _ in range(connections)]


async def _connector(url: str, connections: int, is_put: bool, stack: AsyncExitStack) -> list[Move]:
    """Coffret's connector with the wrappers that every storage gets."""
    from coffret.connectors.registry import Transfers, connect

    connector, _ = connect(url, {}, Transfers(connections=connections))
    await stack.enter_async_context(connector)
    buffers = iter([memoryview(bytearray(_RANGE_BYTES)) for _ in range(connections)])

    def one(buffer: memoryview) -> Move:
        async def put(pack: Pack) -> None:
            await connector.put(pack.name, [pack.read()])

        async def get(pack: Pack) -> None:
            for begin in range(0, pack.size_bytes, _RANGE_BYTES):
                await connector.get_into(pack.name, begin, buffer[: pack.size_bytes - begin])

        return put if is_put else get

    return [one(next(buffers)) for _ in range(connections)]


async def _move(options: argparse.Namespace, packs: Sequence[Pack]) -> None:
    """Move all packs."""
    kind = "sftp" if options.url.startswith("sftp:") else "s3"
    make: Any = _connector if options.connector else {"s3": _bare_s3, "sftp": _bare_sftp}[kind]
    left = iter(packs)

    async def work(move: Move) -> None:
        for pack in left:
            await move(pack)

    async with AsyncExitStack() as stack:
        moves = await make(options.url, options.connections, options.what == "put", stack)
        async with asyncio.TaskGroup() as tasks:
            for move in moves:
                tasks.create_task(work(move))


def main(arguments: Sequence[str] | None = None) -> None:
    """Move the packs and say how many bytes they are."""
    parser = argparse.ArgumentParser(prog="bench.remote_loops", description="Put or get packs, and nothing else.")
    parser.add_argument("what", choices=("put", "get"))
    parser.add_argument("--url", required=True, help="as for coffret; the folders must be there")
    parser.add_argument("--folder", type=Path, required=True, help="a local repository with the packs")
    parser.add_argument("--connections", type=int, default=4, help="transfers at a time")
    parser.add_argument("--connector", action="store_true", help="by Coffret's connector instead of the library")
    parser.add_argument("--uvloop", action="store_true", help="on uvloop's event loop")
    options = parser.parse_args(arguments)
    loop_factory: Any = None
    if options.uvloop:
        import uvloop

        loop_factory = uvloop.new_event_loop
    packs = [Pack(file, file.stat().st_size) for file in sorted((options.folder / "packs").glob("*/*"))]
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_move(options, packs))
    print(sum(pack.size_bytes for pack in packs))


if __name__ == "__main__":
    main()
