"""The contract of every connector: objects that are whole or absent, by name.

A connector stores *objects*: immutable byte strings under names such as `packs/0f/0f3a…`. What the engine relies on:

* **Whole or absent.** No reader ever sees a part of an object, at whatever moment a writer dies.
* **Durable on return.** When `put` or `delete` returns, the change survives a power loss.
* **Read and list after write.** What was put is seen by every `get`, `stat` and `list` that starts later, anywhere.
* **Atomic put-if-absent.** Of any number of racing `put(..., if_absent=True)` of one name exactly one succeeds.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import anyio
import msgspec

from coffret.connectors.errors import InvalidName, InvalidRange

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from coffret.connectors.limit import Pace

Buffer = bytes | bytearray | memoryview

# Lower-case ASCII, since some file systems fold case; segments start with a letter or digit, so that neither `..`, a
# hidden file nor an option can be meant; 255 bytes is the limit of a file name, and objects lie at most three deep.
# `tmp/` is the connectors' own place for what is not whole yet.
NAME = re.compile(r"(?!tmp(/|\Z))[a-z0-9][a-z0-9._-]{0,199}(/[a-z0-9][a-z0-9._-]{0,199}){0,3}")

# What a storage may let its clients do, the least first: get and list; add what is new, and end nothing; everything.
READ_ONLY, APPEND_ONLY, FULL = RIGHTS = ("read-only", "append-only", "full")


class Capabilities(msgspec.Struct, frozen=True):
    """What a connector does best, as data for the engine's scheduling; and what it may be used for."""

    parallel_puts: int = 2
    parallel_gets: int = 4
    # Ranges of one object closer than this are fetched as one (bytes).
    coalesce_gap_bytes: int = 256 << 10
    # False where the storage has no atomic put-if-absent: backups warn, maintenance asks for --exclusive.
    exclusive_puts: bool = True
    # Whether `list` goes by ascending names, so that one that was cut off can be taken up.
    ordered_lists: bool = False
    # As far as the storage says so beforehand: one of RIGHTS.
    right: str = FULL


class ObjectInfo(msgspec.Struct, frozen=True):
    """An object in a listing: its name, size in bytes and modification time by the storage's clock (s since 1970)."""

    name: str
    size_bytes: int
    mtime_s: float


def valid_name(name: str) -> str:
    """Return `name` if it is an object name.

    :raises InvalidName: if it is not
    """
    if not NAME.fullmatch(name):
        raise InvalidName(f"not an object name: {name!r}")
    return name


def valid_prefix(prefix: str) -> str:
    """Return `prefix` if objects can be listed by it: the beginning of an object name, or "".

    :raises InvalidName: if it is not
    """
    if prefix and not NAME.fullmatch(prefix.removesuffix("/")):
        raise InvalidName(f"not the beginning of an object name: {prefix!r}")
    return prefix


def checked_range(name: str, size_bytes: int, offset: int, length: int | None) -> int:
    """How many bytes `get` is to return of an object of `size_bytes`; an empty range at its end is within it.

    :raises InvalidRange: if the range does not lie within the object
    """
    wanted = size_bytes - offset if length is None else length
    if offset < 0 or wanted < 0 or offset + wanted > size_bytes:
        raise InvalidRange(f"{name} has {size_bytes} bytes, {wanted} were wanted from {offset}")
    return wanted


class Arriving(ABC):
    """A body that is still coming in: `view` is filled from its beginning, by somebody else."""

    view: memoryview

    @abstractmethod
    async def reach(self, size_bytes: int) -> None:
        """Wait until the first `size_bytes` are there. Who fills it cancels whoever waits when no more will come."""

    async def accept(self) -> None:
        """Wait until all of it is there, and may get its name; whatever this raises, the body must not be stored."""
        await self.reach(len(self.view))


# Of each prefix that was listed what there is.
Listings = dict[str, list[ObjectInfo]]


