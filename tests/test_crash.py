"""`kill -9` of a worker and of the main process at random moments, and full disks: nothing stored is lost.

The moments are random but the same in each run; COFFRET_TEST_ROUNDS=20 makes a campaign, COFFRET_TEST_SEED another one.
They are counted from when workers are there, and a limited rate keeps the program at work beyond the last of them, on
any machine: so most have to hit.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from tests import fault_harness
from tests.fault_harness import ROUNDS, SEED, contents, make_source, objects
from tests.harness import Program, interpreter, needs_root
from tests.processes import await_end, below, shared_memory, slept, workers_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A repository, and a source that takes some tenths of a second."""
    fault_harness.create(tmp_path, encrypted=False)
    make_source(tmp_path / "source", files=600, large_bytes=24 << 20)
    return tmp_path


def moments(what: str, count: int, longest_s: float) -> list[float]:
    """When to kill (s after there are workers)."""
    rng = random.Random(f"{SEED} {what}")
    return [round(rng.uniform(0.0, longest_s), 3) for _ in range(count * ROUNDS)]


def await_workers(process: subprocess.Popen[bytes]) -> list[int]:
    """Wait until a command has worker processes, and return them."""
    while not (workers := workers_of(process.pid)):
        assert process.poll() is None, "it ended"
        time.sleep(0.002)
    return workers


def whole(program: Program, source: Path) -> None:
    """A backup, a check and a restore are as if nothing had happened."""
    summary = program.backup(source)
    assert summary["errors"] == 0
    program("check")
    target = program.home / "whole"
    program("restore", "latest", "--to", target)
    assert contents(target) == contents(source)
    shutil.rmtree(target)


@pytest.mark.parametrize("command", ["backup", "restore", "check"])
def test_worker_killed(home: Path, command: str) -> None:
    """One worker less: the command fails and says why, at once."""
    program, source, target = Program(home), home / "source", home / "target"
    words: dict[str, list[str | Path]] = {
        "backup": ["backup", source, "--limit-upload", "8M"],
        "restore": ["restore", "latest", "--limit-download", "1M", "--to", target],
        "check": ["check", "--limit-download", "1M"],
    }
    if command != "backup":
        program("backup", source)
    times, hits = moments(f"worker {command}", 3, 0.6), 0
    for turn, after_s in enumerate(times):
        (source / "fresh").write_bytes(random.Random(turn).randbytes(48 << 20))
        shutil.rmtree(target, ignore_errors=True)
        process = program.start(*words[command])
        # Of a backup the workers may have read everything long before it is stored: so one stands still meanwhile.
        stopped = random.Random(turn).choice(await_workers(process))
        if command == "backup":
            os.kill(stopped, signal.SIGSTOP)
        slept(process, after_s)
        processes = below(process.pid)
        if stopped in workers_of(process.pid):
            os.kill(stopped, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert b"Traceback" not in err, err.decode()
        if process.returncode:
            assert process.returncode == 1, (out, err)
            last = err.decode().splitlines()[-1]
            assert "worker" in last, err
            assert "SIGKILL" in last, err
            hits += 1
        await_end(processes)
        assert not objects(program.repository, "leases")
        assert not objects(program.repository, "tmp")
    assert 3 * hits >= 2 * len(times)
    whole(program, source)


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_main_killed(home: Path, command: str) -> None:
    """Its workers end by themselves, and the next backup is good, with whatever lies about."""
    program, source = Program(home), home / "source"
    if command == "restore":
        program("backup", source)
    shared = shared_memory()
    times, hits = moments(f"main {command}", 4 if command == "backup" else 3, 1.0), 0
    for turn, after_s in enumerate(times):
        (source / "fresh").write_bytes(random.Random(turn).randbytes(12 << 20))
        target = home / f"target{turn}"
        words: dict[str, list[str | Path]] = {
            "backup": ["backup", source, "--limit-upload", "1M"],
            "restore": ["restore", "latest", "--limit-download", "1M", "--to", target],
        }
        process = program.start(*words[command])
        await_workers(process)
        slept(process, after_s)
        processes = below(process.pid)
        process.kill()
        process.communicate(timeout=60)
        hits += process.returncode == -signal.SIGKILL
        await_end(processes)
        assert shared_memory() <= shared
        if turn % 2:
            program("check")
    assert 3 * hits >= 2 * len(times)
    whole(program, source)


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of that size."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@needs_root
def test_full_repository(tmp_path: Path) -> None:
    """Exit code 13; what was stored stays good, and with more space the next run is."""
    with small_disk(tmp_path / "disk", 40 << 20) as disk:
        (tmp_path / "repository").symlink_to(disk / "repository")
        program = Program(tmp_path)
        program("create", "--no-encryption")
        source = make_source(tmp_path / "source", files=200, large_bytes=16 << 20)
        program("backup", source)
        first = contents(source)
        (source / "too much").write_bytes(random.Random(1).randbytes(64 << 20))
        for _ in range(2):
            outcome = program("backup", source, code=13)
            assert outcome.stderr.splitlines()[-1].startswith("coffret: "), str(outcome)
            assert "free some space" in outcome.stderr
            assert not objects(disk / "repository", "leases")
            assert not objects(disk / "repository", "tmp")
        # Full to the last byte: not even a lease fits.
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(1 << 16))
        program("backup", source, code=13)
        program("ls")
        program("check")
        filler.unlink()
        program("restore", "latest", "--to", tmp_path / "target")
        assert contents(tmp_path / "target") == first
        subprocess.run(["mount", "-o", f"remount,size={200 << 20}", disk], check=True)
        whole(program, source)


