"""What is backed up: the paths that are named, whatever they are; trees that change meanwhile; streams."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import stat
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from tests.harness import IS_ROOT, NOBODY, Program, Recorder, repository, scratch

from coffret.engine import chunkworker
from coffret.engine._read import SmallReader
from coffret.engine.chunkworker import Worker
from coffret.engine.dedup import dedup_stage
from coffret.engine.filters import Filters
from coffret.engine.frames import put_frame, take_frames
from coffret.engine.ops.backup import BackupOptions, BackupSummary
from coffret.engine.pipeline import Limits
from coffret.engine.records import refs_length
from coffret.engine.scan import Scanner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator

    from coffret.engine.filters import FilterScope
    from coffret.engine.flow import Channel, Sender
    from coffret.engine.messages import RawBlock, Run, ScanPage
    from coffret.engine.repository import Repository

MIB = 1 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One loop is enough for what is tested here."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def program(place: Path) -> Program:
    """The program, with a repository beside a directory `source`."""
    made = Program(place)
    made("create", "--no-encryption")
    for name in ("one/a", "one/sub/b", "two/c", "file"):
        path = place / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return made


def listed(program: Program, below: Path) -> dict[str, str]:
    """Path below a directory → type, of what the latest snapshot holds there."""
    prefix = os.fsencode(below) + b"/"
    return {
        os.fsdecode(path.removeprefix(prefix)): entry["type"]
        for path, entry in program.listing().items()
        if path.startswith(prefix)
    }


class TestPaths:
    def test_several(self, program: Program) -> None:
        source = program.home / "source"
        made = program.backup(source / "two", source / "file", source / "one" / "sub")
        assert made["paths"] == sorted(str(source / name) for name in ("two", "file", "one/sub"))
        assert made["files"] == 3
        assert set(listed(program, source)) == {"file", "one", "one/sub", "one/sub/b", "two", "two/c"}

    def test_overlapping_ones_are_merged(self, program: Program) -> None:
        source = program.home / "source"
        made = program.backup(source / "one" / "sub", source, source, source / "one", f"{source}/two/")
        assert made["paths"] == [str(source)]
        assert made["files"] == 4
        # A name that only begins alike is no part of it.
        (program.home / "source-2").mkdir()
        made = program.backup(source, program.home / "source-2")
        assert made["paths"] == [str(source), f"{source}-2"]

    def test_relative_ones(self, program: Program) -> None:
        source = program.home / "source"
        assert program.backup(cwd=source)["paths"] == [str(source)]
        assert program.backup("one", "../source/two/c", cwd=source)["paths"] == [f"{source}/one", f"{source}/two/c"]
        assert program.backup("..", cwd=source / "two")["paths"] == [str(source)]

    def test_a_link_is_followed_where_it_is_named(self, program: Program) -> None:
        source = program.home / "source"
        (source / "bin").symlink_to("one")
        (source / "text").symlink_to("../source/file")
        (source / "dangling").symlink_to("nowhere")
        (source / "loop").symlink_to("loop")
        program.backup(source)
        assert listed(program, source)["bin"] == listed(program, source)["text"] == "symlink"
        made = program("push", "--json", "-v", "bin", "text", "dangling", cwd=source).summary
        assert made["paths"] == [f"{source}/{name}" for name in ("bin", "dangling", "text")]
        types = {"bin": "directory", "bin/a": "file", "bin/sub": "directory", "bin/sub/b": "file"}
        assert listed(program, source) == {**types, "text": "file", "dangling": "symlink"}
        # Named along with a directory around it, it is followed too.
        made = program.backup("bin", ".", "text", cwd=source)
        assert made["paths"] == [str(source)]
        found = listed(program, source)
        assert {name: found[name] for name in types} == types
        assert (found["text"], found["dangling"], found["loop"]) == ("file", "symlink", "symlink")
        program.backup("loop", code=3, cwd=source)

    def test_a_path_that_is_not_utf8(self, program: Program) -> None:
        path = os.fsencode(program.home) + b"/na\xefve\n"
        Path(os.fsdecode(path)).mkdir()
        Path(os.fsdecode(path + b"/\xff")).write_text("x")
        program.backup(path)
        assert path + b"/\xff" in program.listing()

    def test_one_is_missing(self, program: Program) -> None:
        source = program.home / "source"
        outcome = program("backup", "--json", source / "nothing", source / "file" / "below", source / "one", code=3)
        assert outcome.summary["errors"] == 2
        assert outcome.faults == {
            os.fsencode(source / "nothing"): "No such file or directory",
            os.fsencode(source / "file" / "below"): "Not a directory",
        }
        assert set(listed(program, source)) == {"one", "one/a", "one/sub", "one/sub/b"}
        assert [item["errors"] for item in program("ls", "--json").of_type("item")] == [2]

    def test_all_are_missing(self, program: Program) -> None:
        outcome = program("backup", "nothing", "nobody", code=1)
        assert "No such file or directory" in outcome.stderr
        assert program("ls", "--json").of_type("item") == []

    def test_what_is_not_readable(self) -> None:
        uid = NOBODY if IS_ROOT else os.geteuid()
        with scratch(uid=uid) as place:
            program = Program(place, uid=uid)
            program("create", "--no-encryption")
            source = place / "source"
            source.mkdir()
            (source / "closed-directory").mkdir()
            (source / "closed-directory" / "inside").touch()
            for name in ("closed", "open"):
                (source / name).write_text(name)
            for path in (source, *source.iterdir()):
                os.chown(path, uid, uid)
                path.chmod(0 if "closed" in path.name else 0o755)
            outcome = program("backup", "--json", source, code=3)
            denied = {os.fsencode(source / name): "Permission denied" for name in ("closed", "closed-directory")}
            assert outcome.faults == denied
            assert listed(program, source) == {"open": "file", "closed-directory": "directory"}
            program("restore", "--to", "target", "latest")
            assert sorted(os.listdir(place / "target")) == ["closed-directory", "open"]


class TestOwnPlaces:
    def test_are_left_out(self, program: Program) -> None:
        """The repository, the cache and the state lie in what is backed up."""
        first = program.backup(program.home)
        assert first["errors"] == 0
        names = {name.partition("/")[0] for name in listed(program, program.home)}
        assert names == {"source", "cache", "state"}
        assert not any("coffret" in name for name in listed(program, program.home))
        second = program.backup(program.home)
        assert second["files"] == first["files"] == 4
        # By device and inode: a link to it is as good as its name.
        (program.home / "alias").symlink_to("repository")
        program.with_environment(COFFRET_REPOSITORY=str(program.home / "alias")).backup(program.home)
        assert "repository" not in listed(program, program.home)

    def test_one_that_is_named_is_reported(self, program: Program) -> None:
        outcome = program("backup", "--json", program.repository, program.home / "source", code=3)
        assert list(outcome.faults) == [os.fsencode(program.repository)]
        assert outcome.summary["files"] == 4


# Sources that move ----------------------------------------------------------------------------------------------------


async def back_up(
    opened: Repository, source: Path, *, filters: Filters | None = None, slabs: int = 4
) -> tuple[BackupSummary, dict[bytes, str]]:
    """(summary, faults by path below the source) of a backup with one worker."""
    progress = Recorder()
    options = BackupOptions(filters=filters, limits=Limits(workers=1, slabs=slabs))
    made = await opened.backup([os.fsencode(source)], options, progress)
    assert made.counts.errors == len(progress.faults)
    assert {fault.path: fault.reason for fault in made.snapshot.header.faults} == progress.faults
    below = os.fsencode(source) + b"/"
    return made, {path.removeprefix(below): reason for path, reason in progress.faults.items()}


def contents_of(directory: Path) -> dict[str, bytes]:
    """The content of all files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


