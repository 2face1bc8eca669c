"""What a person sees: the live display on a terminal, which leaves only the results behind, and names made harmless."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import terminal
from tests.harness import ROOT, Program

from coffret.display import counted, path_fields, paths_fields, printable

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
    assert all(": OK ✓ " in line for line in lines[:-1])


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
    for arguments in (["check"], ["restore", "--to", tmp_path / "out", "latest"]):
        shown = terminal.start(program, *arguments)
        assert shown.end() == 0
        [line] = shown.screen
        assert line.endswith("completed successfully")
