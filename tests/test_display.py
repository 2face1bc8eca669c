"""What a person sees: the live display on a terminal, which leaves only the results behind, and names made harmless."""

from __future__ import annotations

import base64
import os
import re
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.cells import cell_len
from tests import terminal
from tests.harness import ROOT, Program, Recorder, repository

from coffret.commands.line import Globals
from coffret.commands.running import Session
from coffret.connectors.errors import ConnectionLost
from coffret.display import Display, counted, cut_left, path_fields, paths_fields, printable, progress_lines
from coffret.engine.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

SLOW = ("--stdin-command", "sh -c 'head -c 5000000 /dev/urandom; sleep 1; echo'", "--stdin-name", "slow")


@given(st.binary(max_size=40))
def test_printable(path: bytes) -> None:
    """Nothing that moves a cursor, whatever the name; a name that is harmless stays as it is."""
    text = printable(path)
    assert text.isprintable()
    text.encode("utf-8")
    try:
        plain = path.decode()
    except UnicodeDecodeError:
        return
    if plain.isprintable():
        assert text == plain


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (b"/etc/hosts", "/etc/hosts"),
        ("/déjà vu/日本".encode(), "/déjà vu/日本"),
        (b"a\nb\x1b[31m", r"a\nb\x1b[31m"),
        (b"\xff", r"\xff"),
        ("\u202etxt".encode(), r"\u202etxt"),  # right to left from here
    ],
)
def test_printable_examples(path: bytes, shown: str) -> None:
    assert printable(path) == shown


@given(st.binary(max_size=40))
def test_path_fields(path: bytes) -> None:
    """The bytes can always be told, by the twin if there is one."""
    fields = path_fields(path, "target")
    twin = fields.get("target_b64")
    assert (base64.b64decode(twin) if twin is not None else fields["target"].encode()) == path


@given(st.lists(st.binary(max_size=10), max_size=4))
def test_paths_fields(paths: list[bytes]) -> None:
    fields = paths_fields(paths)
    twins = fields.get("paths_b64")
    found = [text.encode() for text in fields["paths"]] if twins is None else [base64.b64decode(text) for text in twins]
    assert found == paths


def test_counted() -> None:
    assert [counted(number, "file") for number in (0, 1, 12345)] == ["0 files", "1 file", "12,345 files"]


@given(st.text(max_size=40), st.integers(2, 30))
def test_cut_left(text: str, width: int) -> None:
    """The end stays, as much of it as there is room for; wide characters take two columns."""
    shown = cut_left(text, width)
    assert cell_len(shown) <= width
    if cell_len(text) <= width:
        assert shown == text
    else:
        assert shown[0] == "…"
        assert text.endswith(shown[1:])
        dropped = text[: len(text) - len(shown) + 1]
        assert cell_len(dropped[-1] + shown) > width


FULL = {
    "backup": Progress("backup", "9abc3294", 12_345, 75_001, 0, 1_234_000_000, 3_100_000_000),
    "check packs": Progress("packs", "", size_bytes=500_000_000, size_total=2_000_000_000),
    "check files": Progress("files", "", files=30, files_total=120, size_bytes=7, size_total=7),
    "restore": Progress("restore", "9abc3294", 12, 13, 0, 999, 1000),
}


@pytest.mark.parametrize("width", [20, 50, 80, 200])
@pytest.mark.parametrize("what", FULL)
def test_lines(what: str, width: int) -> None:
    """Phase, bar, counters, paths: each on lines of its own, none wider than the terminal."""
    progress = replace(FULL[what], current={n: b"/srv/" + b"directory/" * 30 + b"file %d" % n for n in range(4)})
    if what == "backup":
        progress = replace(progress, read_bytes=9, added_bytes=8_000_000, stored_bytes=4_000_000, errors=3)
    command = what.partition(" ")[0]
    first, bar, *counters = progress_lines(command, progress, 62.9, 60.0, width)
    assert first == f"{what}  1m2s"
    assert re.fullmatch(r"━+╌+ +\d+ %  \S+ left", bar)
    counters, paths = counters[:-4], counters[-4:]
    assert paths == [f"  {cut_left(printable(path), width - 2)}" for path in progress.current.values()]
    if width >= 50:
        assert all(cell_len(line) <= width for line in (first, bar, *counters, *paths))
        assert all(path.endswith(f"/file {n}") for n, path in enumerate(paths))
    expected = {
        "backup": "12,345 files of 75,001  1.2 GB of 3.1 GB  21 MB/s"
        "  added 8.0 MB  stored 4.0 MB  ratio 2.00  3 errors",
        "check packs": "500 MB of 2.0 GB  8.3 MB/s",
        "check files": "30 files of 120",
        "restore": "12 files of 13  999 B of 1.0 kB  16 B/s",
    }
    assert "  ".join(counters) == expected[what]


@pytest.mark.parametrize(
    ("name", "progress", "line"),
    [
        ("restore", Progress(), "restore: opening"),
        ("restore", Progress("restore", files=1, size_bytes=9), "restore: 1 file, 9 B"),
        ("check", FULL["check packs"], "check: packs: 500 MB of 2.0 GB"),
        ("check", replace(FULL["check files"], errors=1), "check: files: 30 files of 120, 1 error"),
        ("backup", replace(FULL["backup"], phase="commit"), "backup: commit: 12,345 files of 75,001, 1.2 GB of 3.1 GB"),
    ],
)
def test_plain_lines(name: str, progress: Progress, line: str) -> None:
    """Nothing is counted that nothing is known of."""
    display = Display(name, quiet=False, verbose=False, as_json=False)
    display.progress = progress
    assert display._plain() == line