async def restored(opened: Repository, made: BackupSummary, target: Path) -> dict[str, bytes]:
    """The content of the files that come back."""
    summary = await opened.restore(made.snapshot, os.fsencode(target))
    assert summary.errors == 0
    return contents_of(target)


def after_the_scan(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Call `change` when everything is scanned and nothing is read: no page leaves the scan before."""
    pages: list[ScanPage] | None = None
    real = Scanner.next

    def next_pages(self: Scanner, count: int) -> list[ScanPage]:
        nonlocal pages
        if pages is None:
            pages = []
            while found := real(self, count):
                pages += found
            change()
        given, pages[:] = pages[:count], pages[count:]
        return given

    monkeypatch.setattr(Scanner, "next", next_pages)


def after_the_first_slab(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Call `change` when the first slab of a large file is full: if there is no other, nothing more is read before."""

    class Watched:
        def __init__(self, inbox: Channel[Run]) -> None:
            self.inbox, self.done = inbox, False

        async def __aiter__(self) -> AsyncIterator[Run]:
            async for run in self.inbox:
                if run.slab is not None and not self.done:
                    self.done = True
                    change()
                yield run

    async def watched_stage(inbox: Channel[Run], outbox: Sender[RawBlock], **others: Any) -> None:
        await dedup_stage(Watched(inbox), outbox, **others)  # type: ignore[arg-type]

    monkeypatch.setattr("coffret.engine.pipeline.dedup_stage", watched_stage)


class ChangingFilters(Filters):
    """Filters that leave nothing out, but call `change` when a directory has been listed and its entries not yet."""

    def __init__(self, directory: Path, change: Callable[[], None]) -> None:
        super().__init__()
        self._directory, self._change = os.fsencode(directory)[1:], change

    def enter(
        self,
        directory: bytes,
        names: Collection[bytes],
        read: Callable[[bytes], bytes | None],
        parent: FilterScope | None,
    ) -> FilterScope:
        if directory == self._directory:
            self._change()
        return super().enter(directory, names, read, parent)


@pytest.mark.anyio
class TestMovingSource:
    async def test_between_scan_and_read(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = place / "source"
        random = Random(3)
        contents: dict[str, bytes] = {}
        for name in ("vanishes", "fifo", "directory", "link", "socket", "grows", "shrinks", "outgrows", "stays"):
            for size, kind in ((3000, "small"), (6 * MIB, "large")):
                path = source / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                contents[f"{kind}/{name}"] = random.randbytes(size)
                path.write_bytes(contents[f"{kind}/{name}"])

        def change() -> None:
            for kind in ("small", "large"):
                for name in ("vanishes", "fifo", "directory", "link", "socket"):
                    (source / kind / name).unlink()
                    del contents[f"{kind}/{name}"]
                os.mkfifo(source / kind / "fifo")
                (source / kind / "directory").mkdir()
                (source / kind / "link").symlink_to("stays")
                os.mknod(source / kind / "socket", stat.S_IFSOCK | 0o600)
                # What is longer or shorter than the scan saw is whole when it is read: no fault.
                for name, content in (
                    ("grows", contents[f"{kind}/grows"] * 2),
                    ("shrinks", contents[f"{kind}/shrinks"][:100]),
                    ("outgrows", random.randbytes(9 * MIB)),
                ):
                    (source / kind / name).write_bytes(content)
                    contents[f"{kind}/{name}"] = content

        after_the_scan(monkeypatch, change)
        async with repository(place) as opened:
            made, faults = await back_up(opened, source)
            reasons = {
                "vanishes": "No such file or directory",
                "fifo": "is no regular file any more",
                "directory": "is no regular file any more",
                "link": "Too many levels of symbolic links",
                "socket": "No such device or address",
            }
            assert faults == {
                f"{kind}/{name}".encode(): reason for kind in ("small", "large") for name, reason in reasons.items()
            }
            assert made.counts.files == len(contents)
            assert await restored(opened, made, place / "target") == contents

    @pytest.mark.parametrize("how", ["grows", "shrinks", "is rewritten", "vanishes"])
    async def test_while_it_is_read(self, place: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        source = place / "source"
        source.mkdir()
        content, file = Random(7).randbytes(20 * MIB), source / "large"
        file.write_bytes(content)
        (source / "small").write_text("small")
        os.utime(file, ns=(0, 0))

        def change() -> None:
            with file.open("r+b") as opened_file:
                if how == "grows":
                    opened_file.seek(0, os.SEEK_END)
                    opened_file.write(b"more")
                elif how == "shrinks":
                    opened_file.truncate(12 * MIB + 5)
                elif how == "is rewritten":
                    opened_file.seek(-6, os.SEEK_END)
                    opened_file.write(b"edited")
            if how == "vanishes":
                file.unlink()

        expected = {"shrinks": content[: 12 * MIB + 5], "is rewritten": content[:-6] + b"edited"}.get(how, content)
        after_the_first_slab(monkeypatch, change)
        async with repository(place) as opened:
            made, faults = await back_up(opened, source, slabs=1)
            # An open file stays readable when its name is gone.
            assert faults == ({} if how == "vanishes" else {b"large": "changed while it was read"})
            found = await restored(opened, made, place / "target")
            assert found == {"large": expected, "small": b"small"}
            # The next backup reads it once more.
            monkeypatch.undo()
            if how != "vanishes":
                again, faults = await back_up(opened, source)
                assert faults == {}
                assert again.counts.read_bytes >= file.stat().st_size
                shutil.rmtree(place / "target")
                assert (await restored(opened, again, place / "target"))["large"] == file.read_bytes()

    async def test_a_sparse_file_that_is_emptied(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = place / "source"
        source.mkdir()
        with (source / "sparse").open("wb") as file:
            file.write(Random(1).randbytes(20 * MIB))
            file.truncate(60 * MIB)
        after_the_first_slab(monkeypatch, lambda: os.truncate(source / "sparse", 0))
        async with repository(place) as opened:
            made, faults = await back_up(opened, source, slabs=1)
            assert faults == {b"sparse": "changed while it was read"}
            assert len((await restored(opened, made, place / "target"))["sparse"]) == 60 * MIB

    async def test_while_it_is_scanned(self, place: Path) -> None:
        """Listed and gone; a directory gone, or another thing, before it was its turn."""
        source = place / "source"
        for name in ("a/file", "gone-directory/inside", "file-now/inside", "z/file", "changed"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(name)
        (source / "gone").touch()

        def before() -> None:
            (source / "gone").unlink()
            (source / "changed").unlink()
            (source / "changed").mkdir()

        def between() -> None:
            shutil.rmtree(source / "gone-directory")
            shutil.rmtree(source / "file-now")
            (source / "file-now").touch()

        async with repository(place) as opened:
            made, faults = await back_up(opened, source, filters=ChangingFilters(source, before))
            assert faults == {b"gone": "No such file or directory", b"changed": "is no regular file any more"}
            made, faults = await back_up(opened, source, filters=ChangingFilters(source / "a", between))
            assert faults == {b"gone-directory": "No such file or directory", b"file-now": "Not a directory"}
            found = await restored(opened, made, place / "target")
            assert found == {"a/file": b"a/file", "z/file": b"z/file"}
            assert (place / "target" / "changed").is_dir()


class TestWorker:
    """A worker of the pool in a thread of this process, so that a small file can be changed under its eyes."""

    def test_a_small_file_changes_while_it_is_read(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        changes: dict[str, Callable[[Path], object]] = {
            "stays": lambda path: None,
            "grows": lambda path: os.truncate(path, path.stat().st_size + 4),
            "shrinks": lambda path: os.truncate(path, 1000),
            "is emptied": lambda path: os.truncate(path, 0),
            "vanishes": lambda path: path.unlink(),
            "outgrows": lambda path: os.truncate(path, 40 * MIB),
        }
        contents = {name: Random(name).randbytes(327_680) for name in changes}
        for name, content in contents.items():
            (place / name).write_bytes(content)
            with (place / f"{name}, sparse").open("wb") as file:
                file.seek(2 * MIB)
                file.write(content)
                file.truncate(3 * MIB)
        real_preadv, seen = os.preadv, set()

        def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            """Change each file before the first byte is read."""
            if (inode := os.fstat(fd).st_ino) not in seen:
                seen.add(inode)
                path = Path(os.readlink(f"/proc/self/fd/{fd}"))
                changes[path.name.partition(",")[0]](path)
            return real_preadv(fd, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", preadv)
        # What the compiled reader meets half changed it leaves to this, as it leaves all that is unusual.
        monkeypatch.setattr(chunkworker, "SmallReader", NothingUsual)
        paths = [os.fsencode(place / name) for each in changes for name in (each, f"{each}, sparse")]
        with worker(slab_bytes=16 * MIB) as ask:
            _, _, slab, (_, stats, contents_there, _, results) = ask("batch", paths)
        assert stats == b""
        assert contents_there == [None] * len(paths)
        by_name = {os.fsdecode(os.path.basename(path)): results[index] for index, path in enumerate(paths)}
        noted = {name for name, result in by_name.items() if result[-1]}
        assert {by_name[name][-1] for name in noted} == {"changed while it was read"}
        unharmed = {"stays", "vanishes"}
        assert noted == {name for name in by_name if name.partition(",")[0] not in unharmed}
        lengths = {"shrinks": 1000, "is emptied": 0}
        offset = 0
        for name, (fields, _, refs, extents, _, _) in by_name.items():
            how, _, sparse = name.partition(",")
            data = bytes(slab[offset : offset + refs_length(refs)])
            offset += len(data)
            if sparse:
                assert fields[3] == 3 * MIB
                assert extents, "no extents would mean a file without holes"
                assert data == (b"" if how in lengths else contents[how])
            else:
                assert fields[3] == len(data) == lengths.get(how, 327_680)
                assert data == contents[how][: len(data)]
                assert extents == b""

    def test_files_that_fail_cost_no_slab(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk with bad sectors: a worker that lost a slab with each would wait for one forever."""
        (place / "large").write_bytes(bytes(20 * MIB))
        real_preadv, bad = os.preadv, True

        def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if bad and len(buffers[0]) > MIB:
                raise OSError(errno.EIO, "Input/output error")
            return real_preadv(fd, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", preadv)
        path = os.fsencode(place / "large")
        with worker(slab_bytes=16 * MIB) as ask:
            for _ in range(3):
                assert ask("file", path) == ("file", 1, "Input/output error")
            bad = False
            assert ask("file", path)[0] == "piece"


class NothingUsual(SmallReader):
    """Leaves every file to the worker's careful reading."""

    def read(self, path: bytes, at: int) -> int:
        return -1


@contextmanager
def worker(*, slab_bytes: int) -> Iterator[Callable[..., tuple[Any, ...]]]:
    """A function that sends a worker one job and returns its answer, with the slab's bytes instead of its number."""
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("slabs")
    os.ftruncate(memory, slab_bytes)

    def run() -> None:
        with suppress(EOFError), theirs:
            Worker(theirs.fileno(), memory, 0, 1, slab_bytes).run()

    def ask(kind: str, argument: object) -> tuple[Any, ...]:
        put_frame(ours.fileno(), (kind, 1, argument))
        received, answers = bytearray(), list[Any]()
        while not answers:
            data = ours.recv(1 << 16)
            assert data, "the worker is dead"
            received += data
            answers = list(take_frames(received))
        answer, job, *rest = answers[0]
        if answer != "file":
            rest[0] = os.pread(memory, slab_bytes, rest[0] * slab_bytes)
        return answer, job, *rest

    thread = threading.Thread(target=run)
    with ours:
        thread.start()
        put_frame(ours.fileno(), ("keys", bytes(32), ("fastcdc-gear64", MIB // 2, MIB, 4 * MIB), bytes(32), [0]))
        yield ask
    thread.join()
    os.close(memory)


# Streams --------------------------------------------------------------------------------------------------------------


class TestStandardInput:
    def test_a_large_stream_comes_back(self, program: Program) -> None:
        part = Random(2).randbytes(3 * MIB + 7)
        content = b"".join(part[number * 1000 :] + b"%d" % number for number in range(34))
        assert len(content) > 100_000_000
        made = program.backup("-", "--stdin-name", "dump.sql", stdin=content)
        assert made["paths"] == ["/dump.sql"]
        assert (made["files"], made["size_bytes"], made["errors"]) == (1, len(content), 0)
        program("restore", "--to", "target", "latest")
        file = program.home / "target" / "dump.sql"
        assert os.listdir(file.parent) == ["dump.sql"]
        assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(content).digest()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        again = program.backup("-", "--stdin-name", "dump.sql", stdin=content)
        assert again["bytes_added"] < 10_000
        program("restore", "--to", "other", "latest:/dump.sql")
        assert os.listdir(program.home / "other") == ["dump.sql"]
        program("check")

    @pytest.mark.parametrize("size", [1, 512 * 1024, 8 * MIB, 8 * MIB + 1])
    def test_sizes(self, program: Program, size: int) -> None:
        content = Random(size).randbytes(size)
        program.backup("-", stdin=content)
        program("restore", "--to", "target", "latest")
        assert (program.home / "target" / "stdin").read_bytes() == content

    def test_an_empty_stream_is_reported(self, program: Program) -> None:
        outcome = program("backup", "-", "--stdin-name", "x", "--json", code=3)
        assert outcome.faults == {b"/x": "the stream was empty"}
        program("restore", "--to", "target", "latest")
        assert (program.home / "target" / "x").read_bytes() == b""

    def test_a_command(self, program: Program) -> None:
        made = program.backup("--stdin-command", "echo 'two  words' $HOME", "--stdin-name", "name")
        assert made["paths"] == ["/name"]
        program("restore", "--to", "target", "latest")
        # As in the passphrase's command there is no shell.
        assert (program.home / "target" / "name").read_bytes() == b"two  words $HOME\n"

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            ("false", "exit code 1"),
            ("sh -c 'head -c 30000000 /dev/urandom; exit 7'", "exit code 7"),
            ("sh -c 'echo much; kill -9 $$'", "killed by SIGKILL"),
            ("/no/such/command", "No such file or directory"),
            ("unfinished 'quote", "no command line"),
            ("", "command"),
        ],
    )
    def test_a_command_that_fails(self, program: Program, command: str, words: str) -> None:
        """There must be no snapshot that could be taken for a good one."""
        outcome = program("backup", "--stdin-command", command, code=None)
        assert outcome.code == (1 if command else 2), str(outcome)
        assert words in outcome.stderr
        assert program("ls", "--json").of_type("item") == []
        assert list((program.repository / "leases").iterdir()) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            ["-", "source"],
            ["source", "--stdin-command", "echo"],
            ["-", "--stdin-command", "echo"],
            ["source", "--stdin-name", "x"],
            ["-", "--stdin-name", "a/b"],
            ["-", "--stdin-name", ""],
            ["-", "--stdin-name", ".."],
            ["-", "--stdin-name", "x" * 256],
        ],
    )
    def test_what_makes_no_sense(self, program: Program, arguments: list[str]) -> None:
        program("backup", *arguments, code=2)
        assert program("ls", "--json").of_type("item") == []
