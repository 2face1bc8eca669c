"""The command line: the two seed transcripts, global options, prompts, exit codes, passphrases from end to end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tests import fault_harness, terminal
from tests.harness import ROOT, Program, interpreter

from coffret import __version__
from coffret.commands.line import COMMANDS
from coffret.connectors.local import LocalConnector
from coffret.engine import check_packs
from coffret.engine.ops import restore

if TYPE_CHECKING:
    from pathlib import Path

COMMAND_NAMES = [*COMMANDS]
LATER = ["sync", "clone", "server", "rm", "prune", "maintenance", "agent", "cat", "diff", "find", "stats"]
SNAPSHOT = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)   ([0-9a-f]{8}) +([\d.]+ k?B) +(\S+)   (/.*)"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A repository without encryption, with one snapshot of `source`."""
    program = Program(tmp_path_factory.mktemp("cli"))
    make_source(program.home)
    program("create", "--no-encryption")
    program("backup", program.home / "source")
    return program


def make_source(home: Path) -> Path:
    source = home / "source"
    (source / "ssh").mkdir(parents=True)
    (source / "hosts").write_text("127.0.0.1 localhost\n")
    (source / "ssh" / "config").write_text("Host *\n")
    return source


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
            (["create", "-like", "x"], "no option -like (see `coffret create --help`)"),
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
            assert "..." not in text.replace("]...", "").replace("'...'", "").replace("[ARGS]...", "")
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