@pytest.mark.anyio
async def test_a_check_knows_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for number in range(3):
        (tmp_path / "source" / str(number)).write_bytes(os.urandom(1000))
    async with repository(tmp_path) as opened:
        await opened.backup([os.fsencode(tmp_path / "source")])
        snapshot = (await opened.backup([os.fsencode(tmp_path / "source" / "1")])).snapshot
        everything, one = Recorder(), Recorder()
        await opened.check(progress=everything)
        await opened.check([(snapshot, None)], progress=one)
    assert (everything.files, everything.files_total, one.files, one.files_total) == (4, 4, 1, 1)
    assert everything.size_bytes == everything.size_total
    assert everything.size_bytes > one.size_bytes == one.size_total


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    program = Program(tmp_path_factory.mktemp("display"))
    program("create", "--no-encryption")
    return program


def test_live(program: Program) -> None:
    """Progress is drawn while it works; afterwards only the result is on the screen, and the cursor is back."""
    backup = terminal.start(program, "backup", *SLOW)
    for words in ("0 files", "0 B/s"):
        backup.expect(words)
    assert backup.end() == 0
    [line] = backup.screen
    assert line.startswith("backup: created unsigned snapshot ")
    assert backup.text.count("\x1b[?25l") == backup.text.count("\x1b[?25h") == 1


@pytest.mark.parametrize("columns", [50, 80])
def test_narrow(tmp_path: Path, columns: int) -> None:
    """What is read is told by the end of its path, on a line of its own; no line is wrapped."""
    program = Program(tmp_path, environment={"COLUMNS": str(columns)})
    program("create", "--no-encryption")
    deep = tmp_path / "/".join(["directory"] * 12)
    deep.mkdir(parents=True)
    with (deep / "large").open("wb") as file:  # more than fits in memory on its way to a slow storage
        for _ in range(300):
            file.write(os.urandom(1 << 20))
    backup = terminal.start(program, "backup", "--workers", "1", "--limit-upload", "4M", tmp_path / "directory")
    backup.expect("/directory/large")
    backup.press("\x03")
    assert backup.end() == 130
    before = "\n".join(backup.plain).partition("^C")[0]
    shown = re.split(r"[\r\n]", before)
    assert all(len(line) <= columns for line in shown)
    lines = [line for line in shown if "directory/large" in line]
    assert lines
    assert all(line.startswith("  …") and len(line) == columns for line in lines)


def test_faults_above_it(program: Program, tmp_path: Path) -> None:
    """What could not be read stays on the screen, with nothing in it that a terminal obeys."""
    odd = os.fsencode(tmp_path) + b"/gone\x1b[2J"
    backup = terminal.start(program, "backup", ROOT / "docs", odd)
    assert backup.end() == 3
    fault, last = backup.screen
    assert fault == rf"backup: {tmp_path}/gone\x1b[2J: No such file or directory"
    assert last.endswith(", 1 error")
    assert "\x1b[2J" not in backup.text


def test_verbose(program: Program, tmp_path: Path) -> None:
    """A line for each path, and no display among them."""
    name = os.fsencode(tmp_path) + b"/source/\xffodd\x1b]0;title\x07"
    os.makedirs(name)
    backup = terminal.start(program, "-v", "backup", tmp_path / "source")
    assert backup.end() == 0
    assert "\x1b" not in backup.text
    lines = [line for line in backup.plain if line]
    assert any(line.endswith(rf": OK ✓ {tmp_path}/source/\xffodd\x1b]0;title\x07") for line in lines)
    assert all(": OK ✓ " in line for line in lines[:-3])
    assert lines[-3].startswith("state ")
    assert lines[-1].startswith("backup: storage: ")


def test_interrupted(program: Program) -> None:
    backup = terminal.start(program, "backup", "--stdin-command", "sleep 60", "--stdin-name", "slow")
    backup.expect("file")
    backup.press("\x03")
    assert backup.end() == 130
    assert backup.screen[-1].startswith("coffret: interrupted")
    assert backup.text.count("\x1b[?25l") == backup.text.count("\x1b[?25h")


def test_quiet(program: Program) -> None:
    backup = terminal.start(program, "-q", "backup", *SLOW)
    assert backup.end() == 0
    assert backup.text == ""


def test_check_and_restore(program: Program, tmp_path: Path) -> None:
    program("backup", "/etc/hostname")
    for arguments in (["check"], ["restore", "--no-owner", "--to", tmp_path / "out", "latest"]):
        shown = terminal.start(program, *arguments)
        assert shown.end() == 0
        [line] = shown.screen
        assert line.endswith("completed successfully")


def test_many_calls_that_fail_together_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = iter((0.0, 0.1, 0.9, 1.0, 1.2))
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))
    session = Session("ls", Globals())
    for number in range(5):
        session._retrying(f"get {number}", ConnectionLost("refused"))
    told = [f"ls: note: get {number} is tried again: refused" for number in (0, 3)]
    assert capsys.readouterr().err.splitlines() == told


@pytest.mark.anyio
@pytest.mark.parametrize("as_json", [False, True])
async def test_nothing_follows_the_last_line(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the display is woken once more before it is cancelled."""
    display = Display("backup", quiet=False, verbose=False, as_json=as_json)

    async def until_the_end(seconds: float) -> None:
        display.summary("all is done", files=1)

    monkeypatch.setattr("coffret.display.anyio.sleep", until_the_end)
    await display.run()
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert shown.err == ""
