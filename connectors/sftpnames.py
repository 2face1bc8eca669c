"""How a file gets the name of an object on servers of any make.

If absent: by a hard link, which the server's kernel refuses for a taken name. Servers without links may refuse to
rename to a taken name: racing renames tell. Where they do not, nobody can exclude another host, and `notes` say so.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import anyio

from coffret.connectors.errors import AlreadyExists, NotFound
from coffret.connectors.sftperrors import Refusal, Unsupported
from coffret.connectors.sftpfiles import in_parallel

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from coffret.connectors.sftpfiles import Files

T = TypeVar("T")
_RACERS = 8


class FileGone(Refusal):
    """The file was removed although it got no name: it has to be written again."""


class Naming:
    """What is known of a server's ways to name a file, and how it is done there."""

    def __init__(self) -> None:
        #: Whether only one of several can take a name; None as long as nobody knows.
        self.exclusive: bool | None = None
        self.notes: list[str] = []
        self._links = True
        # Whether a file is linked and its old name removed without waiting in between, as long as that works.
        self._in_one_go = True
        # Where the server excludes nobody, those in this process exclude each other.
        self._one_at_a_time = anyio.Lock()

    async def learn(self, files: Files) -> None:
        """Find out whether names can be taken exclusively; without a `tmp/` to try it in, it stays unknown."""
        if self.exclusive is None and files.session.links and self._links:
            self.exclusive = True
        if self.exclusive is not None:
            return
        async with self._one_at_a_time:
            if self.exclusive is None:
                self._links = False
                with suppress(Refusal):
                    self._found(await _renames_exclude(files))

    async def give(self, files: Files, temporary: str, name: str, if_absent: bool) -> bool:
        """Name a file, in one step for whoever looks; return whether it still has its temporary name too.

        :raises Refusal: AlreadyExists if `if_absent` and the name is taken
        :raises FileGone: if it could not be named and has lost its temporary name; that happens once
        """
        if if_absent:
            return await self._if_absent(files, temporary, name)
        await self._replacing(files, temporary, name)
        return False

    async def _if_absent(self, files: Files, temporary: str, name: str) -> bool:
        await self.learn(files)
        if self._links and self._in_one_go and files.session.in_order:
            try:
                return await _told_if_taken(files, files.move_if_absent(temporary, name), name)
            except Refusal as refusal:
                if refusal.kind is AlreadyExists:
                    raise
                self._in_one_go = False
                raise FileGone(refusal.kind, refusal.reason) from refusal
        if self._links:
            try:
                await _told_if_taken(files, files.link(temporary, name), name)
                return True
            except Refusal as refusal:
                if refusal.kind in (AlreadyExists, NotFound):
                    raise
                if refusal.kind is not Unsupported:
                    # The file system may have no links. OpenSSH then renames, but looks first and renames after: that
                    # excludes nobody for certain, whatever a race would tell.
                    await self._look_and_rename(files, temporary, name)
                    self._links = False
                    self._found(False)
                    return False
                self._links, self.exclusive = False, None
            await self.learn(files)
        if self.exclusive:
            await _told_if_taken(files, files.rename(temporary, name), name)
        else:
            await self._look_and_rename(files, temporary, name)
        return False

    async def _replacing(self, files: Files, temporary: str, name: str) -> None:
        try:
            await files.replace(temporary, name)
            return
        except Refusal as refusal:
            if refusal.kind is not Unsupported:
                raise
        try:
            await files.rename(temporary, name)
        except Refusal:
            if await files.attributes(name) is None:
                raise
            # A moment without either: the engine replaces leases only, and looks again for one that is missing.
            self._note("the server can't replace a file in one step")
            with suppress(Refusal):
                await files.remove(name)
            await files.rename(temporary, name)

    async def _look_and_rename(self, files: Files, temporary: str, name: str) -> None:
        async with self._one_at_a_time:
            if await files.attributes(name) is not None:
                raise Refusal(AlreadyExists, "it exists already")
            await _told_if_taken(files, files.rename(temporary, name), name)

    def _found(self, exclusive: bool) -> None:
        self.exclusive = exclusive
        if not exclusive:
            self._note("the server can't create a file only if there is none of its name: do not let several hosts "
                       "write to this repository at the same time")  # fmt: skip

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


async def _told_if_taken(files: Files, naming: Coroutine[Any, Any, T], name: str) -> T:
    """Do it, and find out whether a refusal without a cause means that the name is taken.

    :raises Refusal: AlreadyExists if the name is taken
    """
    try:
        return await naming
    except Refusal as refusal:
        if refusal.kind in (AlreadyExists, NotFound, Unsupported):
            raise
        if await files.attributes(name) is not None:
            raise Refusal(AlreadyExists, "it exists already") from refusal
        raise


async def _renames_exclude(files: Files) -> bool:
    """Whether of several that rename a file of theirs to the same name only one succeeds."""
    target = f"tmp/{secrets.token_hex(16)}"
    sources = [f"tmp/{secrets.token_hex(16)}" for _ in range(_RACERS)]
    left, won = iter(sources), 0

    async def race() -> None:
        nonlocal won
        source = next(left)
        await files.write(source, [source.encode()])
        try:
            await files.rename(source, target)
            won += 1
        except Refusal:
            await files.remove(source)

    async def remove() -> None:
        for name in (*sources, target):
            with suppress(Refusal):
                await files.remove(name)

    try:
        await in_parallel(race, _RACERS)
    finally:
        await files.session.clear_up(remove())
    return won == 1
