"""What the conformance suite runs against: connectors, and raw access that goes around them."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import tempfile
from abc import ABC, abstractmethod
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.connectors import sshd
from tests.connectors.s3_server import shared_server
from tests.server.serving import Serving

from coffret.connectors.local import LocalConnector
from coffret.connectors.memory import MemoryConnector
from coffret.connectors.sqlite import SQLiteConnector

if TYPE_CHECKING:
    from coffret.connectors.base import Connector

_SHM = Path("/dev/shm")


def files(folder: Path) -> set[str]:
    """All files below a folder, by relative path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


class Store(ABC):
    """One storage under test. Raw calls neither check nor wait for the disk; `raw_set` replaces atomically."""

    #: The storage's times differ after this long.
    tick_s = 0.03

    @abstractmethod
    def connector(self) -> Connector:
        """A connector to the storage; every call may give another."""

    @abstractmethod
    def raw_set(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def raw_get(self, name: str) -> bytes | None: ...

    @abstractmethod
    def raw_delete(self, name: str) -> None: ...

    @abstractmethod
    def raw_names(self) -> set[str]:
        """Everything that is stored, whole or not."""

    def remove(self) -> None:  # noqa: B027 - pytest removes its own folders
        """Leave nothing behind."""


class MemoryStore(Store):
    """The memory connector, by its dict."""

    def __init__(self, folder: Path) -> None:
        self._connector = MemoryConnector()
        self._objects = self._connector._objects

    def connector(self) -> Connector:
        return self._connector

    def raw_set(self, name: str, data: bytes) -> None:
        self._objects.pop(name, None)  # so that it moves, as a replaced file may
        self._objects[name] = (data, 0.0)

    def raw_get(self, name: str) -> bytes | None:
        return self._objects[name][0] if name in self._objects else None

    def raw_delete(self, name: str) -> None:
        del self._objects[name]

    def raw_names(self) -> set[str]:
        return set(self._objects)


class LocalStore(Store):
    """The local connector, in pytest's temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "repository"

    def connector(self) -> Connector:
        return LocalConnector(self.path)

    def raw_set(self, name: str, data: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path / "new"
        new.write_bytes(data)
        new.rename(path)

    def raw_get(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.exists() else None

    def raw_delete(self, name: str) -> None:
        (self.path / name).unlink()

    def raw_names(self) -> set[str]:
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()}


class TmpfsStore(LocalStore):
    """The local connector on a tmpfs, which moves replaced files about and has its own idea of direct writes."""

    def __init__(self, folder: Path) -> None:
        if not _SHM.is_dir():
            pytest.skip("no tmpfs at /dev/shm")
        super().__init__(Path(tempfile.mkdtemp(prefix="coffret-test-", dir=_SHM)))

    def remove(self) -> None:
        shutil.rmtree(self.path.parent)


class SQLiteStore(Store):
    """The SQLite connector, by a connection of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "repository.db"

    def connector(self) -> Connector:
        return SQLiteConnector(self.path)

    def raw_set(self, name: str, data: bytes) -> None:
        self._execute("delete from objects where name = ?", name)
        self._execute("insert into objects values (null, ?, ?, 0.0, ?)", name, len(data), data)

    def raw_get(self, name: str) -> bytes | None:
        found = self._execute("select body from objects where name = ?", name)
        return bytes(found[0][0]) if found else None

    def raw_delete(self, name: str) -> None:
        self._execute("delete from objects where name = ?", name)

    def raw_names(self) -> set[str]:
        return {name for (name,) in self._execute("select name from objects")}

    def _execute(self, statement: str, *values: str | bytes | int) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.execute("pragma synchronous = off")
            return connection.execute(statement, values).fetchall()


class S3Store(LocalStore):
    """The S3 connector, by the folder in which the server keeps its objects as files."""

    tick_s = 1.01
    tls = False

    def __init__(self, folder: Path) -> None:
        self._server = shared_server(tls=self.tls)
        self._bucket = f"test-{os.urandom(8).hex()}"
        self.path = self._server.buckets / self._bucket / "some" / "prefix"

    def connector(self) -> Connector:
        return self._server.connector(f"{self._bucket}/some/prefix")

    def remove(self) -> None:
        shutil.rmtree(self.path.parents[1], ignore_errors=True)


class S3TLSStore(S3Store):
    """The same over TLS, where bodies are not signed."""

    tls = True


class S3VirtualStore(S3Store):
    """The same where the bucket stands before the host, by names that lead here in this process alone."""

    _domain = "s3.coffret.test"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._server = shared_server(tls=False, domain=self._domain)
        self.path = self._server.buckets / self._bucket / "some" / "prefix"
        self._resolve, socket.getaddrinfo = socket.getaddrinfo, self._resolved
        self.asked: set[str] = set()

    def connector(self) -> Connector:
        return self._server.connector(f"{self._bucket}/some/prefix", options={"path-style": "false"})

    def remove(self) -> None:
        socket.getaddrinfo = self._resolve
        super().remove()
        assert self.asked <= {f"{self._bucket}.{self._domain}"}

    def _resolved(self, host: Any, *arguments: Any, **more: Any) -> Any:
        if str(host).endswith(self._domain):
            self.asked.add(host)
            host = "127.0.0.1"
        return self._resolve(host, *arguments, **more)


class SFTPStore(LocalStore):
    """The SFTP connector, by the folder on the same host."""

    tick_s = 1.01
    chroot = False

    def __init__(self, folder: Path) -> None:
        self._server = sshd.shared_server(chroot=self.chroot)
        self._environment = sshd.Environment(self._server.home)
        super().__init__(self._server.root / "data" / os.urandom(8).hex() if self.chroot else folder)

    def connector(self) -> Connector:
        return self._server.connector(self.path)

    def remove(self) -> None:
        self._environment.restore()
        if self.chroot:
            shutil.rmtree(self.path.parent, ignore_errors=True)


class SFTPChrootStore(SFTPStore):
    """The same for a user who is confined to SFTP in one folder."""

    chroot = True


class HTTPStore(LocalStore):
    """The connector to a server of a folder, by that folder."""

    tls = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._server = Serving(folder, tls=self.tls).start()

    def connector(self) -> Connector:
        return self._server.connector()

    def raw_names(self) -> set[str]:
        """Without what the server has not finished: it may still be at a put that its client has given up."""
        return {name for name in super().raw_names() if not name.startswith("tmp/")}

    def remove(self) -> None:
        self._server.stop()
        assert super().raw_names() == self.raw_names()


class HTTPTLSStore(HTTPStore):
    """The same over TLS."""

    tls = True


# A new connector joins the suite here.
STORES: list[type[Store]] = [
    MemoryStore, LocalStore, TmpfsStore, SQLiteStore, S3Store, S3TLSStore, S3VirtualStore, SFTPStore, SFTPChrootStore,
    HTTPStore, HTTPTLSStore,
]  # fmt: skip
