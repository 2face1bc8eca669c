"""Reading the folders of a server: whole, although they change meanwhile, in as few round trips as it allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

from coffret.connectors.sftpfiles import FOLDER, at_once

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import asyncssh

    from coffret.connectors.sftpfiles import Files

T = TypeVar("T")
# Entries of a folder that are read before the server is held to have answered.
_SCAN_BATCH = 1000
_SCANS = 4
# How many pieces of a folder are asked for at once, at first and at most. OpenSSH's are of 100 entries, and one more
# answer tells of the end: the 256 folders of packs come in one round trip.
_FIRST_PIECES, _MOST_PIECES, _PIECE_ENTRIES = 4, 16, 100


async def scan(files: Files, folder: str) -> list[asyncssh.SFTPName]:
    """What is in a folder, ascending by name as paths compare: "a-b" before what is in the folder "a".

    A name that is there all the time comes exactly once. A server hands out a folder piece by piece, and on some
    file systems a file that is replaced meanwhile moves to where the reading has been: so a folder that changed is
    read again.

    :raises Refusal: NotFound if there is no such folder
    """
    found: dict[bytes, asyncssh.SFTPName] = {}
    for _ in range(_SCANS):
        entries, whole = await _scan_once(files, folder)
        found.update((cast("bytes", entry.filename), entry) for entry in entries)
        if whole:
            break
    return sorted(found.values(), key=_order)


async def _scan_once(files: Files, folder: str) -> tuple[list[asyncssh.SFTPName], bool]:
    """The entries as one reading gives them, and whether nothing can be missing."""
    if files.session.in_order:
        entries, after, _ = await _read_in_order(files, folder)
    else:
        entries, after = await _read(files, folder), None
    if len(entries) <= _PIECE_ENTRIES:
        return entries, True
    after = after or await files.attributes(folder, follow=True)
    return entries, after is not None and after.mtime == _time_before(entries)


def _time_before(entries: list[asyncssh.SFTPName]) -> int | None:
    """When a folder was changed last, by its own entry, which was read at the beginning."""
    return next((entry.attrs.mtime for entry in entries if entry.filename == b"."), None)


async def _read(files: Files, folder: str) -> list[asyncssh.SFTPName]:
    scanner, entries = files.session.sftp.scandir(files.path(folder)), []

    async def some() -> list[asyncssh.SFTPName]:
        batch = []
        async for entry in scanner:
            batch.append(entry)
            if len(batch) == _SCAN_BATCH:
                break
        return batch

    while batch := await files.session.ask(some()):
        entries += batch
    return entries


async def scan_in_order(files: Files, folder: str, asked: Callable[[], None]) -> tuple[list[asyncssh.SFTPName], bool]:
    """`scan` of a server that answers in order; and whether all of it was asked for when `asked` was called.

    :raises Refusal: NotFound if there is no such folder
    """
    entries, after, in_one_go = await _read_in_order(files, folder, asked, _MOST_PIECES)
    if len(entries) > _PIECE_ENTRIES and (after is None or after.mtime != _time_before(entries)):
        return await scan(files, folder), False
    return sorted(entries, key=_order), in_one_go


async def _read_in_order(
    files: Files, folder: str, asked: Callable[[], None] = lambda: None, first_pieces: int = _FIRST_PIECES
) -> tuple[list[asyncssh.SFTPName], asyncssh.SFTPAttrs | None, bool]:
    """The same, by requests that do not wait for each other; the folder's attributes afterwards; whether in one go.

    That is two round trips instead of four, and more for large folders. `asked` is called after the first go is sent.
    """
    import asyncssh

    # asyncssh's own way is one request after the other; below it are the requests themselves.
    session = files.session
    handler: Any = session.sftp._handler
    handle = await session.ask(_request(handler.opendir, files.path(folder)))
    pieces: list[list[asyncssh.SFTPName]] = []
    after: asyncssh.SFTPAttrs | None = None
    at_end = False

    async def read(number: int) -> None:
        nonlocal at_end
        try:
            pieces[number], ended = await handler.readdir(handle)
            at_end = at_end or ended
        except asyncssh.SFTPEOFError:
            at_end = True

    async def look() -> None:
        nonlocal after
        after = await files.attributes(folder, follow=True)

    async def tell() -> None:
        asked()

    count, goes = first_pieces, 0
    try:
        while not at_end:
            goes += 1
            numbers = range(len(pieces), len(pieces) + count)
            pieces.extend([] for _ in numbers)
            await at_once([*(session.ask(read(number)) for number in numbers), look(), tell()])
            count = min(2 * count, _MOST_PIECES)
    finally:
        if not session.lost:
            session.release(session.ask(_request(handler.close, handle)))
    return [entry for piece in pieces for entry in piece], after, goes == 1


async def _request(send: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """One request, which begins nothing that is not awaited, should the connection be lost before."""
    return await send(*arguments)


def _order(entry: asyncssh.SFTPName) -> bytes:
    name = cast("bytes", entry.filename)
    return name + b"/" if entry.attrs.type == FOLDER else name
