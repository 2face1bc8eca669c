"""Whose attempts are whose: an attempt belongs to the append-only token that put its lease first.

    <state folder>/server/<hash of the location>.attempts    an SQLite file

It is durable before the lease is put. What has not been used for months is forgotten: such an attempt can't be gone on
with, and nobody else can take it either, as long as anything of it lies in the repository.

Everything here blocks for some milliseconds: call it in a thread.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BUSY_S = 20.0
_FORGOTTEN_AFTER_S = 90 * 86_400.0
# A refreshed lease is noted this often.
_NOTED_EVERY_S = 86_400.0
_TABLE = """
create table if not exists attempts (attempt text primary key, owner text not null, used_s real not null) without rowid
"""


class Attempts:
    """The attempts that are bound, in a file. Owners are hashes of tokens."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def owner(self, attempt: str) -> str:
        """Whom an attempt belongs to; "" if nobody.

        :raises OSError: if the file can't be used
        """
        if not self._path.exists():
            return ""
        with self._opened() as connection:
            found = connection.execute("select owner, used_s from attempts where attempt = ?", (attempt,)).fetchone()
            if found is None:
                return ""
            if time.time() - found[1] > _NOTED_EVERY_S:
                connection.execute("update attempts set used_s = ? where attempt = ?", (time.time(), attempt))
            return str(found[0])

    def bind(self, attempt: str, owner: str) -> str:
        """Give an attempt to an owner, durably, unless it has one; return whom it belongs to now.

        :raises OSError: if the file can't be used
        """
        with self._opened() as connection:
            now = time.time()
            connection.execute("begin immediate")
            connection.execute("delete from attempts where used_s < ?", (now - _FORGOTTEN_AFTER_S,))
            connection.execute("insert or ignore into attempts values (?, ?, ?)", (attempt, owner, now))
            found = connection.execute("select owner from attempts where attempt = ?", (attempt,)).fetchone()
            connection.execute("commit")
            return str(found[0])

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        try:
            with closing(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)) as connection:
                connection.execute("pragma synchronous=EXTRA")  # the name of the journal goes durably as well
                connection.execute(_TABLE)
                yield connection
        except sqlite3.Error as error:
            raise OSError(None, f"{error}", str(self._path)) from error
