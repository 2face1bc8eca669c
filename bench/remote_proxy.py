"""A TCP proxy that delays what passes through it, and is itself no bottleneck: a process with a thread a direction.

    python -m bench.remote_proxy --delay-ms 20 --to 7070

It prints its port and serves until its standard input ends. Bytes are under way for `--delay-ms` in each direction, in
order, as many at once as one end sends and the other takes: a line of any width. What a handshake of TCP would wait
for, a round trip, passes before a connection goes on. The proxy in `tests/connectors` does more and moves less: 0.2 to
0.4 GB/s where this moves 1.5.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_BUFFER_BYTES = 256 << 10
# What is under way in one direction of one connection at most: 20 ms of 1.6 GB/s.
_BUFFERS = 128
# What arrives within so long goes on together, at the end of it (s), as network cards do it: else messages of a few
# bytes cost this process, and both ends, more than what is measured.
_TICK_S = 0.0005
# As many buffers as one system call takes here.
_TOGETHER = 16
_HOST = "127.0.0.1"


class DelayingProxy:
    """The proxy as a process, for `to_port` on this host; its own port is `port`."""

    def __init__(self, to_port: int, delay_ms: float) -> None:
        arguments = [sys.executable, "-m", "bench.remote_proxy", "--delay-ms", str(delay_ms), "--to", str(to_port)]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            arguments, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, with all connections through it."""
        self._process.kill()
        self._process.communicate()


class _Direction:
    """Bytes from one socket to another, each `delay_s` late."""

    def __init__(self, source: socket.socket, target: socket.socket, delay_s: float) -> None:
        self._source, self._target, self._delay_s = source, target, delay_s
        # Fresh memory is dear: buffers are used again.
        self._free: deque[bytearray] = deque()
        self._room = threading.Semaphore(_BUFFERS)
        self._under_way: deque[tuple[float, bytearray, int]] = deque()
        self._sent = threading.Semaphore(0)

    def start(self) -> None:
        """Begin; both threads end when the source does or either side fails."""
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        length = 1
        while length:
            self._room.acquire()
            buffer = self._free.popleft() if self._free else bytearray(_BUFFER_BYTES)
            try:
                length = self._source.recv_into(buffer)
            except OSError:
                length = 0
            due = time.monotonic() + self._delay_s
            if self._delay_s:
                due += _TICK_S - due % _TICK_S
            self._under_way.append((due, buffer, length))
            self._sent.release()

    def _write(self) -> None:
        while True:
            self._sent.acquire()
            due, buffer, length = self._under_way.popleft()
            if (left_s := due - time.monotonic()) > 0:
                time.sleep(left_s)
            buffers, views, now = [buffer], [memoryview(buffer)[:length]], max(due, time.monotonic())
            while length and len(buffers) < _TOGETHER and self._under_way and self._under_way[0][0] <= now:
                self._sent.acquire()
                _, buffer, length = self._under_way.popleft()
                buffers.append(buffer)
                views.append(memoryview(buffer)[:length])
            try:
                self._send(views)
                if not length:
                    self._target.shutdown(socket.SHUT_WR)
                    return
            except OSError:
                with contextlib.suppress(OSError):
                    self._source.shutdown(socket.SHUT_RDWR)
                return
            self._free.extend(buffers)
            self._room.release(len(buffers))

    def _send(self, views: list[memoryview]) -> None:
        sent = self._target.sendmsg(views)
        for view in views:
            if sent < len(view):
                self._target.sendall(view[sent:])
            sent = max(0, sent - len(view))


def _connect(client: socket.socket, to_port: int, delay_s: float) -> None:
    """Begin to pass a connection on."""
    time.sleep(2 * delay_s)
    try:
        server = socket.create_connection((_HOST, to_port))
    except OSError:
        client.close()
        return
    for side in (client, server):
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _Direction(client, server, delay_s).start()
    _Direction(server, client, delay_s).start()


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(prog="bench.remote_proxy", description="Delay TCP connections.")
    parser.add_argument("--to", type=int, required=True, metavar="PORT", help="of this host")
    parser.add_argument("--delay-ms", type=float, required=True, help="in each direction")
    options = parser.parse_args()
    delay_s = options.delay_ms / 1000
    listener = socket.create_server((_HOST, 0), backlog=128)
    print(listener.getsockname()[1], flush=True)

    def serve() -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_connect, args=(client, options.to, delay_s), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
