"""A stream as a source."""

from __future__ import annotations

import hashlib
import os
import stat
from random import Random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness import Program

MIB = 1 << 20


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