class TestForms:
    def test_quiet(self, program: Program) -> None:
        for arguments in (["backup", program.home / "source"], ["check"], ["check", "latest"]):
            outcome = program("-q", *arguments)
            assert outcome.stdout + outcome.stderr == ""
        assert re.fullmatch(SNAPSHOT, program("-q", "ls").stdout.splitlines()[0])  # what was asked for

    def test_plain_lines_at_most_one_a_second(self, program: Program) -> None:
        outcome = program("backup", "--stdin-command", "sh -c 'echo 1; sleep 2.5; echo 2'", "--stdin-name", "slow")
        *lines, last = outcome.stdout.splitlines()
        assert not lines
        assert last.startswith("backup: created ")
        told = outcome.stderr.splitlines()
        assert told
        assert all(re.fullmatch(r"backup: (opening|(commit: )?\d files?, [\d.]+ B)", line) for line in told), told

    def test_ls_long(self, program: Program) -> None:
        source = program.home / "source"
        found = program("ls", "-r", f"latest:{source}", code=None)
        if found.code:  # another test's snapshot is the latest
            program("backup", source)
            found = program("ls", "-r", f"latest:{source}")
        line = next(line for line in found.stdout.splitlines() if line.endswith("hosts"))
        assert re.fullmatch(r"-[rwx-]{9} +\S+ +\S+ +20 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ /.*/hosts", line), line

    def test_tag_and_host(self, program: Program) -> None:
        summary = program.backup(program.home / "source", "--tag", "a", "--tag", "b", "--host", "db1")
        found = {item["snapshot_id"]: item for item in program("ls", "--json").of_type("item")}
        assert (found[summary["snapshot_id"]]["tags"], found[summary["snapshot_id"]]["host"]) == (["a", "b"], "db1")

    def test_dry_run_stores_nothing(self, tmp_path: Path) -> None:
        program = Program(tmp_path)
        program("create", "--no-encryption")
        before = sorted(program.repository.rglob("*"))
        outcome = program("backup", "--dry-run", make_source(tmp_path))
        begin, end = "backup: would create an unsigned snapshot of size 27 B in", "2 files of 27 B to read,"
        assert re.fullmatch(rf"{begin} \S+s: {end} [\d.]+ k?B to add\n", outcome.stdout), outcome.stdout
        lines = program("backup", "--dry-run", "-v", tmp_path / "source").stdout.splitlines()
        assert f"backup: new: {tmp_path}/source/hosts" in lines
        assert sorted(program.repository.rglob("*")) == before

    def test_cache_places(self, program: Program, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        program("ls", "--cache-dir", cache)
        assert any(cache.iterdir())
        shutil.rmtree(cache)
        bare = program.with_environment(XDG_CACHE_HOME=str(cache))
        bare("ls", "--no-cache")
        assert not cache.exists()

    def test_restore_without_a_target(self, program: Program, tmp_path: Path) -> None:
        short = program("ls", "--json").messages[0]["short_id"]
        outcome = program("restore", short, cwd=tmp_path)
        assert f" at coffret-{short} completed" in outcome.stdout
        assert (tmp_path / f"coffret-{short}" / "hosts").exists()

    def test_paths_in_a_snapshot(self, program: Program, tmp_path: Path) -> None:
        short = program("ls", "--json").messages[0]["short_id"]
        program("restore", "--to", tmp_path / "one", f"{short}:{program.home}/source/ssh")
        assert os.listdir(tmp_path / "one") == ["config"]
        program("restore", "--to", tmp_path / "two", f"{short}:{program.home}/source/hosts")
        assert os.listdir(tmp_path / "two") == ["hosts"]

    def test_paths_are_normalised(self, program: Program) -> None:
        short = program("ls", "--json").messages[0]["short_id"]
        odd = "/".join(("", *str(program.home).split("/"), ".", "source", "", "ssh", "..", "hosts", ""))
        assert program("ls", f"{short}:{odd}").stdout == program("ls", f"{short}:{program.home}/source/hosts").stdout

    def test_errors_of_a_snapshot(self, tmp_path: Path) -> None:
        """What could not be read is not forgotten when the backup's output is."""
        program, source = Program(tmp_path), make_source(tmp_path)
        program("create", "--no-encryption")
        program("backup", source)
        program("backup", source, "/no/such", "/nor/this", code=3)
        plain, marked = program("ls").stdout.splitlines()
        assert plain.endswith("/source")
        assert marked.endswith("   2 errors")
        line = "ls: not backed up as it should be: %s: No such file or directory"
        assert program("ls", "latest").stderr.splitlines() == [line % path for path in ("/no/such", "/nor/this")]
        assert program("-q", "ls", "latest").stderr == program("ls", f"latest:{source}").stderr == ""

    def test_workers_and_connections(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Taken everywhere; where packs are read there are as many processes, and reads at a time, as asked for."""
        run, source = fault_harness.create(tmp_path, encrypted=False), make_source(tmp_path)
        for number in range(3):
            (source / "fresh").write_bytes(os.urandom(10_000 + number))
            run("backup", source, "--workers", "1")
        started: list[int] = []
        for module in (check_packs, restore):
            pool = module.OpenPool

            def record(*arguments: Any, pool: Any = pool, **options: Any) -> Any:
                started.append(options["workers"])
                return pool(*arguments, **options)

            monkeypatch.setattr(module, "OpenPool", record)
        at_once: list[int] = []
        get_into = LocalConnector.get_into

        async def counted(*arguments: Any) -> None:
            reading.append(None)
            at_once.append(len(reading))
            await anyio.sleep(0.02)
            await get_into(*arguments)
            reading.pop()

        reading: list[None] = []
        monkeypatch.setattr(LocalConnector, "get_into", counted)
        run("check", "--workers", "2", "--connections", "3")
        assert (started, max(at_once)) == ([2], 3)
        at_once.clear()
        run("--workers", "1", "check", "--connections", "1")
        run("restore", "latest", "--to", tmp_path / "to", "--workers", "4", "--connections", "1")
        assert (started, max(at_once)) == ([2, 1, 4], 1)
        run("ls", "--workers", "1", "--connections", "1")

    def test_reader_gone(self, program: Program) -> None:
        """`coffret … | head`: ends without a word; not with 0, since not all was printed."""
        for arguments in (["ls", "-r", "latest"], ["backup", "-v", program.home / "source"], ["--help"], ["info"]):
            process = program.start(*arguments)
            assert process.stdout is not None
            process.stdout.close()
            assert process.stderr is not None
            errors = process.stderr.read()
            process.stderr.close()
            assert (process.wait(), errors) == (1, b""), arguments


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
