"""Packs that are kept open on a connection for a while: a range of one costs a round trip then, and not two.

Only packs, which are large, read in many ranges, and named by their content. Whoever holds one open reads what it was
when it was opened: also when another client deletes it meanwhile, or puts the same name once more. For a pack that is
the right content all the same. What this client deletes or puts itself is opened anew.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

from coffret.connectors.errors import ConnectorError
from coffret.connectors.sftperrors import Refusal

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from coffret.connectors.sftpfiles import Files, OpenFile

KEPT = "packs/"
# So many on a connection, for so long (s): a restore reads from two or three packs at a time. Servers that allow few
# open files need them for folders and temporary files.
_MOST, _AGE_S = 4, 60.0
_MOST_OF = 16


class Handle:
    """A file that several calls read at a time. It is closed when it is to be, and none of them needs it any more."""

    def __init__(self, name: str, opening: Coroutine[Any, Any, OpenFile]) -> None:
        loop = asyncio.get_running_loop()
        self.name, self.users, self.dropped, self.since_s = name, 0, False, loop.time()
        # By itself: who waits for it first may be cancelled while others do too.
        self._opening = loop.create_task(opening)
        self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def opened(self) -> OpenFile:
        """The file.

        :raises Refusal: if it can't be opened
        """
        return await asyncio.shield(self._opening)

    def close_if_unused(self) -> None:
        """Close it if it is dropped and nobody reads it: the server gives the number of a closed one to another."""
        if self.dropped and not self.users:
            self._opening.add_done_callback(_close)

    @property
    def failed(self) -> bool:
        """Whether it could not be opened."""
        return self._opening.done() and (self._opening.cancelled() or self._opening.exception() is not None)


class Handles:
    """The packs that are open on one connection, the one used last at the end."""

    def __init__(self, most_open: int) -> None:
        """`most_open`: how many files the server lets a client open; 0 if it does not say."""
        self._most = min(_MOST, most_open // _MOST_OF) if most_open else _MOST
        self._kept: OrderedDict[str, Handle] = OrderedDict()

    def take(self, files: Files, name: str) -> tuple[Handle, bool]:
        """A handle for an object, to be given back; and whether it was open before, or was being opened."""
        handle = self._kept.get(name)
        if handle is not None and (handle.failed or asyncio.get_running_loop().time() - handle.since_s > _AGE_S):
            self.drop(name)
            handle = None
        reused = handle is not None
        if handle is None:
            handle = self._kept[name] = Handle(name, files.open(name))
        handle.users += 1
        self._kept.move_to_end(name)
        return handle, reused

    def give_back(self, handle: Handle) -> None:
        """The caller reads no more from it."""
        handle.users -= 1
        handle.close_if_unused()
        idle = [kept for kept in self._kept.values() if not kept.users]
        for kept in idle[: max(0, len(self._kept) - self._most)]:
            self.drop(kept.name)

    def drop(self, name: str, handle: Handle | None = None) -> None:
        """Open an object anew from now on, if this is its handle."""
        kept = self._kept.get(name)
        if kept is not None and handle in (None, kept):
            del self._kept[name]
            kept.dropped = True
            kept.close_if_unused()

    def drop_idle(self) -> bool:
        """Close what nobody reads; whether there was anything."""
        idle = [name for name, kept in self._kept.items() if not kept.users]
        for name in idle:
            self.drop(name)
        return bool(idle)


def _close(opening: asyncio.Task[OpenFile]) -> None:
    with suppress(Refusal, ConnectorError, asyncio.CancelledError):
        opening.result().close_later()
