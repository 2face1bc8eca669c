"""Streams that say nothing, that do not end, and that can't be read: a backup of them can be stopped, and says why."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.fault_harness import objects
from tests.harness import Program, repository
from tests.processes import await_end, below, left_behind

from coffret.engine import stream
from coffret.engine.errors import SourceError, reported
from coffret.engine.stream import StreamSource

if TYPE_CHECKING:
    import subprocess

pytestmark = pytest.mark.anyio


@pytest.fixture
def program(tmp_path: Path) -> Program:
    made = Program(tmp_path)
    made("create", "--no-encryption")
    return made


def await_lease(program: Program, process: subprocess.Popen[bytes]) -> None:
    """Wait until a backup is at work."""
    while process.poll() is None and not objects(program.repository, "leases"):
        time.sleep(0.01)


def stopped(program: Program, process: subprocess.Popen[bytes], number: int) -> None:
    """A signal ends the backup, and all that it started."""
    processes = below(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"interrupted" in err.splitlines()[-1]
    assert b"Traceback" not in err
    await_end(processes)
    assert not objects(program.repository, "leases")
    assert program("ls", "--json").of_type("item") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_standard_input_says_nothing(program: Program, number: int) -> None:
    silent, writer = os.pipe()
    process = program.start("backup", "-", stdin=silent)
    os.close(silent)
    await_lease(program, process)
    stopped(program, process, number)
    os.close(writer)


@pytest.mark.parametrize("command", ["sleep 1000", "sh -c 'echo x; sleep 1000 & sleep 1000'", "sh -c 'sleep 1000 &'"])
def test_a_command_says_nothing(program: Program, command: str) -> None:
    """It is ended with what it started, even if it has ended itself and that keeps its output open."""
    process = program.start("backup", "--stdin-command", command)
    while process.poll() is None and not any("sleep" in _name(pid) for pid in _session_members(process.pid)):
        time.sleep(0.01)
    members = _session_members(process.pid)
    assert members
    stopped(program, process, signal.SIGTERM)
    await_end([(pid, _start(pid)) for pid in members if _start(pid)])


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _start(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _session_members(parent: int) -> list[int]:
    """Processes of the sessions that children of a process lead."""
    leaders: set[str] = set()
    for task in Path(f"/proc/{parent}/task").iterdir():
        leaders.update((task / "children").read_text().split())  # one that has ended and was not waited for leads on
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if (fields := _stat(pid)) and fields[3] in leaders]


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_what_a_command_started_keeps_its_output_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows whether more is to come: that is no snapshot."""
    monkeypatch.setattr(stream, "_SILENCE_S", 0.05)
    async with repository(tmp_path) as opened:
        with anyio.fail_after(60), pytest.raises(BaseException) as raised:
            await opened.backup(StreamSource(b"x", "sh -c 'echo x; sleep 1000 &'"))
        known = reported(raised.value)
        assert isinstance(known, SourceError)
        assert "keeps its output open" in str(known)
        # One that is slow, and not at its end, is waited for.
        made = await opened.backup(StreamSource(b"x", "sh -c 'for n in 1 2 3; do sleep 0.2; echo $n; done'"))
        assert made.counts.size_bytes == 6
    assert not left_behind()


def test_standard_input_that_does_not_block(program: Program) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    process = program.start("backup", "-", "--json", stdin=reader)
    os.close(reader)
    await_lease(program, process)
    for part in (b"first", b"second"):
        time.sleep(0.1)
        os.write(writer, part)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    program("restore", "--to", "target", "latest")
    assert (program.home / "target" / "stdin").read_bytes() == b"firstsecond"


def test_standard_input_that_can_not_be_read(program: Program) -> None:
    for_writing = os.open(program.home / "file", os.O_WRONLY | os.O_CREAT)
    process = program.start("backup", "-", stdin=for_writing)
    os.close(for_writing)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(b"coffret: standard input: Bad file descriptor"), err
    assert program("ls", "--json").of_type("item") == []
