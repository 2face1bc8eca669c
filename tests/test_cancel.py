"""Ctrl-C, SIGTERM and SIGHUP at any moment, a reader that goes away: all ends, nothing is left, the next run is good.

The moments are random but the same in each run; COFFRET_TEST_ROUNDS=20 makes a campaign, COFFRET_TEST_SEED another one.
They are counted from when the program proper begins, and a limited rate keeps it at work beyond the last of them, on
any machine: so most have to hit.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests import fault_harness
from tests.fault_harness import ROUNDS, SEED, contents, make_source, objects
from tests.harness import ROOT, Program, interpreter
from tests.processes import await_end, below, shared_memory, slept

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A repository, and a source that takes some tenths of a second."""
    fault_harness.create(tmp_path, encrypted=False)
    make_source(tmp_path / "source", files=600, large_bytes=32 << 20)
    return tmp_path


def interrupt(program: Program, number: int, after_s: float, *arguments: str | Path) -> tuple[int, str]:
    """Start a command and send it a signal; return its exit code and its standard error. Nothing of it is left."""
    shared = shared_memory()
    process = program.start(*arguments)
    await_handler(process)
    slept(process, after_s)
    processes = below(process.pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    text = err.decode()
    assert b"Traceback" not in err + out, text
    await_end(processes)
    assert shared_memory() <= shared
    return process.returncode, text


def moments(what: str, count: int, longest_s: float) -> list[tuple[int, float]]:
    """Signals and when to send them."""
    rng = random.Random(f"{SEED} {what}")
    return [(rng.choice(STOPPING), round(rng.uniform(0.0, longest_s), 3)) for _ in range(count * ROUNDS)]


def expect(code: int, text: str, done: int = 0) -> bool:
    """Interrupted, and says so in the last line, which is a hit; or it was done before the signal came.

    After Python has ended a signal kills, silently.
    """
    if code != done and (code not in [-number for number in STOPPING] or text):
        assert code == 130, (code, text)
        lines = text.splitlines()
        assert lines, "nothing was said"
        assert "interrupted" in lines[-1], text
        assert sum("interrupted" in line for line in lines) == 1, text
    return code == 130


def mostly(hits: list[bool]) -> bool:
    """Whether three of four hit, so that what follows from a hit was seen."""
    return 4 * sum(hits) >= 3 * len(hits)


def await_handler(process: subprocess.Popen[bytes]) -> None:
    """Wait until the program proper has begun: it handles SIGHUP, which Python by itself does not."""
    caught = 0
    while not caught >> (signal.SIGHUP - 1) & 1:
        assert process.poll() is None, "it ended"
        time.sleep(0.002)
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]