class Connector(ABC):
    """One storage. Methods may be called concurrently; any may raise ConnectorError's subclasses.

    Every method that takes a name raises InvalidName for what `valid_name` refuses. No object's name may be a folder
    of another's: some storages can't hold both `a` and `a/b`.
    """

    #: Names the storage for messages and for the local cache: a canonical URL without credentials.
    location: str
    capabilities: Capabilities = Capabilities()

    @property
    def places(self) -> Sequence[Path]:
        """Local folders and files that this storage consists of, for backups to leave out."""
        return ()

    @property
    def notes(self) -> Sequence[str]:
        """What this storage can't promise or what went on there, for the user to know; it may grow."""
        return ()

    def set_connections(self, count: int) -> None:
        """Move so many objects at a time, instead of what suits the storage; to be called before it is used."""
        self.capabilities = msgspec.structs.replace(self.capabilities, parallel_puts=count, parallel_gets=count)

    def set_insecure(self) -> None:  # noqa: B027 - most storages encrypt, or are on this machine
        """Accept that whoever is on the way can read what is moved, and what gives access to the storage."""

    def set_pace(self, pace: Pace) -> bool:
        """Whether this connector will ask `pace` before each piece that it moves; else whole objects are paid for."""
        return False

    def expect_transfers(self) -> None:  # noqa: B027 - nothing needs to be made ready, as a rule
        """Much will be moved soon: what that takes may be made ready meanwhile. Never an error, and never needed."""

    async def create(self) -> None:  # noqa: B027 - there is nothing to do where storage needs no making
        """Make the storage ready for a new repository (a folder, a table …); it may exist already, empty.

        :raises NotStorage: if something else is there
        """

    @abstractmethod
    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """Store an object, the concatenation of `body`, so that it is either whole or absent, durable on return.

        Without `if_absent` an existing object is replaced atomically.

        :raises AlreadyExists: if `if_absent` and the name is taken
        :raises StorageFull: if there is no room; nothing of it is left behind
        """

    async def put_arriving(self, name: str, body: Arriving, *, if_absent: bool = False) -> None:
        """`put` of a body that is still coming in: what is there of it may be written meanwhile, under no name.

        :raises AlreadyExists: if `if_absent` and the name is taken
        :raises StorageFull: if there is no room; nothing of it is left behind
        """
        await body.accept()
        await self.put(name, [body.view], if_absent=if_absent)

    @abstractmethod
    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes of an object from `offset`, or all from `offset` on.

        :raises NotFound: if there is no such object
        :raises InvalidRange: if the range does not lie within the object
        """

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of an object from `offset`: `get` without an allocation.

        :raises NotFound: if there is no such object
        :raises InvalidRange: if the object ends before the buffer is full
        """
        data = await self.get(name, offset=offset, length=len(buffer))
        if len(data) != len(buffer):
            raise InvalidRange(f"{name}: {len(data)} of {len(buffer)} bytes at {offset}")
        buffer[:] = data

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        """Return an object of unknown size: all of it, or the first `limit_bytes` (1 or more) if it is longer.

        :raises NotFound: if there is no such object
        """
        size_bytes = (await self.stat(name)).size_bytes
        return await self.get(name, length=min(size_bytes, limit_bytes))

    @abstractmethod
    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Iterate over the objects whose names start with `prefix` (a folder, `packs/`, or ""), in any order."""

    async def list_turns(self, turns: Sequence[Sequence[str]]) -> Listings:
        """List prefixes in turns: those of one turn in any order, each as it is when all turns before it are over."""
        found: Listings = {}
        failures: list[Exception] = []

        async def list_one(prefix: str) -> None:
            try:
                found[prefix] = [info async for info in self.list(prefix)]
            except Exception as error:
                failures.append(error)

        for turn in turns:
            async with anyio.create_task_group() as group:
                for prefix in turn:
                    group.start_soon(list_one, prefix)
            if failures:
                raise failures[0]
        return found

    @abstractmethod
    async def stat(self, name: str) -> ObjectInfo:
        """Tell an object's size and time.

        :raises NotFound: if there is no such object
        """

    @abstractmethod
    async def delete(self, name: str) -> None:
        """Remove an object, durably; one that is absent already is no error."""

    async def close(self) -> None:  # noqa: B027 - nor here
        """Release connections and handles; the connector can't be used afterwards."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
