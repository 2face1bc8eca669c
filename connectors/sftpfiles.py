"""Files and folders of one server, by requests that do not wait for each other where they need not."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import anyio

from coffret.connectors.errors import InvalidRange, NotFound, NotStorage
from coffret.connectors.sftperrors import Refusal, Unsupported

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence

    import asyncssh

    from coffret.connectors.base import Buffer
    from coffret.connectors.limit import Pace
    from coffret.connectors.sftpconnections import Session

# The types of files that SFTP knows.
REGULAR, FOLDER = 1, 2
# How much of one object is under way at a time (bytes). To a server: what OpenSSH's window takes, 2 MiB, and as much
# again for the time until its answers are here. From a server: all that a restore asks for at once. Servers that answer
# no more than 16 KiB get 256 requests at a time.
_WRITES_BYTES, _READS_BYTES = 4 << 20, 8 << 20
_MOST_REQUESTS = 256
_FOLDERS_AT_A_TIME = 64


class OpenFile:
    """A file on the server, closed once: OpenSSH gives the number of a closed handle to the next file."""

    def __init__(self, session: Session, file: asyncssh.SFTPClientFile) -> None:
        self._session, self._file, self._closed = session, file, False

    def begin_write(self, piece: Buffer, offset: int) -> asyncio.Future[Any]:
        """Send a piece, which stays as it is until the answer is there; `written` waits for that."""
        sending = self._session.sending
        if sending is None:
            return asyncio.ensure_future(self._file.write(cast("bytes", piece), offset))
        return sending.begin_write(cast("bytes", self._file._handle), offset, piece)

    async def written(self, answer: asyncio.Future[Any]) -> None:
        """Wait until a piece is written."""
        sending = self._session.sending
        await self._session.ask(_end(answer) if sending is None else sending.written(answer))

    async def read(self, length: int, offset: int) -> bytes:
        """At most `length` bytes, b"" at the end of the file."""
        return cast("bytes", await self._session.ask(self._file.read(length, offset)))

    async def attributes(self) -> asyncssh.SFTPAttrs:
        return await self._session.ask(self._file.stat())

    async def sync(self) -> bool:
        """Wait until the file is on the server's disk; False if the server can't."""
        try:
            await self._session.ask(self._file.fsync())
        except Refusal as refusal:
            if refusal.kind is not Unsupported:
                raise
            return False
        return True

    async def close(self) -> None:
        """Close it; what its writing failed of at last is raised here."""
        if not self._closed:
            self._closed = True
            await self._session.ask(self._file.close())

    def close_later(self) -> None:
        """Close it without waiting for the answer."""
        if not self._closed and not self._session.lost:
            self._session.release(self.close())


class Files:
    """What a session does to the files below `root` (a path on the server). Names are relative to it, "" is it.

    Methods raise Refusal for what the server refuses, and ConnectionLost.
    """

    def __init__(self, session: Session, root: bytes, pace: Pace | None) -> None:
        self.session, self._root, self._pace = session, root, pace
        self._sftp = session.sftp

    def path(self, name: str) -> bytes:
        """The path of a name on the server."""
        if not name:
            return self._root
        return self._root.rstrip(b"/") + b"/" + name.encode()

    async def open(self, name: str) -> OpenFile:
        """Open a file to read."""
        return OpenFile(self.session, await self._open(name, "rb"))

    async def write(self, name: str, body: Sequence[Buffer]) -> bool:
        """Write a new file and make it durable; False if the server can't do that."""
        file = OpenFile(self.session, await self._open(name, "xb"))
        answers: deque[asyncio.Future[Any]] = deque()
        try:
            await self._send(file, body, answers)
            return await self._finish(file, answers)
        except BaseException:
            file.close_later()
            raise
        finally:
            for answer in answers:
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()  # of several failures one is told

    async def _open(self, name: str, mode: str) -> asyncssh.SFTPClientFile:
        import asyncssh

        async def opening() -> object:  # which begins nothing that is not awaited, should the connection be lost
            # Without a block size, one call is one request.
            return await self._sftp.open(self.path(name), mode, asyncssh.SFTPAttrs(permissions=0o600), block_size=0)

        return cast("asyncssh.SFTPClientFile", await self.session.ask(opening()))

    async def _send(self, file: OpenFile, body: Sequence[Buffer], answers: deque[asyncio.Future[Any]]) -> None:
        """Send an object in pieces; what has not been answered in the end is left in `answers`."""
        width = self._width(sum(map(len, body)), self.session.write_bytes, _WRITES_BYTES)
        for offset, piece in pieces(body, self.session.write_bytes):
            if self._pace is not None:
                await self._pace.upload.take(len(piece))
            while answers and (len(answers) >= width or answers[0].done()):
                await file.written(answers[0])
                answers.popleft()
            answers.append(file.begin_write(piece, offset))

    async def _finish(self, file: OpenFile, answers: deque[asyncio.Future[Any]]) -> bool:
        """Wait for what has been sent to be written, make it durable and close it; False if it can't be durable.

        A server that answers in order is asked for all of it at once: a round trip instead of three.
        """
        synced = False

        async def wait() -> None:
            for answer in answers:
                await file.written(answer)

        async def sync() -> None:
            nonlocal synced
            synced = await file.sync()

        if self.session.in_order:
            await at_once([wait(), sync(), file.close()])
        else:
            await wait()
            await sync()
            await file.close()
        return synced

    async def read_into(self, file: OpenFile, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of the file.

        :raises Refusal: InvalidRange if the file ends before
        """
        at_most = self.session.read_bytes
        starts = iter(range(0, len(buffer), at_most))

        async def read() -> None:
            for start in starts:
                at, end = start, min(start + at_most, len(buffer))
                if self._pace is not None:
                    await self._pace.download.take(end - at)
                while at < end:  # a server may answer with less
                    data = await file.read(end - at, offset + at)
                    if not data:
                        raise Refusal(InvalidRange, f"it ends before byte {offset + end}")
                    buffer[at : at + len(data)] = data
                    at += len(data)

        await in_parallel(read, self._width(len(buffer), at_most, _READS_BYTES))

    async def attributes(self, name: str, *, follow: bool = False) -> asyncssh.SFTPAttrs | None:
        """What the server tells of a file, a link itself unless `follow`; None if there is none of this name."""
        asked = self._sftp.stat(self.path(name)) if follow else self._sftp.lstat(self.path(name))
        try:
            return await self.session.ask(asked)
        except Refusal as refusal:
            if refusal.kind is not NotFound:
                raise
            return None

    async def remove(self, name: str) -> None:
        """Remove a file."""
        await self.session.ask(self._sftp.remove(self.path(name)))

    async def link(self, source: str, target: str) -> None:
        """Give a file a second name, which must be free."""
        await self.session.ask(self._sftp.link(self.path(source), self.path(target)))

    async def move_if_absent(self, source: str, target: str) -> bool:
        """Give a file another name, which must be free, in one go; whether it still has the old one too.

        Where the new name is refused the file is removed all the same.
        """
        left = True

        async def remove() -> None:
            nonlocal left
            with suppress(Refusal):
                await self.remove(source)
                left = False

        await at_once([self.link(source, target), remove()])
        return left

    async def rename(self, source: str, target: str) -> None:
        """Rename a file; it depends on the server what becomes of a taken name."""
        await self.session.ask(self._sftp.rename(self.path(source), self.path(target)))

    async def replace(self, source: str, target: str) -> None:
        """Rename a file over another, in one step."""
        await self.session.ask(self._sftp.posix_rename(self.path(source), self.path(target)))

    async def make_folder(self, name: str) -> None:
        """Make a folder; it may exist."""
        import asyncssh

        try:
            await self.session.ask(self._sftp.mkdir(self.path(name), asyncssh.SFTPAttrs(permissions=0o700)))
        except Refusal:
            status = await self.attributes(name, follow=True)
            if status is None or status.type != FOLDER:
                raise

    async def make_root(self) -> None:
        """Make the root and the folders above it; they may exist."""
        import asyncssh

        missing, path = [], self._root
        while path and await self._is_missing(path):
            missing.append(path)
            path = path.rpartition(b"/")[0]
        for path in reversed(missing):
            try:
                await self.session.ask(self._sftp.mkdir(path, asyncssh.SFTPAttrs(permissions=0o700)))
            except Refusal:
                if await self._is_missing(path):  # and not made by somebody else meanwhile
                    raise
        status = await self.attributes("", follow=True)
        if status is None or status.type != FOLDER:
            raise Refusal(NotStorage, "it is not a folder")

    async def _is_missing(self, path: bytes) -> bool:
        try:
            await self.session.ask(self._sftp.stat(path))
        except Refusal as refusal:
            if refusal.kind is not NotFound:
                raise
            return True
        return False

    async def make_folders(self, names: Sequence[str]) -> None:
        """Make many folders, those above before those below."""
        by_depth: dict[int, list[str]] = {}
        for name in names:
            by_depth.setdefault(name.count("/"), []).append(name)
        for depth in sorted(by_depth):
            left = iter(by_depth[depth])

            async def make(left: Iterator[str] = left) -> None:
                for name in left:
                    await self.make_folder(name)

            await in_parallel(make, min(len(by_depth[depth]), _FOLDERS_AT_A_TIME))

    async def is_full(self, size_bytes: int) -> bool:
        """Whether the server's disk has no room for so many bytes or for one more file; False if it can't tell."""
        try:
            status = await self.session.ask(self._sftp.statvfs(self._root))
        except Refusal:
            return False
        return status.bavail * status.frsize < size_bytes or (status.files > 0 and status.favail == 0)

    @staticmethod
    def _width(size_bytes: int, piece_bytes: int, under_way_bytes: int) -> int:
        """How many requests of a transfer are under way at a time."""
        most = min(max(4, under_way_bytes // piece_bytes), _MOST_REQUESTS)
        return max(1, min(-(-size_bytes // piece_bytes), most))


def pieces(body: Sequence[Buffer], limit: int) -> Iterator[tuple[int, Buffer]]:
    """Cut the concatenation of `body` into pieces of `limit` bytes with their offsets; copy only what spans parts."""
    offset, gathered, gathered_bytes = 0, list[memoryview](), 0
    for part in body:
        view = memoryview(part).cast("B") if len(part) else memoryview(b"")
        while len(view):
            piece = view[: limit - gathered_bytes]
            gathered.append(piece)
            gathered_bytes += len(piece)
            view = view[len(piece) :]
            if gathered_bytes == limit:
                yield offset, _joined(gathered)
                offset, gathered, gathered_bytes = offset + limit, [], 0
    if gathered:
        yield offset, _joined(gathered)


async def in_parallel(work: Callable[[], Awaitable[None]], count: int) -> None:
    """Run `work` so many times at once; raise what the first failed of, when all have ended."""
    if count == 1:
        await work()
        return
    failures: list[Exception] = []
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            try:
                await work()
            except Exception as error:
                failures.append(error)
                tasks.cancel_scope.cancel()

        for _ in range(count):
            tasks.start_soon(run)
    if failures:
        raise failures[0]


async def at_once(requests: Sequence[Coroutine[Any, Any, object]]) -> None:
    """Send requests in this order without waiting, then wait for all; raise what the first of them failed of."""
    failures: list[Exception | None] = [None] * len(requests)

    async def send(number: int, request: Coroutine[Any, Any, object]) -> None:
        try:
            await request
        except Exception as error:
            failures[number] = error

    async with anyio.create_task_group() as tasks:
        for number, request in enumerate(requests):
            tasks.start_soon(send, number, request)
    for failure in failures:
        if failure is not None:
            raise failure


async def _end(answer: asyncio.Future[Any]) -> None:
    await answer


def _joined(gathered: list[memoryview]) -> Buffer:
    return gathered[0] if len(gathered) == 1 else b"".join(gathered)
