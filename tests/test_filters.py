"""What is left out: gitignore's rules against git itself, and the options around them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coffret.engine.errors import UsageError
from coffret.engine.filters import CACHE_SIGNATURE, RULES_MAX_BYTES, Filters, PathPatterns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coffret.engine.filters import FilterScope

# A tree as its paths: None for a directory, else the file's content.
Tree = dict[bytes, bytes | None]

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git, the oracle, is not installed")
oracle = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def left_out(filters: Filters, tree: Tree, *, top: bytes = b"") -> set[bytes]:
    """All paths below `top` that a walk with these filters does not see."""
    return {path for path in tree if path != top} - set(_walk(filters, tree, top, None))


def _walk(filters: Filters, tree: Tree, directory: bytes, parent: FilterScope | None) -> Iterator[bytes]:
    prefix = directory + b"/" if directory else b""
    names = sorted(path[len(prefix) :] for path in tree if path.startswith(prefix) and b"/" not in path[len(prefix) :])
    scope = filters.enter(directory, names, lambda name: tree[prefix + name], parent)
    for name in names:
        content = tree[prefix + name]
        if not scope.excluded(name, content is None, len(content or b"")):
            yield prefix + name
            if content is None:
                yield from _walk(filters, tree, prefix + name, scope)


def tree_of(*paths: str) -> Tree:
    """A tree from paths, directories ending in a slash; those on the way need not be named."""
    tree: Tree = {}
    for path in paths:
        parts = os.fsencode(path).strip(b"/").split(b"/")
        for depth in range(1, len(parts)):
            tree.setdefault(b"/".join(parts[:depth]), None)
        tree[b"/".join(parts)] = None if path.endswith("/") else b""
    return tree


def excluded(*patterns: str, tree: Tree) -> list[str]:
    return sorted(os.fsdecode(path) for path in left_out(Filters(excludes=patterns), tree))


# --- git is the oracle ------------------------------------------------------------------------------------------------

names = st.one_of(
    st.sampled_from(["a", "b", "ab", "a.c", "b.c", "abc", "[a]", "a*", " a", "-", "]", "a\\b", "!a", "#a", "a "]),
    st.text("ab.-[]!\\ \n", min_size=1, max_size=3),
).filter(lambda name: name not in (".", ".."))
pieces = st.one_of(
    st.sampled_from(
        ["a", "b", "c", ".", "*", "**", "/", "/", "/**/", "**/", "/**", "?", "[ab]", "[!a]", "[^a]", "[a-b]"]
    ),
    st.sampled_from(["[]-]", "[[:alpha:]]", "[![:punct:]x]", "[b-a]", "[", "]", "[a-]", "[--.]", "[\\]]", "[[:x:]]"]),
    st.sampled_from(["\\a", "\\*", "\\", "\\!", "\\ ", " ", "-", "!", "#", "[[a]", "[a/b]", "[:]", "[[:]", "[a\\-b]"]),
)
# Two habits of git's that its manual contradicts are not taken over: after nothing but literals `x**/` is `x` + `**/`,
# though other consecutive asterisks "are considered regular asterisks"; and `**\\/` needs a directory, `**/` none.
habits = re.compile(r"(?!^!)[^/*]\*\*+/|\*\*+\\/")
lines = st.builds(
    str.__add__, st.sampled_from(["", "", "!", "/"]), st.lists(pieces, min_size=1, max_size=5).map("".join)
).filter(lambda line: habits.search(line) is None)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Small trees, most of them with directories of the same few names."""
    paths = draw(st.lists(st.lists(names, min_size=1, max_size=4).map("/".join), min_size=1, max_size=8))
    ends = draw(st.lists(st.sampled_from(["", "/"]), min_size=len(paths), max_size=len(paths)))
    tree: Tree = {}
    for path, end in zip(paths, ends, strict=True):
        for key, value in tree_of(path + end).items():
            if tree.setdefault(key, value) is not None and value is None:
                tree[key] = None
    return tree


