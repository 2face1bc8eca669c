"""What only the local connector has: files, folders, mounts, other processes, and the errors of an operating system."""

# ruff: noqa: ASYNC221, ASYNC240, ASYNC251 - here nothing else waits for the event loop

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.connectors.stores import files
from tests.connectors.test_conformance import MIB, Slowly, aligned, listed, race

from coffret.connectors import localfiles
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectorError,
    InvalidLocation,
    NotFound,
    NotStorage,
    PermissionRefused,
    StorageFull,
    TransientError,
)
from coffret.connectors.local import LocalConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = pytest.mark.anyio

PACKAGES = Path(__file__).parents[2] / ".pkg"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
async def connector(folder: Path) -> AsyncIterator[LocalConnector]:
    async with LocalConnector(folder) as connector:
        await connector.create()
        yield connector


def mount(target: Path, *options: str) -> None:
    """Mount something, or skip the test, saying why."""
    target.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(target)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount {' '.join(options)}: {done.stderr.splitlines()[0]}")


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB: one without direct writes of its own, one with them."""
    target = tmp_path / "disk"
    if request.param == "tmpfs":
        mount(target, "-t", "tmpfs", "-o", "size=16m", "tmpfs")
    else:
        if not shutil.which("mkfs.ext4"):
            pytest.skip("no mkfs.ext4")
        image = tmp_path / "image"
        image.write_bytes(b"")
        os.truncate(image, 16 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        mount(target, "-o", "loop", str(image))
    yield target
    subprocess.run(["umount", str(target)], check=True)


class TestCreate:
    async def test_a_new_folder_is_private(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b"
        async with LocalConnector(folder) as connector:
            await connector.create()
            await connector.put("config", [b"{}"])
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "config").stat().st_mode & 0o777 == 0o600

    async def test_an_empty_disk(self, small_disk: Path) -> None:
        async with LocalConnector(small_disk) as connector:
            await connector.create()
            await connector.put("config", [b"{}"], if_absent=True)
            assert await listed(connector) == ["config"]

    @pytest.mark.parametrize("other", ["notes.txt", "config/settings", "packs", "index/page", "snapshots/a"])
    async def test_a_folder_with_something_else(self, folder: Path, other: str) -> None:
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(b"precious")
        async with LocalConnector(folder) as connector:
            with pytest.raises(NotStorage):
                await connector.create()
        assert files(folder) == {other}

    async def test_a_file(self, folder: Path) -> None:
        folder.write_bytes(b"precious")
        for path in (folder, folder / "below"):
            async with LocalConnector(path) as connector:
                with pytest.raises(NotStorage):
                    await connector.create()
                with pytest.raises(NotStorage):
                    await connector.get("config")
        assert folder.read_bytes() == b"precious"

    async def test_nothing_there(self, folder: Path) -> None:
        async with LocalConnector(folder) as connector:
            for call in (connector.get("config"), listed(connector), connector.put("config", [b""])):
                with pytest.raises(NotFound):
                    await call
        assert not folder.exists()

    @pytest.mark.parametrize("path", ["", "a\0b"])
    async def test_not_a_path(self, path: str) -> None:
        with pytest.raises(InvalidLocation):
            LocalConnector(path)

    async def test_the_location_is_canonical(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "á b").mkdir()
        (tmp_path / "link").symlink_to("á b")
        monkeypatch.chdir(tmp_path)
        assert LocalConnector("link").location == f"file://{tmp_path}/%C3%A1%20b"
        assert LocalConnector(os.fsdecode(b"\xff")).location == f"file://{tmp_path}/%FF"


class TestFiles:
    async def test_what_is_no_object_is_not_listed(self, folder: Path, connector: LocalConnector) -> None:
        await connector.put("index/a", [b"1"])
        for name in ("tmp/" + "0" * 32, "notes.TXT", ".nfs001", "index/.a.swp", "index/A"):
            (folder / name).write_bytes(b"")
        os.mkfifo(folder / "index/pipe")
        (folder / "index/link").symlink_to("a")
        assert await listed(connector) == ["index/a"]
        for name in ("index/pipe", "index/link"):
            with pytest.raises(ConnectorError):
                await connector.get(name)

    async def test_folders_that_vanish(self, folder: Path, connector: LocalConnector) -> None:
        for path in folder.iterdir():
            shutil.rmtree(path)
        assert await listed(connector) == []
        await connector.put("packs/aa/one", [b"1"], if_absent=True)
        await connector.put("index/two", [b"2"])
        await connector.delete("snapshots/none")
        assert await listed(connector) == ["index/two", "packs/aa/one"]

    async def test_a_swapped_folder_is_not_used(self, folder: Path, connector: LocalConnector) -> None:
        await connector.put("index/a", [b"1"])
        moved = folder.rename(folder.with_name("moved"))
        folder.mkdir()
        await connector.put("packs/aa/one", [bytes(2 * MIB)])
        await connector.put("index/b", [b"2"], if_absent=True)
        assert await connector.get("index/a") == b"1"
        assert await listed(connector) == ["index/a", "index/b", "packs/aa/one"]
        assert files(folder) == set()
        assert files(moved) == {"index/a", "index/b", "packs/aa/one"}

    async def test_a_removed_folder_is_not_made_anew(self, folder: Path, connector: LocalConnector) -> None:
        await connector.put("index/a", [b"1"])
        shutil.rmtree(folder)
        with pytest.raises(TransientError):
            await connector.put("index/b", [b"2"])
        with pytest.raises(NotFound):
            await connector.get("index/a")
        assert not folder.exists()

    async def test_what_killed_processes_left_goes_after_a_day(self, folder: Path) -> None:
        old, new, other = (folder / "tmp" / name for name in ("0" * 32, "1" * 32, "notes"))
        async with LocalConnector(folder) as connector:
            await connector.create()
        for path, age_s in ((old, 90_000), (new, 3_600), (other, 90_000)):
            path.write_bytes(b"")
            os.utime(path, (time.time() - age_s,) * 2)
        async with LocalConnector(folder) as connector:
            await connector.put("index/a", [b"1"])
        assert files(folder) == {"index/a", f"tmp/{new.name}", "tmp/notes"}

    async def test_without_links(
        self, folder: Path, connector: LocalConnector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        won = await race([connector])
        assert [await connector.get("snapshots/a")] == won
        assert files(folder) == {"snapshots/a"}

    async def test_large_objects_pass_the_page_cache_by(self, folder: Path, connector: LocalConnector) -> None:
        data = os.urandom(2 * MIB)
        await connector.put("packs/aa/one", [aligned(data)])
        fd = os.open(folder / "packs/aa/one", os.O_RDONLY)
        try:
            os.preadv(fd, [bytearray(4096)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            pytest.skip(f"this file system does not tell what is cached: {error}")
        finally:
            os.close(fd)
        pytest.skip("this file system caches what is written, or knows no direct writes")


class TestDurability:
    """What a crash of the machine leaves depends on the order of a few calls, and on nothing else that a test sees."""

    @pytest.fixture
    def calls(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
        """The calls that write, name or flush, each with the file or folder it concerns, in order."""
        found: list[tuple[str, str]] = []

        def place(fd: int) -> str:
            path = Path(os.readlink(f"/proc/self/fd/{fd}")).relative_to(folder)
            return "tmp/*" if path.parts[:1] == ("tmp",) else str(path)

        def watch(name: str, told: Callable[..., str]) -> None:
            real = getattr(os, name)

            def call(*arguments: Any, **options: Any) -> Any:
                entry = (name, told(*arguments))
                done = real(*arguments, **options)  # noted when it has succeeded
                if found[-1:] != [entry]:  # a large object is written in several calls
                    found.append(entry)
                return done

            monkeypatch.setattr(os, name, call)

        for name in ("write", "writev", "fdatasync", "fsync"):
            watch(name, lambda fd, *_: place(fd))
        for name in ("link", "rename"):
            watch(name, lambda _, target: target)
        watch("unlink", lambda name: "tmp/*" if name.startswith("tmp/") else name)
        watch("mkdir", lambda name, *_: name)
        return found

    @pytest.mark.parametrize("if_absent", [True, False])
    @pytest.mark.parametrize("size_bytes", [1, 5 * MIB + 3], ids=["small", "large"])
    async def test_put(
        self, connector: LocalConnector, calls: list[tuple[str, str]], if_absent: bool, size_bytes: int
    ) -> None:
        """The data is flushed before it has a name, and the name before `put` returns."""
        await connector.put("packs/aa/one", [aligned(bytes(size_bytes))], if_absent=if_absent)
        writes = [call for call in calls if call[0] in ("write", "writev")]
        assert calls == [
            *writes,
            ("fdatasync", "tmp/*"),
            ("link" if if_absent else "rename", "packs/aa/one"),
            *([("unlink", "tmp/*")] if if_absent else []),
            ("fsync", "packs/aa"),
        ]
        assert writes
        assert {place for _, place in writes} == {"tmp/*"}

    async def test_put_of_what_comes_in(self, connector: LocalConnector, calls: list[tuple[str, str]]) -> None:
        """What is there is written before the rest has come; flushed and named is only the whole."""
        written: list[int] = []

        class Watching(Slowly):
            async def reach(self, size_bytes: int) -> None:
                written.append(sum(path.stat().st_size for path in (connector.path / "tmp").iterdir()))
                await super().reach(size_bytes)

            async def accept(self) -> None:
                await super().accept()
                assert ("fdatasync", "tmp/*") not in calls

        await connector.put_arriving("packs/aa/one", Watching(bytes(9 * MIB + 3)), if_absent=True)
        assert written == [0, 4 * MIB, 8 * MIB, 9 * MIB + 3]
        assert [call for call in calls if call[0] not in ("write", "writev")] == [
            ("fdatasync", "tmp/*"), ("link", "packs/aa/one"), ("unlink", "tmp/*"), ("fsync", "packs/aa"),
        ]  # fmt: skip

    async def test_put_into_a_new_folder(self, connector: LocalConnector, calls: list[tuple[str, str]]) -> None:
        await connector.put("more/below/one", [b"1"])
        flushed = [call for call in calls if call[0] != "writev" and call != ("unlink", "tmp/*")]
        assert flushed == [
            ("fdatasync", "tmp/*"),
            ("mkdir", "more"),
            ("fsync", "."),
            ("mkdir", "more/below"),
            ("fsync", "more"),
            ("rename", "more/below/one"),
            ("fsync", "more/below"),
        ]

    async def test_a_name_that_is_taken(self, connector: LocalConnector, calls: list[tuple[str, str]]) -> None:
        """Who is told so may rely on it: another may have put it just now, and not flushed its folder yet."""
        await connector.put("index/a", [b"1"])
        calls.clear()
        with pytest.raises(AlreadyExists):
            await connector.put("index/a", [b"2"], if_absent=True)
        assert calls == [("fsync", "index")]

    async def test_delete(self, connector: LocalConnector, calls: list[tuple[str, str]]) -> None:
        await connector.put("index/a", [b"1"])
        calls.clear()
        await connector.delete("index/a")
        assert calls == [("unlink", "index/a"), ("fsync", "index")]


class TestErrors:
    def test_every_number_is_mapped(self) -> None:
        expected = {
            errno.ENOENT: NotFound,
            errno.EEXIST: AlreadyExists,
            errno.ENOSPC: StorageFull,
            errno.EDQUOT: StorageFull,
            errno.EACCES: PermissionRefused,
            errno.EPERM: PermissionRefused,
            errno.EROFS: PermissionRefused,
            errno.ENOTDIR: NotStorage,
            errno.ESTALE: TransientError,
            errno.EMFILE: TransientError,
            errno.EIO: ConnectorError,
        }
        for number in errno.errorcode:
            with pytest.raises(ConnectorError, match=r"^/r/index/a: ") as raised, localfiles.mapped("/r/index/a"):
                raise OSError(number, os.strerror(number))
            assert raised.type is expected.get(number, raised.type)

    @pytest.mark.parametrize("single", [True, False])
    async def test_a_full_disk(self, small_disk: Path, single: bool) -> None:
        body = [aligned(os.urandom(20 * MIB + 5))] if single else [os.urandom(MIB)] * 21
        async with LocalConnector(small_disk / "repository") as connector:
            await connector.create()
            await connector.put("index/a", [b"1"])
            for if_absent in (False, True):
                with pytest.raises(StorageFull):
                    await connector.put("packs/aa/one", body, if_absent=if_absent)
                assert files(small_disk / "repository") == {"index/a"}
            await connector.put("packs/aa/two", [aligned(bytes(4 * MIB))])  # the room is free again
            assert await connector.get("index/a") == b"1"

    async def test_a_read_only_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "repository"
        as_root = os.geteuid() == 0
        if as_root:
            mount(folder, "-t", "tmpfs", "tmpfs")
        try:
            async with LocalConnector(folder) as connector:
                await connector.create()
                await connector.put("index/a", [b"1"])
                if as_root:
                    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
                else:
                    for path in (folder / "tmp", folder / "index"):
                        path.chmod(0o500)
                with pytest.raises(PermissionRefused):
                    await connector.put("index/b", [b"2"])
                with pytest.raises(PermissionRefused):
                    await connector.delete("index/a")
                assert await listed(connector) == ["index/a"]
                assert await connector.get("index/a") == b"1"
        finally:
            if as_root:
                subprocess.run(["umount", str(folder)], check=True)
            else:
                for path in (folder / "tmp", folder / "index"):
                    path.chmod(0o700)


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process with a connector `c` for the first argument, running `script` in a coroutine."""
    program = f"""
import anyio, os, random, sys, hashlib
from coffret.connectors.errors import AlreadyExists
from coffret.connectors.local import LocalConnector
async def main():
    async with LocalConnector(sys.argv[1]) as c:
{textwrap.indent(textwrap.dedent(script), " " * 8)}
anyio.run(main)
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


class TestProcesses:
    async def test_of_racing_processes_one_wins(self, folder: Path, connector: LocalConnector) -> None:
        script = """
            print("ready", flush=True)
            sys.stdin.readline()
            for number in range(20):
                try:
                    await c.put(f"snapshots/{number}", [sys.argv[2].encode()], if_absent=True)
                    print(number)
                except AlreadyExists:
                    pass
        """
        racers = [start(script, str(folder), f"racer {number}") for number in range(4)]
        for racer in racers:
            assert racer.stdout and racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin
            racer.stdin.write("go\n")
            racer.stdin.flush()
        won = [[int(line) for line in racer.communicate()[0].split()] for racer in racers]
        assert sorted(number for names in won for number in names) == list(range(20))
        for number, names in enumerate(won):
            for name in names:
                assert await connector.get(f"snapshots/{name}") == f"racer {number}".encode()
        assert len(files(folder)) == 20

    async def test_a_killed_process_leaves_objects_whole_or_absent(
        self, folder: Path, connector: LocalConnector
    ) -> None:
        script = """
            for number in range(1000):
                data = random.randbytes(random.choice([100, 10_000, 3 << 20]))
                name = f"packs/aa/{hashlib.sha256(data).hexdigest()}"
                await c.put(name, [data], if_absent=number % 2 == 0)
                print(name, flush=True)
        """
        put = set()
        for _ in range(6):
            with start(script, str(folder)) as writer:
                assert writer.stdout
                put.add(writer.stdout.readline().strip())
                time.sleep(random.uniform(0, 0.05))
                writer.send_signal(signal.SIGKILL)
                put.update(line.strip() for line in writer.stdout.read().splitlines(keepends=True) if line[-1] == "\n")
        names = await listed(connector)
        assert put <= set(names)
        for name in names:
            assert hashlib.sha256(await connector.get(name)).hexdigest() == name[len("packs/aa/") :]
