"""The program as it is used: first steps, exit codes, prompts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests import terminal
from tests.cli.sources import SNAPSHOT, make_source
from tests.harness import ROOT, Program, interpreter

from coffret.engine.errors import reported

if TYPE_CHECKING:
    from pathlib import Path


class TestSeeds:
    def test_quick_start(self, tmp_path: Path) -> None:
        """The article of 2025: passphrase typed at `create`, then by environment."""
        program, etc = Program(tmp_path), make_source(tmp_path)
        place = tmp_path / "backups"
        create = terminal.start(program, "at", place, "create")
        create.expect("repository passphrase: ")
        create.type("correct horse")
        create.expect("repository passphrase (confirm): ")
        create.type("correct horse")
        assert create.end() == 0
        assert "correct horse" not in create.text
        assert re.search(r"created repository [0-9a-f]{64} encrypted", create.text)

        program = program.with_environment(COFFRET_PASSPHRASE="correct horse")
        *lines, last = program("at", place, "backup", "-v", etc).stdout.splitlines()
        ended = re.fullmatch(r"backup: created unsigned snapshot ([0-9a-f]{8}) of size 27 B in [\d.]+(ms|s)", last)
        assert ended, last
        short = ended[1]
        assert {f"{short}: OK ✓ {path}" for path in (etc / "hosts", etc / "ssh/config", etc, tmp_path, "/")} <= {*lines}

        [listed] = program("at", place, "ls").stdout.splitlines()
        found = re.fullmatch(SNAPSHOT, listed)
        assert found, listed
        assert found.group(2, 3, 5) == (short, "27 B", str(etc))

        *lines, last = program("at", place, "check", "-v", short).stdout.splitlines()
        assert {f"{short}: ✓ {path}" for path in (etc / "hosts", etc / "ssh/config", etc)} <= {*lines}
        assert last == f"check: verification of {short}:{etc} completed successfully"

        target = tmp_path / "restore"
        *lines, last = program("at", place, "restore", "-v", "-to", target, short).stdout.splitlines()
        assert {f"{short}: OK ✓ {path}" for path in (etc / "hosts", etc / "ssh/config")} <= {*lines}
        assert last == f"restore: restoration of {short}:{etc} at {target} completed successfully"
        assert sorted(os.listdir(target)) == ["hosts", "ssh"]
        assert (target / "ssh" / "config").read_text() == "Host *\n"

    def test_push(self, tmp_path: Path) -> None:
        """The text of 2022, as far as there are commands: the repository in ~/.coffret, and `on`."""
        program = Program(tmp_path, prefix=("env", "-u", "COFFRET_REPOSITORY"))
        source = make_source(tmp_path)
        (tmp_path / "bin").symlink_to(source)
        program("create", "-no-encryption")
        assert (tmp_path / ".coffret" / "config").exists()
        program("push", tmp_path / "bin")
        [listed] = program("ls").stdout.splitlines()
        assert listed.endswith(f"   {tmp_path}/bin")
        assert program("on", tmp_path / ".coffret", "ls").stdout.splitlines() == [listed]
        # A link that is named is followed, and stored as the directory under that name.
        entries = program("ls", f"latest:{tmp_path}/bin").stdout
        assert f"{tmp_path}/bin/hosts" in entries

    def test_from_the_environment(self, program: Program, tmp_path: Path) -> None:
        here = program.with_environment(COFFRET_REPOSITORY=str(tmp_path / "named"))
        here("create", "--no-encryption")
        assert (tmp_path / "named" / "config").exists()


class TestRemoval:
    def test_rm(self, tmp_path: Path) -> None:
        program, source = Program(tmp_path), make_source(tmp_path)
        program("create", "--no-encryption")
        ids = [program.backup(source)["short_id"] for _ in range(3)]
        shown = program("rm", "--dry-run", ids[0], ids[1]).stdout.splitlines()
        assert [line.split()[1] for line in shown[:-1]] == ids[:2]
        assert shown[-1] == "rm: would remove 2 snapshots"
        # All of the arguments, or none: one is wrong.
        for wrong, code in (("nosuch", 1), (f"{ids[0]}:{source}", 2)):
            error = program("rm", ids[0], wrong, code=code).stderr
            assert error.startswith("coffret: ")
            assert len(error.splitlines()) == 1
        assert program("rm", code=2).stderr.count("\n") == 1
        assert program("ls", "--json").summary["snapshots"] == 3
        assert program("rm", ids[0], "latest").stdout == "rm: removed 2 snapshots\n"
        [left] = program("ls").stdout.splitlines()
        assert left.split()[1] == ids[1]
        outcome = program("rm", ids[0], ids[1])
        assert outcome.stdout == "rm: removed 1 snapshot\n"
        assert outcome.stderr == f"rm: note: snapshot {ids[0]} was removed before\n"
        assert "was removed" in program("ls", ids[1], code=1).stderr
        program("check")


class TestExitCodes:
    def test_failed(self, program: Program) -> None:
        program("backup", "/no/such/path", code=1)
        program("ls", "nosuch", code=1)
        for command, says in (("/no/such", "No such file or directory"), ("echo '", "it is no command line")):
            told = program("backup", "--stdin-name", "x", "--stdin-command", command, code=1).stderr
            assert told.startswith(f"coffret: {command}: {says} (check --stdin-command; there is no shell")

    def test_partly(self, program: Program) -> None:
        outcome = program("backup", program.home / "source", "/no/such/path", code=3)
        assert outcome.stdout.rstrip().endswith(", 1 error")
        assert outcome.stderr == "backup: /no/such/path: No such file or directory\n"

    def test_no_repository(self, program: Program, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("not a repository")
        for place in (tmp_path / "none", tmp_path):
            for arguments in (["ls"], ["check", "--packs"], ["backup", "/etc/hostname"]):
                assert "create" in program("at", place, *arguments, code=10).stderr

    def test_damage(self, program: Program, tmp_path: Path) -> None:
        place = tmp_path / "damaged"
        shutil.copytree(program.repository, place)
        for pack in (path for path in (place / "packs").rglob("*") if path.is_file()):
            pack.chmod(0o600)
            pack.write_bytes(bytes(pack.stat().st_size))
        elsewhere = program.with_environment(XDG_STATE_HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
        for how in ([], ["--packs"]):
            outcome = elsewhere("at", place, "check", *how, code=4)
            assert "found damage" in outcome.stdout
            assert outcome.stderr

    def test_passphrase(self, tmp_path: Path) -> None:
        program = Program(tmp_path)
        program("create", code=12)
        assert not (program.repository / "config").exists()
        program.with_environment(COFFRET_PASSPHRASE="right")("create")
        program("ls", code=12)
        program.with_environment(COFFRET_PASSPHRASE="wrong")("ls", code=12)
        program.with_environment(COFFRET_PASSPHRASE="right", COFFRET_PASSPHRASE_COMMAND="echo right")("ls", code=2)
        (tmp_path / "file").write_text("right\n")
        program.with_environment(COFFRET_PASSPHRASE_FILE=str(tmp_path / "file"))("ls")
        program.with_environment(COFFRET_PASSPHRASE_COMMAND="echo right")("ls")
        program("check", "--packs")  # needs none

    @pytest.mark.parametrize("command", [["ls"], ["check", "--packs"], ["check", "--fast"]])
    def test_expect_id(self, program: Program, command: list[str]) -> None:
        found = program("info", "--json").summary["repository_id"]
        program("--expect-id", found, *command)
        outcome = program(*command, "--expect-id", "0" * 64, code=1)
        assert found in outcome.stderr

    def test_a_passphrase_for_no_encryption(self, tmp_path: Path) -> None:
        """Neither made nor remembered, whatever gives the passphrase."""
        program = Program(tmp_path)
        for name in ("COFFRET_PASSPHRASE", "COFFRET_PASSPHRASE_FILE", "COFFRET_PASSPHRASE_COMMAND"):
            given = program.with_environment(**{name: ""})
            assert "--no-encryption" in given("create", "--no-encryption", code=2).stderr
            assert not program.repository.exists()
        program("create", "--no-encryption")
        shutil.rmtree(tmp_path / "state")
        given = program.with_environment(COFFRET_PASSPHRASE="something")
        for command in (["ls"], ["check", "--packs"], ["backup", "/etc/hostname"]):
            assert "has no encryption" in given(*command, code=2).stderr
        assert not (tmp_path / "state").exists()

    @pytest.mark.parametrize("command", [["add"], ["change"], ["rm", "00"]])
    def test_no_passphrases_without_encryption(self, program: Program, command: list[str]) -> None:
        """Said at once: no new one is asked for."""
        shown = terminal.start(program, "passphrase", *command)
        assert shown.end() == 2
        [line] = shown.screen
        assert line.startswith("coffret: the repository has no encryption, and so no passphrase")

    def test_output_full(self, program: Program) -> None:
        """One line that says so; 13, for it is space that is wanted."""
        full = replace(program, prefix=("sh", "-c", 'exec "$0" "$@" >/dev/full'))
        commands = (
            *(["version"], ["--help"], ["help", "ls"], ["ls", "--help"], ["passphrase", "rm", "--help"]),
            *(["ls"], ["ls", "--json"], ["info"], ["backup", "-v", "source"], ["check", "--json"]),
            ["passphrase", "export", "-"],
        )
        for command in commands:
            [line] = full(*command, code=13).stderr.splitlines()
            assert line.startswith("coffret: standard output can't be written: No space left on device (")
        shut = replace(program, prefix=("sh", "-c", 'exec "$0" "$@" 1</dev/null'))
        for command in (["version"], ["ls"]):
            [line] = shut(*command, code=1).stderr.splitlines()
            assert line.startswith("coffret: standard output can't be written: Bad file descriptor (")

    @pytest.mark.parametrize(
        "raised",
        [
            "MemoryError()",
            "ImportError('libz.so: failed to map segment from shared object')",
            "SystemError('error return without exception set')",
            "SystemError('<function _find_and_load at 0x7f> returned NULL without setting an exception')",
        ],
    )
    def test_all_ways_to_say_that_there_is_no_memory(self, raised: str) -> None:
        """While the program is imported, and while a command is at work."""
        known = reported(eval(raised))
        assert known is not None
        assert str(known) == "not enough memory"
        code = f"from coffret import cli\ndef run(arguments): raise {raised}\ncli.run = run\ncli.main()"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.returncode == 1
        assert ended.stderr.startswith("coffret: not enough memory (")
        assert reported(ValueError("without setting an exception")) is None

    @pytest.mark.parametrize(
        ("limit", "says"),
        [
            ("ulimit -v 30000", "not enough memory"),
            ("ulimit -v 45000", "not enough memory"),
            ("ulimit -v 80000", "memory"),
            ("ulimit -v 200000", "memory"),
            ("ulimit -f 1", "File too large"),
            ("ulimit -n 10", "Too many open files"),
        ],
    )
    def test_limits(self, program: Program, tmp_path: Path, limit: str, says: str) -> None:
        """Of memory, file sizes and open files: each is named, and is no bug."""
        limited = replace(program, prefix=("sh", "-c", f'{limit}; exec "$0" "$@"'))
        (tmp_path / "large").write_bytes(os.urandom(3_000_000))
        for command in (["backup", "--force", str(tmp_path)], ["restore", "--to", str(tmp_path / "to"), "latest"]):
            last = limited(*command, code=1).stderr.splitlines()[-1]
            assert last.startswith("coffret: ") and says in last and " (" in last
            assert "bug" not in last


class TestPrompts:
    def test_once_on_an_existing_repository(self, tmp_path: Path) -> None:
        program = Program(tmp_path)
        program.with_environment(COFFRET_PASSPHRASE="typed")("create")
        listing = terminal.start(program, "info")
        listing.expect("repository passphrase: ")
        listing.type("typed")
        assert listing.end() == 0
        assert "confirm" not in listing.text
        assert "typed" not in listing.text

    @pytest.mark.parametrize(("first", "second", "says"), [("a", "b", "differ"), ("", "", "empty")])
    def test_refused(self, tmp_path: Path, first: str, second: str, says: str) -> None:
        create = terminal.start(Program(tmp_path), "create")
        create.expect("passphrase: ")
        create.type(first)
        if first:
            create.expect("(confirm): ")
            create.type(second)
        assert create.end() == 2
        assert says in create.text
        assert not (tmp_path / "repository" / "config").exists()

    def test_ctrl_c(self, tmp_path: Path) -> None:
        """It need not wait for Enter."""
        create = terminal.start(Program(tmp_path), "create")
        create.expect("passphrase: ")
        create.press("\x03")
        assert create.end() == 130
        assert create.plain[-2] == "coffret: interrupted"

    def test_ctrl_d(self, tmp_path: Path) -> None:
        """The message has a line of its own."""
        create = terminal.start(Program(tmp_path), "create")
        create.expect("passphrase: ")
        create.press("\x04")
        assert create.end() == 12
        assert create.plain[-2].startswith("coffret: no passphrase was typed (")

    def test_wrong(self, tmp_path: Path) -> None:
        """What to do depends on where it came from."""
        program = Program(tmp_path)
        program.with_environment(COFFRET_PASSPHRASE="right")("create")
        typed = terminal.start(program, "ls")
        typed.expect("passphrase: ")
        typed.type("wrong")
        assert typed.end() == 12
        assert "type it again" in typed.text
        for name, value in (("COFFRET_PASSPHRASE", "wrong"), ("COFFRET_PASSPHRASE_COMMAND", "echo wrong")):
            assert f"({name} gives another" in program.with_environment(**{name: value})("ls", code=12).stderr
        given = program.with_environment(COFFRET_PASSPHRASE="right")
        assert "(set COFFRET_NEW_PASSPHRASE, COFFRET_NEW_" in given("passphrase", "add", code=12).stderr
        assert "(set COFFRET_PASSPHRASE, COFFRET_PASSPHRASE_FILE or" in program("ls", code=12).stderr

    def test_new_passphrase(self, tmp_path: Path) -> None:
        program = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "old"})
        program("create")
        add = terminal.start(program, "passphrase", "add")
        add.expect("new passphrase: ")
        add.type("new")
        add.expect("new passphrase (confirm): ")
        add.type("new")
        assert add.end() == 0
        program.with_environment(COFFRET_PASSPHRASE="new")("ls")


def test_passphrases(tmp_path: Path) -> None:
    """Add, list, change, remove; the last one stays; export, damage, and put back."""
    first = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "one", "COFFRET_NEW_PASSPHRASE": "two"})
    first("create")
    second = first.with_environment(COFFRET_PASSPHRASE="two", COFFRET_NEW_PASSPHRASE="three")
    third = first.with_environment(COFFRET_PASSPHRASE="three")
    only = first("passphrase", "list").stdout.split()[1]
    assert "last" in first("passphrase", "rm", only, code=2).stderr
    first("passphrase", "add", "--label", "\x1b[1mspare")
    lines = second("passphrase", "list").stdout.splitlines()
    assert [line[0] for line in lines] == [" ", "*"]
    assert lines[1].endswith("   ?[1mspare")  # what a terminal would obey is no part of a label
    second("passphrase", "rm", only)
    first("ls", code=12)
    second("passphrase", "change")
    second("ls", code=12)
    third("backup", make_source(tmp_path))

    file = tmp_path / "recovery"
    third("passphrase", "export", file)
    assert file.stat().st_mode & 0o777 == 0o600
    third("passphrase", "export", file, code=1)  # never over another file
    printed = third("passphrase", "export", "-").stdout
    assert printed.splitlines()[2:] == file.read_text().splitlines()[2:]  # the second tells the time
    (third.repository / "config").unlink()
    for slot in (third.repository / "keys").iterdir():
        slot.unlink()
    for command in (["ls"], ["check", "--packs"], ["create", "--no-encryption"]):
        assert "passphrase add --from FILE" in Program(tmp_path)(*command, code=10).stderr
    assert "put back the config, passphrase " in third("passphrase", "add", "--from", file).stdout
    third("check")
    for no_file in (ROOT / "README.md", tmp_path / "nowhere", tmp_path):
        assert "Errno" not in third("passphrase", "add", "--from", no_file, code=2).stderr


def test_a_program_without_a_home(tmp_path: Path) -> None:
    """A service has neither HOME nor a terminal."""
    python, search_path = interpreter(None)
    environment = {"PYTHONPATH": search_path, "XDG_CACHE_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    for arguments in (["create", "--no-encryption"], ["backup", "/etc/hostname"], ["check"]):
        words = [python, "-m", "coffret", "at", str(tmp_path / "repository"), *arguments]
        outcome = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd="/")
        assert outcome.returncode == 0, outcome.stderr