class Git:
    """git on trees that are made for it."""

    def __init__(self, root: Path) -> None:
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(root), "GIT_CONFIG_NOSYSTEM": "1"}
        self.top = os.fsencode(root / "repository")
        subprocess.run(["git", "init", "-q", self.top], env=self.environment, check=True)

    def make(self, tree: Tree) -> None:
        """Make the working tree be `tree`."""
        for entry in os.scandir(self.top):
            if entry.is_dir() and entry.name != b".git":
                shutil.rmtree(entry.path)
            elif not entry.is_dir():
                os.unlink(entry.path)
        for path, content in sorted(tree.items()):
            if content is None:
                os.mkdir(os.path.join(self.top, path))
            else:
                with open(os.path.join(self.top, path), "wb") as file:  # noqa: PTH123 (names that are not UTF-8)
                    file.write(content)

    def ignored(self, tree: Tree, rules: bytes = b"") -> set[bytes]:
        """The paths of `tree` that git ignores by its .gitignore files and by `rules` for the top directory."""
        self.make(tree)
        with open(os.path.join(self.top, b".git/info/exclude"), "wb") as file:  # noqa: PTH123
            file.write(rules)
        asked = b"".join(b"./" + path + b"\0" for path in tree)
        return {path[2:] for path in self._run(["check-ignore", "-z", "--stdin"], asked)}

    def ignored_files(self, tree: Tree, excludes: list[str]) -> set[bytes]:
        """The files of `tree` that `git ls-files` ignores by patterns of the command line and .gitignore files."""
        self.make(tree)
        options = [f"--exclude={pattern}" for pattern in excludes]
        return self._run(["ls-files", "-z", "--others", "--ignored", "--exclude-per-directory=.gitignore", *options])

    def _run(self, command: list[str], given: bytes = b"") -> set[bytes]:
        done = subprocess.run(
            ["git", *command], cwd=self.top, env=self.environment, input=given, capture_output=True, check=False
        )
        assert done.returncode in (0, 1), done.stderr  # 1: nothing is ignored
        return {path for path in done.stdout.split(b"\0") if path}


@pytest.fixture(scope="module")
def git(tmp_path_factory: pytest.TempPathFactory) -> Git:
    return Git(tmp_path_factory.mktemp("git"))


@st.composite
def trees_with_rules(draw: st.DrawFn) -> Tree:
    """Trees in whose directories lie .gitignore files."""
    tree = draw(trees())
    for directory in [b"", *(path + b"/" for path, content in tree.items() if content is None)]:
        rules = draw(st.lists(lines, max_size=2))
        if rules:
            tree[directory + b".gitignore"] = "\n".join(rules).encode()
    return tree


@needs_git
@oracle
@given(tree=trees(), patterns=st.lists(lines, min_size=1, max_size=4), end=st.sampled_from(["\n", "\r\n"]))
def test_rules_are_those_of_git(git: Git, tmp_path: Path, tree: Tree, patterns: list[str], end: str) -> None:
    rules = "".join(line + end for line in patterns).encode()
    (tmp_path / "rules").write_bytes(rules)
    assert left_out(Filters(exclude_files=[tmp_path / "rules"]), tree) == git.ignored(tree, rules)


@needs_git
@oracle
@given(tree=trees_with_rules())
def test_nested_ignore_files_are_those_of_git(git: Git, tree: Tree) -> None:
    assert left_out(Filters(ignore_names=[".gitignore"]), tree) == git.ignored(tree)


@needs_git
@oracle
@given(tree=trees_with_rules(), patterns=st.lists(lines, max_size=3))
def test_the_command_line_decides_before_ignore_files(git: Git, tree: Tree, patterns: list[str]) -> None:
    files = {path for path, content in tree.items() if content is not None}
    ours = left_out(Filters(excludes=patterns, ignore_names=[".gitignore"]), tree)
    assert ours & files == git.ignored_files(tree, patterns)


raw_names = st.binary(min_size=1, max_size=3).map(lambda name: name.replace(b"/", b"a").replace(b"\0", b"b"))


@needs_git
@oracle
@given(paths=st.lists(st.lists(raw_names, min_size=1, max_size=3), min_size=1, max_size=4), data=st.data())
def test_names_that_are_not_utf8(git: Git, tmp_path: Path, paths: list[list[bytes]], data: st.DataObject) -> None:
    tree: Tree = {}
    for parts in paths:
        if b"." in parts or b".." in parts:
            continue
        for depth in range(1, len(parts) + 1):
            tree[b"/".join(parts[:depth])] = None
    # Patterns of literals and stars alone: what a character is does not matter to those.
    shown = [b"".join(b"\\" + part[i : i + 1] for i in range(len(part))) for parts in paths for part in parts]
    pattern = st.lists(st.sampled_from([*shown, b"*", b"/"]), min_size=1, max_size=3).map(b"".join)
    rules = b"\n".join(data.draw(st.lists(pattern.filter(lambda line: b"\n" not in line), min_size=1, max_size=3)))
    (tmp_path / "rules").write_bytes(rules)
    assert left_out(Filters(exclude_files=[tmp_path / "rules"]), tree) == git.ignored(tree, rules)


