"""The command line: what is taken, what is refused, and what help says."""

from __future__ import annotations

import subprocess

import pytest
from tests.harness import Program, interpreter

from coffret import __version__
from coffret.commands.line import COMMANDS

COMMAND_NAMES = [*COMMANDS]
LATER = ["agent", "cat", "diff", "find", "stats"]


class TestLine:
    @pytest.mark.parametrize("name", LATER)
    def test_not_offered(self, program: Program, name: str) -> None:
        outcome = program(name, code=2)
        assert outcome.stdout == ""
        assert outcome.stderr == f"coffret: no command '{name}' (see `coffret --help`)\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--no-such", "ls"],
            ["ls", "--no-such"],
            ["ls", "-x"],
            ["at"],
            ["at", "/x"],
            ["ls", "one", "two"],
            ["--connections"],
            ["--connections", "0", "ls"],
            ["ls", "--workers", "many"],
            ["-o", "novalue", "ls"],
            ["ls", "-o", "unknown=option"],
            ["at", "ftp://host/path", "ls"],
            ["check", "--packs", "--fast"],
            ["check", "--packs", "latest"],
            ["restore"],
            ["restore", "--overwrite", "sometimes", "latest"],
            ["backup", "--compression", "much", "."],
            ["backup", "--exclude-larger-than", "much", "."],
            ["backup", "-", "/etc"],
            ["passphrase"],
            ["passphrase", "show"],
            ["passphrase", "rm"],
            ["version", "1"],
            ["\x1b[31m"],
            ["at", "memory://x", "create", "--no-encryption"],
            ["at", "", "ls"],
            ["ls", "--cache-dir", ""],
            ["ls", ""],
            ["restore", "--to", "", "latest"],
            ["backup", ""],
            ["backup", "--", ""],
            ["backup", "--tag=", "."],
            ["backup", "--host", "", "."],
            ["passphrase", "add", "--from", ""],
            ["passphrase", "export", ""],
            ["create", "--no-encryption", "--expect-id", "00"],
            ["passphrase", "add", "--from", "/etc/hostname", "--expect-id", "00"],
            ["-qx", "ls"],
            ["help", "nosuch"],
        ],
    )
    def test_usage_error(self, program: Program, arguments: list[str]) -> None:
        """One line that says where help is; code 2; nothing on standard output."""
        outcome = program(*arguments, code=2)
        assert outcome.stdout == ""
        [line] = outcome.stderr.splitlines()
        assert line.startswith("coffret: ")
        assert line.endswith(")")
        assert line.isprintable()

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["create", "-foo", "x"], "no option -foo (see `coffret create --help`)"),
            (["ls", "-foo"], "no option -foo (see `coffret ls --help`)"),
            (["ls", "-rx"], "no option -rx (see `coffret ls --help`)"),
            (["backup", "-dry-runx"], "no option -dry-runx; did you mean --dry-run? (see `coffret backup --help`)"),
            (["--foo=1", "ls"], "no option --foo (see `coffret --help`)"),
            (["ls", "--json=1"], "--json takes no value (see `coffret ls --help`)"),
            (["passphrase", "rm", "--labl"], "no option --labl; did you mean --label? (see `coffret passphrase rm"),
            (["passphrase", "rm"], "Missing argument 'ID'. (see `coffret passphrase rm --help`)"),
            (["at"], "at needs a repository (see `coffret --help`)"),
            (["restore", "--to", "", "x"], "--to needs a value that is not empty (see `coffret restore --help`)"),
        ],
    )
    def test_what_is_wrong_is_named(self, program: Program, arguments: list[str], says: str) -> None:
        assert program(*arguments, code=2).stderr.startswith(f"coffret: {says}")

    def test_short_options_together(self, program: Program) -> None:
        [line] = program("-vq", "backup", program.home / "source", code=None).stdout.splitlines() or [""]
        assert line == ""
        assert "no option 'region'" in program("ls", "-qoregion=x", code=2).stderr
        assert program("ls", "-rv", "latest").stdout == program("ls", "-r", "latest").stdout

    def test_an_empty_variable_is_no_repository(self, program: Program) -> None:
        empty = program.with_environment(COFFRET_REPOSITORY="")
        for arguments in (["ls"], ["create", "--no-encryption"], ["check", "--packs"], ["passphrase", "list"]):
            assert "COFFRET_REPOSITORY is empty" in empty(*arguments, code=2).stderr
        empty("at", program.repository, "ls")
        empty("version", "-q")
        empty("ls", "--help")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["-q", "--connections", "2", "at", "REPO", "backup", "--tag", "x", "SOURCE"],
            ["at", "REPO", "backup", "-q", "SOURCE", "--connections=2", "--tag=x"],
            ["backup", "-tag", "x", "-quiet", "-connections", "2", "SOURCE"],
            ["on", "REPO", "--quiet", "-workers=2", "push", "-tag=x", "--", "SOURCE"],
        ],
    )
    def test_options_anywhere(self, program: Program, arguments: list[str]) -> None:
        words = {"REPO": program.repository, "SOURCE": program.home / "source"}
        outcome = program(*(words.get(word, word) for word in arguments))
        assert outcome.stdout + outcome.stderr == ""
        assert program("ls", "--json").of_type("item")[-1]["tags"] == ["x"]

    @pytest.mark.parametrize("word", ["--help", "-h", "-help"])
    def test_help(self, program: Program, word: str) -> None:
        for arguments in ([], ["-v"], ["at", "/nowhere"]):
            text = program(*arguments, word).stdout
            assert all(f"  {name} " in text for name in COMMAND_NAMES)

    @pytest.mark.parametrize("name", COMMAND_NAMES)
    def test_help_of(self, program: Program, name: str) -> None:
        assert program(name, "--help").stdout.startswith(f"Usage: coffret {name} ")

    @pytest.mark.parametrize("name", ["add", "change", "rm", "list", "export"])
    def test_help_of_passphrase(self, program: Program, name: str) -> None:
        assert program("passphrase", name, "-help").stdout.startswith(f"Usage: coffret passphrase {name} ")

    def test_help_as_a_command(self, program: Program) -> None:
        assert program("help").stdout == program("--help").stdout
        assert program("help", "backup").stdout == program("backup", "--help").stdout
        assert program("help", "passphrase", "rm").stdout == program("passphrase", "rm", "--help").stdout

    def test_help_is_whole(self, program: Program) -> None:
        """No text is cut short, and each says that there are global options too."""
        for name in COMMAND_NAMES:
            text = program(name, "--help").stdout
            assert "Global options" in text
            for meant in ("]...", "'...'", "SNAPSHOT..."):
                text = text.replace(meant, "")
            assert "..." not in text
        assert "never the last one." in " ".join(program("passphrase", "--help").stdout.split())
        assert "without a shell" in " ".join(program("backup", "--help").stdout.split())
        assert "Without it none may exist." in " ".join(program("restore", "--help").stdout.split())

    def test_nothing(self, program: Program) -> None:
        outcome = program(code=2)
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("Usage: coffret ")

    def test_version(self, program: Program) -> None:
        for arguments in (["version"], ["--version"], ["-q", "version"], ["at", "/nowhere", "version"]):
            assert program(*arguments).stdout == f"coffret {__version__}\n"

    def test_version_is_quick(self) -> None:
        """It imports neither an event loop nor what draws on terminals."""
        python, search_path = interpreter(None)
        code = (
            "import sys; from coffret.cli import run; assert run(['version']) == 0;"
            "heavy = {'anyio', 'asyncio', 'click', 'rich', 'msgspec', 'cryptography', 'uvloop'} & sys.modules.keys();"
            "sys.exit(str(heavy) if heavy else 0)"
        )
        outcome = subprocess.run(
            [python, "-c", code], env={"PYTHONPATH": search_path}, capture_output=True, text=True, check=False
        )
        assert outcome.returncode == 0, outcome.stderr

    def test_beginning_is_quick(self) -> None:
        """Until `main` runs a Ctrl-C is answered by Python: that must be no time at all."""
        python, search_path = interpreter(None)
        code = "import sys; before = {*sys.modules}; import coffret.cli; print(*sorted({*sys.modules} - before))"
        outcome = subprocess.run(
            [python, "-c", code], env={"PYTHONPATH": search_path}, capture_output=True, text=True, check=True
        )
        assert {*outcome.stdout.split()} <= {"__future__", "coffret", "coffret.cli", "errno"}
