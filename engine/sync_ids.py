"""Which chunk of one repository is which chunk of another: ids are keyed, so the same content has another id in each.

Kept in a SQLite file in the local cache of the target, so that the next sync does not read what it has moved before.
Each row is authenticated with a key that follows from the target's id key and the source's repository id: whoever can
write to the cache can make a sync slower, but never have a snapshot name what it should not. Losing the file costs
reading once more; without a cache it lies in a temporary folder.

    leaves       chunk of a file or attribute → its id in the target
    containers   page, node or chunk list → its refs in the target, and the attempt that last made sure of all below it

The two are apart: a file may consist of the very bytes of a page.
"""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import to_thread
from blake3 import blake3

from coffret.engine.errors import CoffretError, OutOfSpace
from coffret.engine.records import ATTEMPT_BYTES, ID_BYTES, REF_BYTES
from coffret.engine.state import make_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from coffret.engine.repository import Repository

    T = TypeVar("T")

_CONTEXT = "coffret 2026 sync ids"
_TAG_BYTES = 16
# Another sync into the same repository may be writing.
_BUSY_S = 30.0
# Rows asked for in one statement: one at a time costs 4 µs each, together 1.5.
_TOGETHER = 200
_TABLES = """
create table if not exists leaves (source blob primary key, target blob not null, tag blob not null) without rowid;
create table if not exists containers
    (source blob primary key, target blob not null, attempt blob not null, tag blob not null) without rowid;
"""


def container_key(refs: bytes, level: int) -> bytes:
    """What a page, node or list is known by: its level, and the id of its chunk, or a hash if it has several.

    `level`: of a page 0, of nodes what they are above it, of lists -1 and less. One chunk can be several of these.
    """
    one = refs[:ID_BYTES] if len(refs) == REF_BYTES else blake3(refs).digest()
    return level.to_bytes(1, "little", signed=True) + one


class SyncIds:
    """The map from `source` to `target`. `same`: both have one id key, as after `create --like`: ids are equal.

    Use as an async context. Any failure of the file is an error: what was noted there is needed to the end of a run.
    """

    def __init__(self, source: Repository, target: Repository) -> None:
        self.same = source.secrets.id_key == target.secrets.id_key
        bound = blake3(target.secrets.id_key, derive_key_context=_CONTEXT).digest()
        self._key = blake3(source.id_bytes, key=bound).digest()
        folder = target.cache_folder
        self._private = None if folder is not None else tempfile.TemporaryDirectory(prefix="coffret-sync-")
        self._path = (folder or Path(self._private.name if self._private else "")) / f"ids-{source.id_bytes.hex()}.db"
        self._connection: sqlite3.Connection | None = None
        self._thread = anyio.CapacityLimiter(1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._close, limiter=self._thread)

    async def leaves(self, ids: Sequence[bytes]) -> dict[bytes, bytes]:
        """The target's ids of those chunks that are known."""
        if self.same:
            return {chunk_id: chunk_id for chunk_id in ids}
        return await self._run(lambda: self._leaves(ids))

    async def keep_leaves(self, found: Mapping[bytes, bytes]) -> None:
        """Note the target's ids of chunks."""
        if found and not self.same:
            rows = [(source, target, self._tag(source, target)) for source, target in sorted(found.items())]
            await self._run(lambda: self._write("insert or replace into leaves values (?, ?, ?)", rows))

    async def containers(self, keys: Sequence[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        """Of those pages, nodes and lists that are known: (refs in the target, attempt)."""
        return await self._run(lambda: self._containers(keys))

    async def keep_containers(self, found: Mapping[bytes, bytes], attempt: bytes) -> None:
        """Note the target's refs of containers, all that lies below each being seen to by this attempt."""
        if found:
            rows = [(source, refs, attempt, self._tag(source, refs, attempt)) for source, refs in sorted(found.items())]
            await self._run(lambda: self._write("insert or replace into containers values (?, ?, ?, ?)", rows))

    def _tag(self, source: bytes, target: bytes, attempt: bytes = b"") -> bytes:
        # The lengths of the first and the last are fixed, or nothing: what is hashed can be read in one way only.
        return blake3(source + attempt + target, key=self._key).digest(_TAG_BYTES)

    async def _run(self, call: Callable[[], T]) -> T:
        return await to_thread.run_sync(self._reported, call, limiter=self._thread)

    # What follows runs in threads, one at a time.

    def _reported(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (sqlite3.Error, OSError) as error:
            self._forget(error)
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise OutOfSpace(
                    f"no space left for the local cache in {self._path.parent}",
                    remedy="free some space there, or name another folder with --cache-dir",
                ) from error
            raise CoffretError(
                f"the local cache of ids, {self._path}, can't be used: {error}",
                remedy="run the command again, with another --cache-dir, or with --no-cache",
            ) from error

    def _forget(self, error: Exception) -> None:
        """A damaged file is removed: it is begun anew by the next run."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            with suppress(sqlite3.Error):
                self._disconnect()
            for end in ("", "-wal", "-shm"):
                with suppress(OSError):
                    self._path.with_name(self._path.name + end).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self._connection = self._connect()
            except sqlite3.DatabaseError as error:
                self._forget(error)
                self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        make_private(self._path.parent)
        self._path.touch(0o600)
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=16
        )
        try:
            connection.execute("pragma journal_mode=WAL")
            connection.execute("pragma synchronous=NORMAL")  # what a power cut takes is read again
            connection.executescript(_TABLES)
        except BaseException:
            connection.close()
            raise
        return connection

    def _leaves(self, ids: Sequence[bytes]) -> dict[bytes, bytes]:
        rows = self._select("select * from leaves where source in", ids)
        return {
            source: target
            for source, target, tag in rows
            if len(target) == ID_BYTES and tag == self._tag(source, target)
        }

    def _containers(self, keys: Sequence[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        found = {}
        for source, refs, attempt, tag in self._select("select * from containers where source in", keys):
            if len(attempt) == ATTEMPT_BYTES and tag == self._tag(source, refs, attempt):
                found[source] = refs, attempt
        return found

    def _select(self, query: str, keys: Sequence[bytes]) -> Iterator[tuple[bytes, ...]]:
        connection = self._open()
        for at in range(0, len(keys), _TOGETHER):
            part = keys[at : at + _TOGETHER]
            # Few different statements: short parts ask for one key again and again.
            padded = [*part, *[part[0]] * (_TOGETHER - len(part))] if len(part) > 8 else part
            yield from connection.execute(f"{query} ({','.join('?' * len(padded))})", padded)

    def _write(self, statement: str, rows: Iterable[tuple[bytes, ...]]) -> None:
        connection = self._open()
        connection.execute("begin immediate")
        try:
            connection.executemany(statement, rows)
            connection.execute("commit")
        finally:
            if connection.in_transaction:
                connection.execute("rollback")

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _close(self) -> None:
        self._disconnect()
        if self._private is not None:
            self._private.cleanup()
