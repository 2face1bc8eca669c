"""A local cache of what is small and never changes in a repository: snapshot objects, and blocks of catalogs.

What it holds is kept as stored, sealed: of no use without the passphrase, and verified when it is opened like anything
that a storage returns. It lies in one SQLite file beside the index mirror, shared by processes, bounded in size; what
was used longest ago goes first. Losing it costs requests, nothing else, so every failure of it is passed over.

Only for storages elsewhere: reading a local repository is as quick.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from coffret.engine.state import make_private

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import TypeVar

    T = TypeVar("T")

#: The catalog of a million files takes some 100 MiB.
MAX_BYTES = 512 << 20
# What is larger is no header and no block of a catalog (bytes).
MAX_ITEM_BYTES = 4 << 20
_BUSY_S = 2.0
# `used` is written again only when it is older than this (s): a look-up need not be a write.
_USED_STEP_S = 24 * 3600
_TABLES = """
create table if not exists items (
    name text primary key, used_s integer not null, size_bytes integer not null, body blob not null
) without rowid;
create index if not exists by_use on items (used_s, size_bytes);
"""


class StoreCache:
    """Sealed bytes by name. Any failure looks like an empty cache. One thread at a time uses the connection."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._connection: sqlite3.Connection | None = None
        self._thread = anyio.CapacityLimiter(1)
        self._failed = False

    async def get(self, names: Sequence[str]) -> dict[str, bytes]:
        """What there is of these."""
        return await self._run(lambda: self._get(names), {})

    async def keep(self, items: Mapping[str, bytes | memoryview]) -> None:
        """Keep these too, as far as there is room; what is too large for the cache is left out."""
        await self._run(lambda: self._keep(items), None)

    async def close(self) -> None:
        """Close the file; the cache can be used again."""
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._close, limiter=self._thread)

    async def _run(self, call: Callable[[], T], otherwise: T) -> T:
        if self._failed:
            return otherwise
        return await to_thread.run_sync(self._tried, call, otherwise, limiter=self._thread)

    # What follows runs in threads, one at a time.

    def _tried(self, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except (sqlite3.Error, OSError) as error:
            self._close()
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                self._remove()
            else:
                self._failed = True
        return otherwise

    def _remove(self) -> None:
        """A damaged file is begun anew."""
        for end in ("", "-wal", "-shm"):
            with suppress(OSError):
                self._path.with_name(self._path.name + end).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            make_private(self._path.parent)
            self._path.touch(0o600)
            connection = sqlite3.connect(
                self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=16
            )
            self._connection = connection
            connection.execute("pragma journal_mode=WAL")
            connection.execute("pragma synchronous=NORMAL")  # what a power cut takes is fetched again
            connection.executescript(_TABLES)
        return self._connection

    def _get(self, names: Sequence[str]) -> dict[str, bytes]:
        connection, found, now = self._open(), {}, int(time.time())
        stale = []
        for name in names:
            row = connection.execute("select body, used_s from items where name = ?", (name,)).fetchone()
            if row is not None:
                found[name] = row[0]
                if row[1] < now - _USED_STEP_S:
                    stale.append((now, name))
        if stale:
            connection.execute("begin immediate")
            connection.executemany("update items set used_s = ? where name = ?", stale)
            connection.execute("commit")
        return found

    def _keep(self, items: Mapping[str, bytes | memoryview]) -> None:
        now = int(time.time())
        rows = [(name, now, len(data), data) for name, data in items.items() if len(data) <= MAX_ITEM_BYTES]
        if not rows:
            return
        connection = self._open()
        connection.execute("begin immediate")
        try:
            connection.executemany("insert or replace into items values (?, ?, ?, ?)", rows)
            excess = self._size_bytes(connection) - self._max_bytes
            if excess > 0:
                self._drop(connection, excess)
            connection.execute("commit")
        finally:
            if connection.in_transaction:
                connection.execute("rollback")

    def _size_bytes(self, connection: sqlite3.Connection) -> int:
        return int(connection.execute("select coalesce(sum(size_bytes), 0) from items").fetchone()[0])

    def _drop(self, connection: sqlite3.Connection, excess_bytes: int) -> None:
        """Drop what was used longest ago, and a tenth of the cache beyond, so that not every call has to."""
        left = excess_bytes + self._max_bytes // 10
        names = []
        for name, size_bytes in connection.execute("select name, size_bytes from items order by used_s"):
            if left <= 0:
                break
            names.append((name,))
            left -= size_bytes
        connection.executemany("delete from items where name = ?", names)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def block_key(pack: bytes, offset: int) -> str:
    """The name of a pack's block in the cache."""
    return f"{pack.hex()}:{offset}"
