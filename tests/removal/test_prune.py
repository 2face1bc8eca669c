"""`prune` as it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.fault_harness import Here
from tests.harness import Program

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A repository with three snapshots of `source`, the second tagged, and one of another host."""
    program = Program(tmp_path)
    (tmp_path / "source").mkdir()
    program("create", "--no-encryption")
    for options in ([], ["--tag", "keep"], [], ["--host", "elsewhere"]):
        program.backup(tmp_path / "source", *options)
    return program


def listed(program: Program) -> list[str]:
    return [line.split()[1] for line in program("ls").stdout.splitlines()]


def test_prune(program: Program) -> None:
    first, second, third, other = listed(program)
    shown = program("prune", "--keep-last", "1", "--keep-tag", "keep", "--dry-run").stdout.splitlines()
    groups = [line for line in shown[:-1] if not line.startswith("  ")]
    assert sorted(group.partition(",")[0] for group in groups)[0] == "host elsewhere"
    assert all(group.endswith(f", paths {program.home}/source:") for group in groups)
    lines = {line.split()[2]: line.split() for line in shown if line.startswith("  ")}
    assert {short: words[0] for short, words in lines.items()} == {
        first: "remove",
        second: "keep",
        third: "keep",
        other: "keep",
    }
    assert " ".join(lines[second][-3:]) == "has tags keep"
    assert " ".join(lines[third][-2:]) == " ".join(lines[other][-2:]) == "last snapshot"
    assert " ".join(lines[first][-3:]) == "nothing keeps it"
    assert shown[-1] == "prune: would remove 1 snapshot and keep 3"
    assert listed(program) == [first, second, third, other]

    assert program("prune", "--keep-last", "1", "--host", "elsewhere").stdout == "prune: removed 0 snapshots, kept 1\n"
    assert program("prune", "--keep-last", "1", "--path", "/nowhere").stdout == "prune: removed 0 snapshots, kept 0\n"
    outcome = program("prune", "-keep-last", "1", "--keep-tag=keep", "--path", "source")
    assert outcome.stdout == "prune: removed 1 snapshot, kept 3\n"
    assert listed(program) == [second, third, other]
    outcome = program("prune", "-v", "--keep-last", "1", "--group-by", "none")
    assert outcome.stdout.splitlines()[0] == "all:"
    assert outcome.stdout.splitlines()[-1] == "prune: removed 2 snapshots, kept 1"
    assert listed(program) == [other]
    program("check")


def test_a_group_is_never_emptied(program: Program) -> None:
    before = listed(program)
    error = program("prune", "--keep-tag", "keep", code=1).stderr
    assert "the only one of its group" in error
    assert program("prune", "--keep-tag", "none", "--group-by", "none", code=1).stderr.startswith(
        "coffret: nothing would be left of the 4 snapshots"
    )
    assert listed(program) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--keep-last", "0", "--keep-within", "0h"],
        ["--keep-last", "-2"],
        ["--keep-last", "many"],
        ["--keep-within", "1w"],
        ["--keep-tag", ","],
        ["--keep-last", "1", "--group-by", "hosts"],
    ],
)
def test_what_makes_no_sense(tmp_path: Path, arguments: list[str]) -> None:
    """It is refused before the repository is looked at."""
    outcome = Here(tmp_path)("prune", *arguments, codes=(2,))
    assert len(outcome.stderr.splitlines()) == 1
    assert ("coffret at REPO maintenance" in outcome.stderr) == (arguments[-1:] in ([], ["0h"]))
