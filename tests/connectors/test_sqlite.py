"""What only the SQLite connector has: one file, other processes, and the errors of a database."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC240, ASYNC251 - here nothing else waits for the event loop

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.connectors.test_conformance import MIB, listed

from coffret.connectors.errors import (
    ConnectorError,
    InvalidLocation,
    NotFound,
    NotStorage,
    PermissionRefused,
    StorageFull,
    TransientError,
)
from coffret.connectors.sqlite import SQLiteConnector, open_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio
PACKAGES = Path(__file__).parents[2] / ".pkg"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "repository.db"


@pytest.fixture
async def connector(path: Path) -> AsyncIterator[SQLiteConnector]:
    async with SQLiteConnector(path) as connector:
        await connector.create()
        yield connector


def pragma(path: Path, name: str) -> object:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"pragma {name}").fetchone()[0]


def test_locations(tmp_path: Path) -> None:
    assert open_url("sqlite:///srv/my%20file%3F.db", {}).path == Path("/srv/my file?.db")
    location = SQLiteConnector(tmp_path / "a b?.db").location
    assert open_url(location, {}).path == tmp_path / "a b?.db"
    for url in ("sqlite://", "sqlite:///", "sqlite://host/a.db", "sqlite:///a?x=y", "sqlite:///a#b", "sqlite:///%00"):
        with pytest.raises(InvalidLocation):
            open_url(url, {})
    with pytest.raises(InvalidLocation):
        open_url("sqlite:///a.db", {"region": "x"})


async def test_the_file(path: Path, connector: SQLiteConnector) -> None:
    await connector.put("packs/aa/one", [b"1"])
    assert (pragma(path, "journal_mode"), pragma(path, "auto_vacuum")) == ("wal", 2)
    assert connector._connection is not None
    assert connector._connection.execute("pragma synchronous").fetchone() == (2,)
    assert path.stat().st_mode & 0o077 == 0
    assert set(connector.places) == {path, *path.parent.glob("repository.db-*")}
    await connector.create()
    assert await connector.get("packs/aa/one") == b"1"


async def test_when_all_have_closed_it_is_one_portable_file(path: Path, tmp_path: Path) -> None:
    async with SQLiteConnector(path) as connector:
        await connector.create()
        await connector.put("config", [b"1"])
    assert [found.name for found in tmp_path.iterdir()] == ["repository.db"]
    shutil.copy(path, tmp_path / "copy.db")
    async with SQLiteConnector(tmp_path / "copy.db") as copy:
        assert await copy.get("config") == b"1"


async def test_no_file_is_no_repository(path: Path) -> None:
    async with SQLiteConnector(path) as connector:
        with pytest.raises(NotFound):
            await connector.stat("config")
        with pytest.raises(NotFound):
            await connector.put("config", [b""])
    assert not path.exists()


async def test_an_empty_file_is_no_repository_yet(path: Path) -> None:
    """Another process may be about to make one."""
    path.touch()
    async with SQLiteConnector(path) as connector:
        with pytest.raises(NotFound):
            await connector.stat("config")
        with pytest.raises(NotFound):
            await connector.put("config", [b""])
        await connector.create()
        await connector.put("config", [b"1"])


@pytest.mark.parametrize("what", ["text", "database", "folder"])
async def test_what_is_something_else_is_left_alone(path: Path, what: str) -> None:
    if what == "text":
        path.write_bytes(b"somebody's notes, long enough to be looked at" * 100)
    elif what == "database":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("create table notes (text)")
    else:
        path.mkdir()
    before = path.read_bytes() if path.is_file() else b""
    async with SQLiteConnector(path) as connector:
        for call in (connector.create, lambda: connector.put("config", [b""]), lambda: connector.stat("config")):
            with pytest.raises((NotStorage, PermissionRefused)):
                await call()
    assert not path.is_file() or path.read_bytes() == before


async def test_space_is_given_back(path: Path) -> None:
    async with SQLiteConnector(path) as connector:
        await connector.create()
        for number in range(4):
            await connector.put(f"packs/aa/{number}", [os.urandom(4 * MIB)])
        for number in range(4):
            await connector.delete(f"packs/aa/{number}")
    assert path.stat().st_size < MIB


async def test_a_range_does_not_load_the_object(connector: SQLiteConnector) -> None:
    await connector.put("packs/aa/one", [bytes(64 * MIB)])
    tracemalloc.start()
    try:
        assert await connector.get("packs/aa/one", offset=60 * MIB, length=1000) == bytes(1000)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


async def test_one_waits_for_the_other(path: Path, connector: SQLiteConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coffret.connectors.sqlite._BUSY_S", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("begin immediate")
        async with SQLiteConnector(path) as impatient:
            with pytest.raises(TransientError):
                await impatient.put("index/a", [b"1"])
            assert await listed(impatient) == []
        async with anyio.create_task_group() as group:
            group.start_soon(connector.put, "index/a", [b"1"])
            await anyio.sleep(0.1)
            other.execute("rollback")
    assert await connector.get("index/a") == b"1"


WRITER = """
    import anyio, hashlib, itertools, os, sys
    from coffret.connectors.sqlite import SQLiteConnector

    async def main():
        async with SQLiteConnector(sys.argv[1]) as connector:
            for number in itertools.count():
                data = os.urandom(200_000 + number)
                await connector.put("packs/aa/" + hashlib.sha256(data).hexdigest(), [data])
                print(hashlib.sha256(data).hexdigest(), flush=True)

    anyio.run(main)
"""


async def test_several_processes_of_which_some_are_killed(path: Path, connector: SQLiteConnector) -> None:
    """What was acknowledged is there, whole; what was not is whole or absent; the others are not held up."""
    acknowledged: list[str] = []
    for turn in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(WRITER), str(path)],
                stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(PACKAGES)},
            )
            for _ in range(2)
        ]  # fmt: skip
        for writer in writers:
            assert writer.stdout is not None
            acknowledged += [writer.stdout.readline().strip() for _ in range(5)]
        time.sleep(0.02 * turn)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            rest, _ = writer.communicate()
            acknowledged += [line for line in rest.splitlines() if len(line) == 64]
    names = await listed(connector, "packs/")
    assert set(names) >= {f"packs/aa/{digest}" for digest in acknowledged}
    for name in names:
        assert hashlib.sha256(await connector.get(name)).hexdigest() == name.rpartition("/")[2]
    assert pragma(path, "integrity_check") == "ok"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")
async def test_a_full_disk(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)], check=True)
    try:
        async with SQLiteConnector(mount / "r.db") as connector:
            await connector.create()
            stored = []
            with pytest.raises(StorageFull):
                for number in range(10):
                    await connector.put(f"packs/aa/{number}", [os.urandom(2 * MIB)])
                    stored.append(f"packs/aa/{number}")
            assert stored
            assert await listed(connector) == stored
            for name in stored:
                assert len(await connector.get(name)) == 2 * MIB
    finally:
        subprocess.run(["umount", str(mount)], check=True)


async def test_every_error_of_the_library_is_mapped(connector: SQLiteConnector) -> None:
    codes = {name: code for name, code in vars(sqlite3).items() if name.startswith("SQLITE_") and type(code) is int}
    classes: list[type[sqlite3.Error]] = [
        sqlite3.Error,
        sqlite3.InterfaceError,
        *sqlite3.DatabaseError.__subclasses__(),
    ]
    for error_class in classes:
        for code in codes.values():
            error = error_class("text")
            error.sqlite_errorcode = code
            with pytest.raises(ConnectorError, match=r"repository\.db: index/a: text"), connector._mapped("index/a"):
                raise error
