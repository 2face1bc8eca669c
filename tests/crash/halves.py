"""What each kind of storage can be left with by a process that dies within a call: each is an end that is set up here.

Below the connector's interface, where the call is made of steps: of system calls, requests, or a transaction.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from coffret.connectors import httpbody, local, localfiles, s3, s3client, sftpfiles, sftpnames, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coffret.connectors.base import Buffer, Connector

# Of the 256 folders of packs.
_FOLDERS_MADE = 100
# Between a lock file of SQLite's, 32 KiB, and a page.
_BEYOND_WAL_BYTES = 40_000


def die() -> None:
    """End here and now."""
    os.kill(os.getpid(), signal.SIGKILL)


def replace(owner: Any, **parts: Any) -> None:
    """Give a module or class other parts, for as long as this process lives."""
    for name, part in parts.items():
        assert hasattr(owner, name), name
        setattr(owner, name, part)


# Local ----------------------------------------------------------------------------------------------------------------


def cut_file(connector: Connector, method: str) -> None:
    """Half of a file is written; of the folders of a new repository some are made."""

    def write(fd: int, body: Sequence[Buffer]) -> None:
        data = b"".join(body)
        os.write(fd, data[: len(data) // 2])
        die()

    replace(localfiles, write=write)
    if method == "create":
        replace(local, os=_Folders())


class _Folders:
    """`os`, with which a process makes some folders, and no more."""

    def __init__(self) -> None:
        self._made = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mkdir(self, *arguments: Any, **options: Any) -> None:
        self._made += 1
        if self._made > _FOLDERS_MADE:
            die()
        os.mkdir(*arguments, **options)


def leave_unnamed(connector: Connector, method: str) -> None:
    """The file is whole, and has no name but the one in tmp/."""
    replace(localfiles, give_name=lambda *_: die())


def leave_unflushed(connector: Connector, method: str) -> None:
    """All is done, but that the folder was not flushed: where power stays on, that is no difference."""
    replace(localfiles, sync_folder=lambda *_: die())


def leave_two_names(connector: Connector, method: str) -> None:
    """The file has its name, and the one in tmp/ too, if it was linked; its folder was not flushed."""
    give_name = localfiles.give_name

    def give(source: str, target: str, root: int, if_absent: bool) -> None:
        give_name(source, target, root, if_absent)
        die()

    replace(localfiles, give_name=give)


# SFTP -----------------------------------------------------------------------------------------------------------------


def cut_remote_file(connector: Connector, method: str) -> None:
    """The server has half of a file; or some of the folders."""
    begin_write, written = sftpfiles.OpenFile.begin_write, sftpfiles.OpenFile.written
    make_folder, made = sftpfiles.Files.make_folder, 0

    def begin_half(self: sftpfiles.OpenFile, piece: Buffer, offset: int) -> asyncio.Future[Any]:
        return begin_write(self, piece[: len(piece) // 2], offset)

    async def half_written(self: sftpfiles.OpenFile, answer: asyncio.Future[Any]) -> None:
        await written(self, answer)
        die()

    async def make(self: sftpfiles.Files, name: str) -> None:
        nonlocal made
        made += 1
        if method == "create" and made > _FOLDERS_MADE:
            die()
        await make_folder(self, name)

    replace(sftpfiles.OpenFile, begin_write=begin_half, written=half_written)
    replace(sftpfiles.Files, make_folder=make)


def leave_unnamed_remotely(connector: Connector, method: str) -> None:
    """The server has the whole file, under its name in tmp/."""

    async def give(*_: Any) -> None:
        die()

    replace(sftpnames.Naming, give=give)


def leave_two_names_remotely(connector: Connector, method: str) -> None:
    """The file has its name, and the one in tmp/ too."""

    async def move(self: sftpfiles.Files, source: str, target: str) -> bool:
        await self.link(source, target)
        die()
        return True

    replace(sftpfiles.Files, move_if_absent=move)


# S3 -------------------------------------------------------------------------------------------------------------------


def cut_request(connector: Connector, method: str) -> None:
    """Half of a body has gone out when the connection ends."""

    async def send(self: httpbody.Body) -> bytes:
        if self._begun:
            await asyncio.sleep(0.02)  # what was given to the connection goes out
            die()
        self._begun = True
        data = b"".join(self._views)
        return data[: len(data) // 2]

    replace(httpbody.Body, __anext__=send)


def leave_upload(connector: Connector, method: str) -> None:
    """An object that goes in parts: all are there, and it is never completed (see `all_in_parts`)."""
    ask = s3client.Client.ask

    async def ask_or_die(self: s3client.Client, operation: str, where: str, **parameters: Any) -> Any:
        if operation == "complete_multipart_upload":
            die()
        return await ask(self, operation, where, **parameters)

    replace(s3client.Client, ask=ask_or_die)


def all_in_parts() -> None:
    """In this process objects of any size are large ones, for S3."""
    replace(s3, S3Connector=partial(s3.S3Connector, single_bytes=1))


# SQLite ---------------------------------------------------------------------------------------------------------------


def leave_uncommitted(connector: Connector, method: str) -> None:
    """All is written, in a transaction that is never committed; or there is a file, and no table in it."""
    writing = sqlite.SQLiteConnector._writing

    @contextmanager
    def write(self: sqlite.SQLiteConnector) -> Iterator[Any]:
        with writing(self) as connection:
            yield connection
            die()

    replace(sqlite.SQLiteConnector, _writing=write)
    if method == "create":
        replace(sqlite, _make_tables=lambda connection: die())


def cut_commit(connector: Connector, method: str) -> None:
    """The kernel lets SQLite write half a page of the commit, and no more."""
    assert isinstance(connector, sqlite.SQLiteConnector)
    _limit_files(_size_of(connector.places[1]) + _BEYOND_WAL_BYTES)


def cut_checkpoint(connector: Connector, method: str) -> None:
    """From now on half of the file can be written: SQLite dies when it brings into it what was committed."""
    assert isinstance(connector, sqlite.SQLiteConnector)
    _limit_files(_size_of(connector.places[0]) // 2)


def _size_of(path: os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _limit_files(size_bytes: int) -> None:
    """Let the kernel cut the write that goes beyond, and kill whoever tries to write on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


# What each kind of storage can be left with by a process that dies within a call.
HALVES: dict[str, dict[str, Callable[[Connector, str], None]]] = {
    "local": {
        "cut": cut_file,
        "unnamed": leave_unnamed,
        "two names": leave_two_names,
        "unflushed": leave_unflushed,
    },
    "sftp": {"cut": cut_remote_file, "unnamed": leave_unnamed_remotely, "two names": leave_two_names_remotely},
    "s3": {"cut": cut_request, "unfinished": leave_upload},
    "sqlite": {"cut": cut_commit, "uncommitted": leave_uncommitted},
}