# --- By hand ----------------------------------------------------------------------------------------------------------

HOME = tree_of(
    "home/u/.cache/x",
    "home/u/src/main.c",
    "home/u/src/main.o",
    "home/u/src/keep.o",
    "home/u/src/build/out",
    "var/cache/y",
)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.o"], ["home/u/src/keep.o", "home/u/src/main.o"]),
        (["*.o", "!keep.o"], ["home/u/src/main.o"]),
        (["cache"], ["var/cache", "var/cache/y"]),
        (["/cache"], []),
        (["/home/*/.cache"], ["home/u/.cache", "home/u/.cache/x"]),
        (["/home/**/build/"], ["home/u/src/build", "home/u/src/build/out"]),
        (["main.c/"], []),
        (["/var/*"], ["var/cache", "var/cache/y"]),
        (["/var/**"], ["var/cache", "var/cache/y"]),
        (["/var", "!/var/cache"], ["var", "var/cache", "var/cache/y"]),
        (["*", "!*/", "!*.c"], [path for path in map(os.fsdecode, HOME) if path[-2:] in ("/x", ".o", "ut", "/y")]),
        ([""], []),
        (["#x"], []),
    ],
)
def test_patterns(patterns: list[str], expected: list[str]) -> None:
    assert excluded(*patterns, tree=HOME) == sorted(expected)


def test_a_question_mark_is_a_character_of_utf8_or_one_other_byte() -> None:
    tree: Tree = dict.fromkeys((b"\xc3\xa9", b"\xff", b"ab", b"\n", b"\xe2\x82\xac"), b"")
    assert left_out(Filters(excludes=["?"]), tree) == set(tree) - {b"ab"}
    assert left_out(Filters(excludes=["[é-ü€]"]), tree) == {b"\xc3\xa9", b"\xe2\x82\xac"}
    assert left_out(Filters(excludes=["\udcff"]), tree) == {b"\xff"}


def test_a_walk_may_begin_anywhere() -> None:
    filters = Filters(excludes=["/home/u/src/*.o", "x", "/home", "u"])
    assert left_out(filters, {p: c for p, c in HOME.items() if p.startswith(b"home/u/")}, top=b"home/u") == {
        b"home/u/.cache/x",
        b"home/u/src/keep.o",
        b"home/u/src/main.o",
    }


def test_several_ignore_files_in_one_directory_count_in_the_order_given() -> None:
    tree = tree_of("a", "b") | {b".first": b"a\nb\n", b".second": b"!b\n"}
    assert left_out(Filters(ignore_names=[".first", ".second"]), tree) == {b"a"}
    assert left_out(Filters(ignore_names=[".second", ".first"]), tree) == {b"a", b"b"}


