"""What a backup owes to the machine it runs on: bounded memory, its page cache as it was, a passphrase nobody sees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests import fault_harness
from tests.fault_harness import PASSPHRASE
from tests.harness import Program
from tests.processes import below

MIB = 1 << 20


def cached(path: Path) -> list[bool]:
    """Whether the pages at 16 places of a file lie in the page cache; the test is skipped where that is not told."""
    fd, found = os.open(path, os.O_RDONLY), []
    try:
        for place in range(16):
            try:
                found.append(os.preadv(fd, [bytearray(1)], path.stat().st_size * place // 16, os.RWF_NOWAIT) == 1)
            except BlockingIOError:
                found.append(False)
            except OSError as error:
                pytest.skip(f"this file system does not tell what is cached: {error}")
    finally:
        os.close(fd)
    return found


@pytest.mark.parametrize("size_bytes", [40_000, 12 * MIB], ids=["small", "large"])
def test_what_others_read_stays_in_the_page_cache(tmp_path: Path, size_bytes: int) -> None:
    """A backup does not make a server's working set be forgotten."""
    fault_harness.create(tmp_path, encrypted=False)
    program, source = Program(tmp_path), tmp_path / "source"
    source.write_bytes(os.urandom(size_bytes))
    with source.open("rb") as file:
        os.fsync(file.fileno())  # what is not on the disk yet can't be forgotten, and would prove nothing
    source.read_bytes()
    assert all(cached(source))
    program("backup", source)
    assert all(cached(source))


@pytest.mark.parametrize("child", ["sleep", "coffret.engine.chunkworker"])
def test_nobody_sees_the_passphrase(tmp_path: Path, child: str) -> None:
    """Neither on a command line, nor in the environment of a worker or of a command that is run."""
    fault_harness.create(tmp_path)
    (tmp_path / "source").write_bytes(os.urandom(40 * MIB))
    program = Program(tmp_path, environment={"COFFRET_PASSPHRASE": PASSPHRASE})
    words = {
        "sleep": ["--stdin-command", "sleep 60", "--stdin-name", "slow"],
        "coffret.engine.chunkworker": [str(tmp_path / "source"), "--limit-upload", "2M"],
    }
    process = program.start("backup", *words[child])
    secret, seen = PASSPHRASE.encode(), list[Path]()
    try:
        # One that has not begun its program yet still is what it was forked from.
        while not seen:
            assert process.poll() is None
            places = [Path(f"/proc/{pid}") for pid, _ in below(process.pid)]
            seen = [place for place in places if child.encode() in (place / "cmdline").read_bytes().split(b"\0")]
        for place in (Path(f"/proc/{process.pid}"), *seen):
            assert secret not in (place / "cmdline").read_bytes()
        assert not [place for place in seen if secret in (place / "environ").read_bytes()]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_directory_of_200_000_entries(tmp_path: Path) -> None:
    """It is backed up, told apart from the next time, and listed, in memory that does not grow with it."""
    fault_harness.create(tmp_path, encrypted=False)
    source = tmp_path / "source"
    source.mkdir()
    fd = os.open(source, os.O_RDONLY)
    (source / "first").touch()
    for number in range(199_999):
        # Links to few files: as many entries, and few inodes.
        if number % 50_000 == 0:
            (source / f"file{number:06d}").write_text(str(number))
        else:
            os.link(f"file{number // 50_000 * 50_000:06d}", f"file{number:06d}", src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)
    # Address space is what can be limited: of all the processes each by itself.
    limited = Program(tmp_path, prefix=("sh", "-c", 'ulimit -v 1500000; exec "$0" "$@"'))
    first = limited.backup(source)
    assert (first["files"], first["errors"]) == (200_000, 0)
    (source / "file100001").unlink()
    second = limited.backup(source)
    assert (second["files"], second["new"], second["errors"]) == (199_999, 0, 0)
    assert limited("ls", f"latest:{source}").stdout.count("\n") == 199_999
