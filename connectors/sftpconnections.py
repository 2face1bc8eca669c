"""The SSH connections of a repository over SFTP: opened when needed, watched, shared, replaced when they break.

Several connections, since one is held to the speed of one core of cryptography and to one window of 2 MiB a round trip.
Calls that move much get one each, up to the limit; small ones share what is open, rather than wait for a login.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from coffret.connectors.errors import ConnectionLost, ConnectorError
from coffret.connectors.sftperrors import Refusal, kind_of
from coffret.connectors.sftphandles import Handles
from coffret.connectors.sftplogin import Login, start_sftp
from coffret.connectors.sftpsending import send_quickly

if TYPE_CHECKING:
    from collections.abc import Coroutine

    import asyncssh

    from coffret.connectors.sftplogin import Address

T = TypeVar("T")
# A server that answers nothing at all for so long, with requests waiting, is given up (s). An fsync of a large object
# on a slow disk, or a piece on a slow line that others share, may take a minute. A deadline for each request would end
# slow lines; this one ends what stands still.
SILENCE_S = 120.0
# How long clearing up may take, also after a cancellation (s); what is left is cleared up later.
_CLEAR_UP_S = 5.0
# What one request writes. OpenSSH takes twice as much, but needs 15 % less CPU for each byte of half of it; below, each
# request counts.
_WRITE_BYTES = 128 << 10
# After a further connection was refused, the others do for so long (s).
_NO_MORE_S = 60.0


class Session:
    """One SSH connection with its SFTP session."""

    def __init__(self, sftp: asyncssh.SFTPClient, connection: asyncssh.SSHClientConnection, address: Address) -> None:
        self.sftp, self._connection, self._address = sftp, connection, address
        self._loop = asyncio.get_running_loop()
        self.read_bytes = sftp.limits.max_read_len
        self.write_bytes = min(sftp.limits.max_write_len, _WRITE_BYTES)
        #: OpenSSH's server answers requests strictly one after the other, so that they need not wait for each other.
        #: (Its sshd may have another at work for it, which does not offer what only OpenSSH's has.)
        self.in_order = "OpenSSH" in str(connection.get_extra_info("server_version", "")) and bool(
            getattr(sftp._handler, "_supports_lsetstat", False)
        )
        #: Whether links are offered; asyncssh tells of it by refusing one.
        self.links = bool(getattr(sftp._handler, "_supports_hardlink", True))
        #: Sends what is written from where it lies, if that can be.
        self.sending = send_quickly(sftp, connection)
        #: Packs that are open here.
        self.handles = Handles(sftp.limits.max_open_handles)
        #: Calls of the connector at work here, and those of them that move much.
        self.calls = self.large_calls = 0
        self._lost = ""
        self._waiting, self._heard_at = 0, 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._timer = self._loop.call_later(SILENCE_S / 4, self._watch)

    @property
    def lost(self) -> bool:
        """Whether it can't be used any more."""
        return bool(self._lost) or self._connection.is_closed()

    async def ask(self, request: Coroutine[Any, Any, T]) -> T:
        """The answer to one request.

        :raises Refusal: if it is an error
        :raises ConnectionLost: if none came
        """
        import asyncssh
        from asyncssh.packet import PacketDecodeError

        if self.lost:
            request.close()
            raise self._lost_error()
        if not self._waiting:
            self._heard_at = self._loop.time()
        self._waiting += 1
        try:
            answer = await request
        except (asyncssh.Error, OSError, EOFError, PacketDecodeError) as error:
            self._heard_at = self._loop.time()
            kind = kind_of(error)
            if kind is not ConnectionLost:
                raise Refusal(kind, str(error) or type(error).__name__) from error
            self.abandon(str(error) or type(error).__name__)
            raise self._lost_error() from error
        else:
            self._heard_at = self._loop.time()
            return answer
        finally:
            self._waiting -= 1

    def abandon(self, reason: str) -> None:
        """Use this connection no more; whoever waits for an answer gets ConnectionLost."""
        self._timer.cancel()
        if not self._lost:
            self._lost = reason
            self._connection.abort()

    def later(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[None]:
        """Do something that nobody needs the result of, and whose failure does no harm; a task to wait for it."""
        return self._begin(work, self._tasks)

    def release(self, closing: Coroutine[Any, Any, object]) -> None:
        """Close a handle, some time: the server does when the session ends."""
        self._begin(closing, self._closings)

    def _begin(self, work: Coroutine[Any, Any, object], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        async def do() -> None:
            with suppress(Refusal, ConnectorError):
                await work

        task = self._loop.create_task(do())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    async def clear_up(self, work: Coroutine[Any, Any, object]) -> None:
        """Do something even if the caller has been cancelled, and wait for it, but not for long."""
        task = self.later(work)
        with anyio.CancelScope(shield=True):
            await asyncio.wait((task,), timeout=_CLEAR_UP_S)

    async def close(self) -> None:
        """End the connection, after what was left for later."""
        with anyio.CancelScope(shield=True):
            if self._tasks and not self.lost:
                await asyncio.wait(self._tasks, timeout=_CLEAR_UP_S)
            if not self.lost:
                self.sftp.exit()
                self._connection.close()
            with anyio.move_on_after(_CLEAR_UP_S):
                await self._connection.wait_closed()
        self.abandon("closed")
        for task in (*self._tasks, *self._closings):
            task.cancel()

    def _watch(self) -> None:
        silent_s = self._loop.time() - self._heard_at
        if self._waiting and silent_s > SILENCE_S:
            self.abandon(f"no answer for {silent_s:.0f} s")
        elif not self._connection.is_closed():
            self._timer = self._loop.call_later(SILENCE_S / 4, self._watch)

    def _lost_error(self) -> ConnectionLost:
        return ConnectionLost(f"{self._address}: the connection is lost: {self._lost or 'closed by the server'}")


class Connections:
    """Up to `limit` sessions of one server."""

    def __init__(self, login: Login, limit: int) -> None:
        self.login, self.limit = login, limit
        #: What the server did not allow.
        self.note = ""
        self._sessions: list[Session] = []
        self._first = anyio.Lock()
        self._expecting = self._closing = False
        # Those that are being opened, by themselves: who waits for one may be cancelled while others do too.
        self._opening: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._failures, self._failure = 0, ConnectorError()
        self._no_more_until = 0.0

    async def session(self, large: bool, *, reads: bool = False) -> Session:
        """A session to use; a call that moves much does not share one while there may be more.

        One that reads does not wait for another to be opened, but leaves it to those that come next: a login takes
        eleven round trips, and our own window is wide enough for several to share it.

        :raises ConnectorError: as `Login.connect`
        """
        begun = False
        while True:
            await self._have_one()
            usable = self._usable()
            if not large or not all(session.large_calls for session in usable):
                break
            if not begun and self._may_open():
                begun = True
                self._begin_another()
            if reads or not self._opening:
                break
            await self._changed.wait()
        return min(usable, key=lambda session: (session.large_calls, session.calls))

    async def _have_one(self) -> None:
        """See that there is a session: one login at a time, until one succeeds. A wrong password is given once."""
        failures = self._failures
        async with self._first:
            if self._closing:
                raise ConnectionLost("the repository is being closed")
            if self._usable():
                return
            if failures != self._failures:  # the one before us failed while we waited
                raise type(self._failure)(str(self._failure)) from self._failure
            try:
                await self._open()
            except ConnectorError as error:
                self._failures, self._failure = self._failures + 1, error
                raise
            self._open_expected()

    def changed(self) -> None:
        """A session is free again, or there is another: for those who wait for one."""
        self._changed.set()
        self._changed.clear()

    def expect(self) -> None:
        """Open all there may be, once one is open: calls that move much will come, and are not to wait then."""
        self._expecting = True
        if self._usable():
            self._open_expected()

    def _open_expected(self) -> None:
        while self._expecting and self._may_open():
            self._begin_another()
        self._expecting = False

    def forget(self, name: str) -> None:
        """An object is changed: what is open of it is not read any more."""
        for session in self._sessions:
            session.handles.drop(name)

    def _begin_another(self) -> None:
        another = asyncio.get_running_loop().create_task(self._open_another())
        self._opening.add(another)
        another.add_done_callback(self._opened)

    async def close(self) -> None:
        """Close all of them, for good."""
        self._closing = True
        for task in tuple(self._opening):
            task.cancel()
        with anyio.CancelScope(shield=True):
            if self._opening:
                await asyncio.wait(self._opening)
        sessions, self._sessions = self._sessions, []
        for session in sessions:
            await session.close()

    async def _open_another(self) -> None:
        """Open one more than there are; where that fails, whatever of, the others do for a while."""
        try:
            await self._open()
        except Exception as error:
            self.note = f"{self.login.address}: no more than {len(self._usable())} connections: {error}"
            self._no_more_until = anyio.current_time() + _NO_MORE_S

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        self.changed()

    def _usable(self) -> list[Session]:
        for session in self._sessions:
            if session.lost:
                session.abandon("closed by the server")
        self._sessions = [session for session in self._sessions if not session.lost]
        return self._sessions

    def _may_open(self) -> bool:
        room = len(self._sessions) + len(self._opening) < self.limit
        return room and not self._closing and anyio.current_time() > self._no_more_until

    async def _open(self) -> Session:
        connection = await self.login.connect()
        try:
            sftp = await start_sftp(connection, self.login.address)
            session = Session(sftp, connection, self.login.address)
        except BaseException:
            connection.abort()
            raise
        self._sessions.append(session)
        return session