def test_an_ignore_file_that_is_too_long_or_unreadable_is_none() -> None:
    filters = Filters(ignore_names=[".ignore"])
    long = b"a\n" * (RULES_MAX_BYTES // 2)
    for read in (lambda _: long, lambda _: None):
        scope = filters.enter(b"", [b".ignore", b"a"], read, None)
        assert not scope.excluded(b"a", False, 0)


def test_of_a_cache_the_directory_and_its_tag_are_kept() -> None:
    tree = tree_of("cache/data/x", "cache/y", "fake/z")
    tree |= {b"cache/CACHEDIR.TAG": CACHE_SIGNATURE + b"\n# made by", b"fake/CACHEDIR.TAG": CACHE_SIGNATURE[:-1]}
    assert left_out(Filters(exclude_caches=True), tree) == {b"cache/data", b"cache/data/x", b"cache/y"}
    assert left_out(Filters(excludes=["unrelated"]), tree) == set()


def test_larger_files_are_left_out_and_those_of_that_size_are_not() -> None:
    tree: Tree = {b"d": None, b"d/small": b"x" * 10, b"d/large": b"x" * 11}
    assert left_out(Filters(exclude_larger_than=10), tree) == {b"d/large"}
    assert left_out(Filters(exclude_larger_than=10, excludes=["!large"]), tree) == {b"d/large"}


def test_what_makes_no_sense_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude file"):
        Filters(exclude_files=[tmp_path / "missing"])
    for name in ("", "a/b"):
        with pytest.raises(UsageError, match="ignore file"):
            Filters(ignore_names=[name])


def test_an_evil_pattern_ends() -> None:
    """Stars and near misses: with backtracking this would outlast the suite's timeout by years."""
    patterns = ["*a" * 60 + "b", "/" + "**/a/" * 30 + "b"]
    tree = tree_of("a" * 255, "a/" * 60)
    assert excluded(*patterns, tree=tree) == []


# --- What a restore takes ---------------------------------------------------------------------------------------------


def wanted(patterns: PathPatterns, tree: Tree) -> list[str]:
    return sorted(os.fsdecode(path) for path, content in tree.items() if patterns.wanted(path, content is None))


def test_without_patterns_everything_is_wanted() -> None:
    patterns = PathPatterns()
    assert wanted(patterns, HOME) == sorted(map(os.fsdecode, HOME))
    assert patterns.wanted(b"", True)
    assert patterns.may_contain(b"")


@pytest.mark.parametrize(
    ("includes", "excludes", "expected"),
    [
        (["*.o"], [], ["home/u/src/keep.o", "home/u/src/main.o"]),
        (["/home/u/src", "!*.o"], ["build/"], ["home/u/src", "home/u/src/main.c"]),
        (["src/"], ["*.o", "!keep.o", "build"], ["home/u/src", "home/u/src/keep.o", "home/u/src/main.c"]),
        ([], ["/home"], ["var", "var/cache", "var/cache/y"]),
        (["/home"], ["/home", "!/home/u/src"], []),
        (["cache/**"], [], []),
        (["**/cache/**"], [], ["var/cache/y"]),
        (["nothing"], [], []),
    ],
)
def test_includes_and_excludes(includes: list[str], excludes: list[str], expected: list[str]) -> None:
    assert wanted(PathPatterns(includes, excludes), HOME) == expected


def test_directories_that_need_not_be_looked_at() -> None:
    patterns = PathPatterns(["/home/*/src/*.c"], ["build"])
    assert [patterns.may_contain(path) for path in (b"", b"home", b"home/u", b"home/u/src")] == [True] * 4
    assert not any(patterns.may_contain(path) for path in (b"var", b"home/u/.cache", b"home/u/src/build"))
    assert not patterns.wanted(b"", True)


@settings(max_examples=100, deadline=None)
@given(tree=trees(), includes=st.lists(lines, max_size=3), excludes=st.lists(lines, max_size=3))
def test_wanted_is_what_filters_would_say(tree: Tree, includes: list[str], excludes: list[str]) -> None:
    """Excludes leave out what they leave out of a backup; and nothing wanted lies where nothing may be."""
    files = sorted(tree, key=lambda path: path[::-1])
    assert set(tree) - set(filter_paths(PathPatterns([], excludes), tree, files)) == left_out(
        Filters(excludes=excludes), tree
    )
    patterns = PathPatterns(includes, excludes)
    for path in filter_paths(patterns, tree, files):
        while path:
            path = path.rpartition(b"/")[0]
            assert patterns.may_contain(path)


def filter_paths(patterns: PathPatterns, tree: Tree, paths: list[bytes]) -> list[bytes]:
    return [path for path in paths if patterns.wanted(path, tree[path] is None)]


def test_a_path_of_thousands_of_directories() -> None:
    deep = b"/".join([b"d"] * 5000)
    patterns = PathPatterns(["/d/**/x"])
    assert patterns.wanted(deep + b"/x", False)
    assert not patterns.wanted(deep + b"/y", False)


@pytest.mark.parametrize(
    ("pattern", "idle"),
    [
        ("./keep", True),
        ("../keep", True),
        ("!me/./keep", True),
        ("me/keep", True),
        ("m?/keep/", True),
        ("home/keep", False),
        ("ho*/keep", False),
        ("/me/keep", False),
        ("**/keep", False),
        ("keep", False),
        ("keep/", False),
        ("[/keep", False),
    ],
)
def test_patterns_that_are_meant_to_begin_in_the_current_directory(pattern: str, idle: bool) -> None:
    assert PathPatterns([pattern]).idle(b"home/me") == [pattern] * idle
    # Where all of the file system is meant, something may match.
    assert PathPatterns([], [pattern]).idle(b"") == [pattern] * (idle and "." in pattern)
