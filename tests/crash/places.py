"""Real storages on this host, seen from both sides: by URL as the program does, and as the files that lie there.

A place can be kept as it is and put back, and its clock moved: by making all that lies there older.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
from abc import ABC, abstractmethod
from contextlib import closing
from typing import TYPE_CHECKING, Any

from tests.connectors import s3_server, sshd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class Place(ABC):
    """One storage. `folder` is all there is of it on this host; `environment` what the program needs to reach it."""

    kind: str

    def __init__(self, folder: Path, url: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.url, self.environment = folder, url, environment or {}

    def keep(self, copy: Path) -> None:
        """Make a copy of all there is."""
        copy_tree(self.folder, copy)

    def put_back(self, copy: Path) -> None:
        """Make it what a copy was made of."""
        copy_tree(copy, self.folder)

    def age(self, hours: float) -> None:
        """Let so much time pass, by the storage's clock."""
        for path in self.folder.rglob("*"):
            status = path.lstat()
            os.utime(path, (status.st_atime, status.st_mtime - hours * 3600), follow_symlinks=False)

    @abstractmethod
    def names(self) -> set[str]:
        """The objects there are, and what is none: whatever is unfinished or left over."""

    def size_of(self, name: str) -> int:
        """The size of an object (bytes)."""
        return (self.folder / name).stat().st_size

    def delete(self, name: str) -> None:
        """Lose an object."""
        (self.folder / name).unlink()

    def damage(self, name: str) -> None:
        """Change a byte amid an object."""
        with (self.folder / name).open("r+b") as file:
            data = file.read()
            file.seek(0)
            file.write(_damaged(data))


class LocalPlace(Place):
    """A folder."""

    kind = "local"

    def __init__(self, home: Path) -> None:
        super().__init__(home / "repository", str(home / "repository"))

    def names(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


class SFTPPlace(LocalPlace):
    """A folder of an SSH server."""

    kind = "sftp"

    def __init__(self, home: Path) -> None:
        server = sshd.shared_server(chroot=False)
        folder = server.folder / "data" / os.urandom(8).hex() / "repository"
        folder.parent.mkdir(parents=True)
        url = f"sftp://{server.user}@127.0.0.1:{server.port}{folder}"
        Place.__init__(self, folder, url, {"HOME": str(server.home.path)})


class S3Place(Place):
    """A bucket; `names` has what parts there are of uploads, too, under the server's own `.sgwtmp/`."""

    kind = "s3"

    def __init__(self, home: Path) -> None:
        server = s3_server.shared_server(tls=False)
        bucket = f"test-{os.urandom(8).hex()}"
        user, password = s3_server.CREDENTIALS
        environment = {"S3_REPOSITORY_USER": user, "S3_REPOSITORY_PASSWORD": password}
        super().__init__(server.buckets / bucket, f"{server.scheme}://127.0.0.1:{server.port}/{bucket}", environment)

    def names(self) -> set[str]:
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        # What a cut request left the server with is not ours, nor seen by anybody.
        return {name for name in found if not name.startswith(".sgwtmp/") or name.startswith(".sgwtmp/multipart/")}


class SQLitePlace(Place):
    """A file, and what SQLite keeps beside it."""

    kind = "sqlite"

    def __init__(self, home: Path) -> None:
        super().__init__(home / "sqlite", f"sqlite://{home}/sqlite/repository.db")

    def age(self, hours: float) -> None:
        self._execute("update objects set mtime_s = mtime_s - ?", hours * 3600)

    def names(self) -> set[str]:
        return {name for (name,) in self._execute("select name from objects")}

    def size_of(self, name: str) -> int:
        [(size_bytes,)] = self._execute("select size_bytes from objects where name = ?", name)
        return int(size_bytes)

    def delete(self, name: str) -> None:
        self._execute("delete from objects where name = ?", name)

    def damage(self, name: str) -> None:
        [(body,)] = self._execute("select body from objects where name = ?", name)
        self._execute("update objects set body = ? where name = ?", _damaged(body), name)

    def _execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        if not self.folder.exists():
            return []
        with closing(sqlite3.connect(self.folder / "repository.db", isolation_level=None)) as connection:
            if not connection.execute("select * from sqlite_master").fetchall():  # died before there was a table
                return []
            return connection.execute(statement, values).fetchall()


PLACES: dict[str, Callable[[Path], Place]] = {kind.kind: kind for kind in (LocalPlace, SFTPPlace, S3Place, SQLitePlace)}


def _damaged(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def copy_tree(source: Path, target: Path) -> None:
    """Make `target` what `source` is, times and attributes included; nothing if there is no source."""
    subprocess.run(["rm", "-rf", target], check=True)
    if source.exists():
        subprocess.run(["cp", "-a", source, target], check=True)  # which is ten times as fast as shutil
