"""Listing the objects below a folder of a server, ascending by name, with the folders that come next read ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.connectors.base import NAME, ObjectInfo
from coffret.connectors.errors import NotFound
from coffret.connectors.sftperrors import Refusal
from coffret.connectors.sftpfiles import FOLDER, REGULAR, in_parallel
from coffret.connectors.sftpscan import scan

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    import asyncssh

    from coffret.connectors.sftpfiles import Files

    Entries = list[tuple[str, asyncssh.SFTPAttrs]]

# Each folder costs some round trips; the 256 of packs, read one after the other, would take a minute at 50 ms.
_FOLDERS_AHEAD = 256


async def walk(files: Files, prefix: str) -> AsyncGenerator[ObjectInfo]:
    """The objects whose names start with `prefix`.

    :raises Refusal: NotFound if the repository's folder is missing
    """
    levels = [await _entries(files, prefix.rpartition("/")[0], prefix)]
    ahead: dict[str, Entries] = {}
    while levels:
        if not levels[-1]:
            levels.pop()
            continue
        name, attributes = levels[-1].pop()
        if attributes.type == REGULAR:
            yield info_of(name, attributes)
        elif attributes.type == FOLDER:
            if name not in ahead:
                await _look_ahead(files, [name, *_next_folders(levels[-1], ahead)], prefix, ahead)
            levels.append(ahead.pop(name))


def info_of(name: str, attributes: asyncssh.SFTPAttrs) -> ObjectInfo:
    """What a listing says of an object."""
    return ObjectInfo(name, attributes.size or 0, float(attributes.mtime or 0))


def text(name: bytes | str) -> str:
    """A file's name in a form to show; what is not ASCII is no name of ours."""
    return name if isinstance(name, str) else name.decode("utf-8", "replace")


async def check_root(files: Files) -> None:
    """See that there is a repository: a disk that is not mounted must not look like an empty one.

    :raises Refusal: NotFound if its folder is missing
    """
    if await files.attributes("", follow=True) is None:
        raise Refusal(NotFound, "the repository's folder is not on the server")


def _next_folders(entries: Entries, ahead: dict[str, Entries]) -> list[str]:
    """The folders that come next and are not read ahead yet."""
    folders = [name for name, attributes in entries if attributes.type == FOLDER and name not in ahead]
    return folders[:-_FOLDERS_AHEAD:-1]


async def _entries(files: Files, folder: str, prefix: str) -> Entries:
    """What of a folder can be an object with this prefix, or a folder of such, descending; nothing if it is none."""
    try:
        found = await scan(files, folder)
    except Refusal:
        attributes = await files.attributes(folder, follow=True)
        if attributes is not None and attributes.type == FOLDER:
            raise
        await check_root(files)
        return []
    entries = []
    for entry in reversed(found):
        name = f"{folder}/{text(entry.filename)}" if folder else text(entry.filename)
        if name.startswith(prefix) and NAME.fullmatch(name):
            entries.append((name, entry.attrs))
    return entries


async def _look_ahead(files: Files, folders: Sequence[str], prefix: str, ahead: dict[str, Entries]) -> None:
    """Read folders, of which the first is wanted now; the others are if they can be.

    Each is open on the server meanwhile, and it may not let so many be.
    """
    left = iter(folders)

    async def look() -> None:
        for folder in left:
            try:
                ahead[folder] = await _entries(files, folder, prefix)
            except Refusal:
                if folder == folders[0]:
                    raise

    await in_parallel(look, len(folders))