@needs_root
def test_full_target(tmp_path: Path) -> None:
    """Exit code 13, nothing half written; a restore goes on where it was when there is space."""
    program = Program(tmp_path)
    program("create", "--no-encryption")
    source = make_source(tmp_path / "source", files=500, large_bytes=24 << 20)
    for number in range(20):
        (source / f"medium{number}").write_bytes(random.Random(number).randbytes(1 << 20))
    program("backup", source)
    expected = contents(source)
    with small_disk(tmp_path / "disk", 30 << 20) as disk:
        outcome = program("restore", "latest", "--to", disk / "target", code=13)
        assert "No space left" in outcome.stderr
        for name, content in contents(disk / "target").items():
            assert expected.get(name) == content, f"{name} is left half written"
        subprocess.run(["mount", "-o", f"remount,size={200 << 20}", disk], check=True)
        program("restore", "latest", "--to", disk / "target", "--overwrite", "if-changed")
        assert contents(disk / "target") == expected


@needs_root
def test_full_cache(tmp_path: Path) -> None:
    """A cache that can't grow stops no backup, or says that the space is short."""
    with small_disk(tmp_path / "cache", 64 << 10):
        program = Program(tmp_path)
        program("create", "--no-encryption")
        source = make_source(tmp_path / "source", files=3000, large_bytes=1 << 20)
        outcome = program("backup", source, code=None)
        assert outcome.code in (0, 13), str(outcome)
        program("--no-cache", "backup", source)
        program("--no-cache", "check")


@needs_root
def test_container_sized_shared_memory(tmp_path: Path) -> None:
    """Nothing of what is shared with workers lies in /dev/shm, which containers give 64 MB, here 1 MB."""
    program = Program(tmp_path)
    program("create", "--no-encryption")
    source = make_source(tmp_path / "source", files=100, large_bytes=64 << 20)
    script = """mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77
    for words in "backup source" check "restore latest --to target"; do "$0" -m coffret $words || exit 1; done"""
    python, search_path = interpreter(None)
    done = subprocess.run(
        ["unshare", "-m", "/bin/sh", "-c", script, python],
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": search_path,
            "HOME": str(tmp_path),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "XDG_STATE_HOME": str(tmp_path / "state"),
            "COFFRET_REPOSITORY": str(program.repository),
        },
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 77 or b"unshare" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.decode().strip()}")
    assert done.returncode == 0, done.stderr.decode()
    assert contents(tmp_path / "target") == contents(source)