@pytest.mark.parametrize("number", STOPPING)
def test_at_once(tmp_path: Path, number: int) -> None:
    """Amid an import, here one that takes its time: one line, in JSON too."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "click.py").write_text("import time\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path / "slow"), interpreter(None)[1]])
    for options in ([], ["--json"]):
        process = Program(tmp_path, environment={"PYTHONPATH": path}).start("backup", *options, tmp_path)
        await_handler(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"coffret: interrupted\n")
        expected = [{"message_type": "error", "message": "interrupted", "remedy": "", "code": 130}] if options else []
        assert [json.loads(line) for line in out.splitlines()] == expected


def stored_a_pack(program: Program, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not objects(program.repository, "packs"):
        time.sleep(0.01)


def test_a_closed_terminal(home: Path) -> None:
    """SIGHUP goes to the whole group, twice: a clean end all the same, and what is stored is indexed."""
    program = Program(home)
    with (home / "source" / "much").open("wb") as file:
        for number in range(8):
            file.write(random.Random(number).randbytes(32 << 20))
    process = program.start("backup", home / "source", "--limit-upload", "40M")
    stored_a_pack(program, process)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    expect(process.returncode, err.decode())
    assert process.returncode == 130
    assert "what was stored is kept" in err.decode().splitlines()[-1]
    assert objects(program.repository, "index")
    assert not objects(program.repository, "leases")


def test_nohup(home: Path) -> None:
    """What is to be ignored is ignored."""
    program = Program(home, prefix=("nohup",))
    process = program.start("backup", "--stdin-name", "slow", "--stdin-command", "sh -c 'echo; sleep 1'")
    while process.poll() is None and not objects(program.repository, "leases"):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_backup(home: Path) -> None:
    program = Program(home)
    source, hits = home / "source", []
    for turn, (number, after_s) in enumerate(moments("backup", 4, 1.5)):
        (source / "fresh").write_bytes(random.Random(turn).randbytes(12 << 20))
        hits.append(expect(*interrupt(program, number, after_s, "backup", source, "--limit-upload", "1M")))
        assert not objects(program.repository, "leases")
        assert not objects(program.repository, "tmp")
    assert mostly(hits)
    summary = program.backup(source)
    assert summary["errors"] == 0
    program("check")
    program("restore", "latest", "--to", home / "target")
    assert contents(home / "target") == contents(source)


def test_what_was_stored_is_taken_up(home: Path) -> None:
    """A backup that is cut short after its first packs leaves them in an index: they are not stored again."""
    program = Program(home)
    source = home / "source"
    with (source / "much").open("wb") as file:
        for number in range(5):
            file.write(random.Random(number).randbytes(32 << 20))
    process = program.start("backup", source, "--limit-upload", "20M")
    while (
        process.poll() is None and sum(path.stat().st_size for path in objects(program.repository, "packs")) < 1 << 25
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    stored = sum(path.stat().st_size for path in objects(program.repository, "packs"))
    assert expect(process.returncode, err.decode())
    assert objects(program.repository, "index"), err
    assert not objects(program.repository, "leases")
    program.backup(source)
    total = sum(path.stat().st_size for path in objects(program.repository, "packs"))
    random_bytes = (5 * 32 << 20) + (16 << 20)
    assert total < random_bytes + (stored >> 1) + (8 << 20), "stored anew"


def test_restore(home: Path) -> None:
    program = Program(home)
    source, target = home / "source", home / "target"
    program("backup", source)
    expected, hits = contents(source), []
    words: list[str | Path] = ["restore", "latest", "--no-owner", "--limit-download", "1M", "--to", target]
    for number, after_s in moments("restore", 4, 1.2):
        shutil.rmtree(target, ignore_errors=True)
        hits.append(expect(*interrupt(program, number, after_s, *words)))
        if target.exists():
            for name, content in contents(target).items():
                assert expected.get(name) == content, f"{name} is left half written"
        program("restore", "latest", "--to", target, "--overwrite", "if-changed")
        assert contents(target) == expected
    assert mostly(hits)


def test_check(home: Path) -> None:
    program = Program(home)
    program("backup", home / "source")
    hits = []
    for number, after_s in moments("check", 4, 1.0):
        hits.append(expect(*interrupt(program, number, after_s, "check", "--limit-download", "1M")))
        assert not objects(program.repository, "tmp")
    assert mostly(hits)
    program("check")


@pytest.mark.parametrize(
    "command", [("backup", "-v", "source"), ("ls", "latest"), ("check", "-v"), ("ls", "--json", "latest")]
)
def test_reader_goes_away(tmp_path: Path, command: tuple[str, ...]) -> None:
    """`| head -1` ends the command without a traceback, and without leaving anything behind."""
    program = Program(tmp_path)
    fault_harness.create(tmp_path, encrypted=False)
    source = make_source(tmp_path / "source", files=3000, large_bytes=4 << 20)
    program("backup", source)
    process = program.start(*command)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (0, 1)
    assert b"rror" not in err, err.decode()
    assert not objects(program.repository, "leases")
    program("backup", source)
    program("check")


def test_reader_gone_from_the_start(tmp_path: Path) -> None:
    program = Program(tmp_path)
    fault_harness.create(tmp_path, encrypted=False)
    for words in (["ls"], ["backup", str(tmp_path / "state")], ["version"], ["--help"]):
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "coffret", *words],
            env={
                **os.environ,
                "COFFRET_REPOSITORY": str(program.repository),
                "HOME": str(tmp_path),
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "XDG_STATE_HOME": str(tmp_path / "state"),
                "PYTHONPATH": str(ROOT / ".pkg"),
            },
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
