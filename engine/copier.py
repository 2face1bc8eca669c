"""Copy objects from one storage to another as they are, each verified by what its name says, several at a time.

Memory: a buffer of a pack's size for each object at a time, reused, and page-aligned, so that `connectors.local` can
write it with O_DIRECT; and one larger object, an index object, at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio import to_thread
from blake3 import blake3

from coffret.connectors.errors import AlreadyExists, ConnectorError, InvalidRange, NotFound, TransientError
from coffret.engine import sealing
from coffret.engine.configuration import clear_secrets
from coffret.engine.errors import Damaged, UsageError
from coffret.engine.fetch import unreadable
from coffret.engine.memory import fresh_memory, give_back
from coffret.engine.mirror import attempt_of
from coffret.engine.objects import MAX_INDEX_BYTES, MAX_MARK_BYTES, MAX_SNAPSHOT_BYTES, put_once
from coffret.engine.packfile import pack_name
from coffret.engine.progress import Item
from coffret.engine.sealing import HEADER_BYTES, TAG_BYTES, Sealer, check_header, kind_of
from coffret.engine.settings import MIB

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Iterator

    from coffret.connectors.base import Connector
    from coffret.engine.progress import Progress
    from coffret.engine.records import Config

# Buffers are this much together, but two at least: 8 of the packs that are made by default, 2 of the largest.
_MEMORY_BYTES = 256 * MIB
# What is smaller is verified at once: a hop to a thread takes as long.
_HERE_BYTES = 64 << 10
_KINDS = {
    "index": ((sealing.INDEX,), MAX_INDEX_BYTES),
    "snapshots": ((sealing.SNAPSHOT, sealing.END), MAX_SNAPSHOT_BYTES),
    "removed": ((sealing.REMOVED,), MAX_MARK_BYTES),
    "trash": ((sealing.MARK,), MAX_MARK_BYTES),
}
# Names that another may take at any time with other content.
_CONTESTED = ("snapshots", "trash")


class Copier:
    """Copies objects. `damaged` has the names of those that could not be copied; `copied` and `size_bytes` count."""

    def __init__(self, source: Connector, target: Connector, config: Config, progress: Progress) -> None:
        self._source, self._target, self._progress = source, target, progress
        self._verifier = Verifier(config)
        gets, puts = source.capabilities.parallel_gets, target.capabilities.parallel_puts
        self._gets, self._puts = anyio.CapacityLimiter(gets), anyio.CapacityLimiter(puts)
        self._one_large = anyio.Lock()
        count = max(2, min(gets + puts, _MEMORY_BYTES // config.pack_bytes))
        self._buffers = [fresh_memory(config.pack_bytes) for _ in range(count)]
        self._pack_bytes = config.pack_bytes
        self.damaged: dict[str, str] = {}
        self.copied = self.size_bytes = 0

    async def copy(self, objects: Iterable[tuple[str, int]]) -> bool:
        """Copy objects, given as (name, size in bytes); False if some of them are gone, or not as they were listed.

        :raises UsageError: if another object has the name of one
        :raises ConnectorError: if a storage fails, possibly in an ExceptionGroup
        """
        every = iter(objects)
        gone: list[str] = []
        async with anyio.create_task_group() as group:
            for buffer in self._buffers:
                group.start_soon(self._work, every, buffer, gone)
        return not gone

    def close(self) -> None:
        """Give the buffers back to the system."""
        give_back(self._buffers)
        self._buffers = []

    async def _work(self, objects: Iterator[tuple[str, int]], buffer: mmap.mmap, gone: list[str]) -> None:
        for name, size_bytes in objects:
            limit_bytes = self._pack_bytes if name.startswith("packs/") else _KINDS[name.partition("/")[0]][1]
            if size_bytes > limit_bytes:
                self.report(name, f"has {size_bytes} bytes, more than any object of its kind")
            elif size_bytes <= len(buffer):
                await self._move(name, memoryview(buffer)[:size_bytes], gone)
            else:
                async with self._one_large:
                    await self._move(name, memoryview(bytearray(size_bytes)), gone)

    async def _move(self, name: str, view: memoryview, gone: list[str]) -> None:
        """Copy one object through `view`, which is as long as it was listed."""
        try:
            async with self._gets:
                await self._source.get_into(name, 0, view)
            if len(view) <= _HERE_BYTES:
                self._verifier.verify(name, view)
            else:
                await to_thread.run_sync(self._verifier.verify, name, view)
        except NotFound:
            gone.append(name)
            return
        except Damaged as error:
            self.report(name, str(error).removeprefix(f"{name}: "))
            return
        except TransientError:
            raise
        except ConnectorError as error:
            if isinstance(error, InvalidRange) and await self._has_changed(name, len(view)):
                gone.append(name)
            else:
                self.report(name, unreadable(name, error).removeprefix(f"{name} "))
            return
        async with self._puts:
            await self._put(name, view)
        self.count(name, len(view))

    def count(self, name: str, size_bytes: int) -> None:
        """Count an object as copied."""
        self.copied += 1
        self.size_bytes += size_bytes
        progress = self._progress
        progress.files += 1
        progress.size_bytes += size_bytes
        # Keys and config are few, and were not counted before.
        progress.files_total = max(progress.files, progress.files_total or 0)
        progress.size_total = max(progress.size_bytes, progress.size_total or 0)
        if progress.on_item is not None:
            progress.on_item(Item(name.encode(), "copied", size_bytes))

    def report(self, name: str, reason: str) -> None:
        """Tell of an object that is not copied, once."""
        if name not in self.damaged:
            self.damaged[name] = reason
            self._progress.fault(name.encode(), reason)

    async def _has_changed(self, name: str, size_bytes: int) -> bool:
        """Whether the object is gone or has another size than it was listed with."""
        try:
            return (await self._source.stat(name)).size_bytes != size_bytes
        except NotFound:
            return True

    async def _put(self, name: str, view: memoryview) -> None:
        if name.partition("/")[0] not in _CONTESTED:
            await self._target.put(name, [view])
            return
        try:
            await put_once(self._target, name, view)
        except AlreadyExists:
            raise used_by_itself(self._target, name) from None


class Verifier:
    """Verifies what can be verified without a passphrase: of packs everything, of other objects what is in clear.

    In a repository without encryption nothing is left out.
    """

    def __init__(self, config: Config) -> None:
        self._encrypted = config.encrypted
        self._sealer = None
        if not config.encrypted:
            self._sealer = Sealer(clear_secrets(config), bytes.fromhex(config.repository_id))

    def verify(self, name: str, view: memoryview) -> None:
        """Verify an object.

        :raises Damaged: if it can't be what was stored under this name
        """
        folder = name.partition("/")[0]
        if folder == "packs":
            if pack_name(blake3(view).digest()) != name:
                raise Damaged("its bytes are not those of its name")
            return
        kinds, header = _KINDS[folder][0], bytes(view[:HEADER_BYTES])
        kind = kind_of(header) if kind_of(header) in kinds else kinds[0]
        check_header(header, kind, encrypted=self._encrypted)
        if len(view) < HEADER_BYTES + TAG_BYTES:
            raise Damaged("it is cut short")
        # The other end of an attempt, a mark and a removal are put by other attempts.
        if kind in (sealing.INDEX, sealing.SNAPSHOT):
            attempt = attempt_of(name) if kind == sealing.INDEX else name.partition("/")[2]
            if header[12:28].hex() != attempt:
                raise Damaged("it was written by another attempt than its name says")
        if self._sealer is not None:
            self._sealer.open(kind, name, bytes(view))


def used_by_itself(target: Connector, name: str) -> UsageError:
    """What to say where a copy has an object of its own under a name of the original."""
    return UsageError(
        f"{target.location} is no mere copy any more: its {name} is another than the original's",
        remedy="copy snapshots to it with `coffret at REPO sync to PEER`",
    )
