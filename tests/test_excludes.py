"""What is left out, from the command line to the snapshot: patterns, sizes, caches, other file systems."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.harness import Program, needs_root, path_of, scratch, with_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = {
    "a.o": "object",
    "a.c": "source",
    "notes.txt": "text",
    "build/out": "built",
    "build/deep/out": "built",
    "sub/a.o": "object",
    "sub/build": "a file of the name of a directory",
    "sub/keep.o": "object",
    "sub/.ignore": "*.txt\n!keep.txt\n/only-here\n",
    "sub/drop.txt": "text",
    "sub/keep.txt": "text",
    "sub/only-here": "x",
    "sub/below/only-here": "x",
    "sub/below/drop.txt": "x",
    "sub/below/.ignore": "!drop.txt\nkeep.txt",
    "sub/below/keep.txt": "x",
    "cached/CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55\n# comment",
    "cached/entry": "x",
    "cached/below/entry": "x",
    "not-cached/CACHEDIR.TAG": "Signature: none",
    "not-cached/entry": "x",
    "of-1000": "x" * 1000,
    "of-1001": "x" * 1001,
    "n\udcefe": "not UTF-8",
}


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """The program, with a repository beside the directory `source`."""
    with scratch() as place:
        made = Program(place)
        made("create", "--no-encryption")
        for name, text in FILES.items():
            path = place / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        yield made


def left_out(program: Program, *options: str, paths: tuple[Path, ...] = ()) -> set[str]:
    """Which of FILES a backup leaves out; it says what it takes, and takes nothing else."""
    source = program.home / "source"
    outcome = program("backup", "--json", "-v", *(paths or (source,)), *options)
    prefix = os.fsencode(source) + b"/"
    taken = {os.fsdecode(path_of(item).removeprefix(prefix)) for item in outcome.of_type("item")} & FILES.keys()
    assert outcome.summary["files"] == len(taken)
    assert outcome.summary["errors"] == 0
    return FILES.keys() - taken


IGNORED = {"sub/drop.txt", "sub/only-here", "sub/below/keep.txt"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], set()),
        (["--exclude", "*.o"], {"a.o", "sub/a.o", "sub/keep.o"}),
        (["--exclude", "*.o", "--exclude", "!keep.o"], {"a.o", "sub/a.o"}),
        (["--exclude=build/"], {"build/out", "build/deep/out"}),
        (["--exclude", "build"], {"build/out", "build/deep/out", "sub/build"}),
        (["--exclude", "**/deep"], {"build/deep/out"}),
        (["--exclude", "n\udcef*"], {"n\udcefe"}),
        (["--exclude", "/a.o"], set()),
        (["--ignore-file", ".ignore"], IGNORED),
        (["--ignore-file", ".ignore", "--exclude", "!only-here"], IGNORED - {"sub/only-here"}),
        (["--ignore-file", ".other"], set()),
        (["--exclude-caches"], {"cached/entry", "cached/below/entry"}),
        (["--exclude-larger-than", "1000"], {"of-1001"}),
        (["--exclude-larger-than", "0.9k"], {"of-1001", "of-1000"}),
        (["--exclude-larger-than", "1M"], set()),
    ],
    ids=lambda words: " ".join(words if isinstance(words, list) else sorted(words)),
)
def test_options(program: Program, options: list[str], expected: set[str]) -> None:
    assert left_out(program, *options) == expected


def test_patterns_begin_at_the_root_of_the_file_system(program: Program) -> None:
    source = program.home / "source"
    assert left_out(program, "--exclude", f"{source}/a.o") == {"a.o"}
    assert left_out(program, "--exclude", f"{source}/*/a.o") == {"sub/a.o"}
    # What is named is backed up whatever the patterns say of it and of the directories above.
    named = (source / "build", source / "a.o")
    others = FILES.keys() - {"build/out", "build/deep/out", "a.o"}
    assert left_out(program, "--exclude", "build", "--exclude", "*.o", "--exclude", "source", paths=named) == others


def test_an_exclude_file(program: Program) -> None:
    rules = program.home / "rules"
    rules.write_text("# comment\n\n*.o\n!keep.o\n\\#odd\nbuild/ \n")
    expected = {"a.o", "sub/a.o", "build/out", "build/deep/out"}
    assert left_out(program, "--exclude-file", str(rules)) == expected
    # The command line has the last word, wherever it stands.
    assert left_out(program, "--exclude", "keep.o", "--exclude-file", str(rules)) == expected | {"sub/keep.o"}


def test_what_becomes_excluded_is_gone_from_the_next_snapshot(program: Program) -> None:
    """And comes back when it no longer is, although the snapshot before had nothing to compare it with."""
    below = {name for name in FILES if name.startswith("sub/")}
    for options, expected in ((), set()), (("--exclude", "sub"), below), ((), set()):
        assert left_out(program, *options) == expected
        prefix = os.fsencode(program.home / "source") + b"/"
        stored = {os.fsdecode(path.removeprefix(prefix)) for path in program.listing()} & FILES.keys()
        assert stored == FILES.keys() - expected


@pytest.mark.parametrize(
    "options",
    [
        ["--exclude-file", "/no/such/file"],
        ["--ignore-file", "a/b"],
        ["--exclude-larger-than", "much"],
        ["--exclude-larger-than", "-1"],
    ],
    ids=lambda words: " ".join(words if isinstance(words, list) else sorted(words)),
)
def test_what_makes_no_sense(program: Program, options: list[str]) -> None:
    program("backup", *options, program.home / "source", code=2)


# Other file systems ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mounted() -> Iterator[Program]:
    """The program in a mount namespace: below `source` a tmpfs, a file system without data, and a bind mount."""
    with scratch() as place:
        source = place / "source"
        for name in ("tmpfs", "pts", "bound", "plain"):
            (source / name).mkdir(parents=True)
            (source / name / "hidden").write_text("by what is mounted here")
        (place / "elsewhere").mkdir()
        (place / "elsewhere" / "file").write_text("bound")
        script = f"""
            mount -t tmpfs none '{source}/tmpfs'
            echo text > '{source}/tmpfs/file'
            mkdir '{source}/tmpfs/directory'
            mount -t devpts -o newinstance none '{source}/pts'
            mount --bind '{place}/elsewhere' '{source}/bound'
            exec "$0" "$@"
        """
        made = Program(place)
        made("create", "--no-encryption")
        yield replace(made, prefix=with_mounts(script))


@needs_root
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["source"], {"tmpfs/file", "tmpfs/directory", "bound/file"}),
        (["source", "--one-file-system"], {"bound/file"}),
        (["source", "source/pts"], {"tmpfs/file", "tmpfs/directory", "bound/file", "pts/ptmx"}),
        (["source/pts"], {"pts/ptmx"}),
        (["source", "source/tmpfs", "--one-file-system"], {"tmpfs/file", "tmpfs/directory", "bound/file"}),
        (["source/tmpfs", "--one-file-system"], {"tmpfs/file", "tmpfs/directory"}),
        (["source/tmpfs", "source/plain", "--one-file-system"], {"tmpfs/file", "tmpfs/directory"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_file_systems(mounted: Program, arguments: list[str], expected: set[str]) -> None:
    """What is mounted is part of the tree, unless it is asked for otherwise or holds no data of its own."""
    made = mounted.backup(*arguments)
    assert made["errors"] == 0
    prefix = os.fsencode(mounted.home / "source") + b"/"
    found = {os.fsdecode(path.removeprefix(prefix)) for path in mounted.listing() if path.startswith(prefix)}
    mounts = ("tmpfs", "pts", "bound", "plain")
    directories = {name for name in mounts if {"source", f"source/{name}"} & set(arguments)}
    plain = {"plain/hidden"} if "plain" in directories else set()
    # Those that are not entered are there, empty: they are needed to mount something when all is restored.
    assert found == directories | plain | expected


@needs_root
def test_the_whole_machine_without_its_pseudo_file_systems(mounted: Program) -> None:
    """/proc and /sys of `backup /` are empty directories; the scan tells, nothing is stored."""
    rules = [f"--exclude=/{name}/*" for name in os.listdir("/") if name not in ("proc", "sys")]
    made = mounted.backup("/", *rules)
    assert made["paths"] == ["/"]
    assert made["files"] < 100, "those in the root directory alone"
    for name in ("proc", "sys"):
        if os.path.ismount(f"/{name}"):
            assert list(mounted.listing(path=f"/{name}".encode())) == [f"/{name}".encode()]
