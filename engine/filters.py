"""What is left out of a backup, and what a restore takes: --exclude, --ignore-file, --include and their kin.

All patterns follow gitignore's rules (`engine/patterns.py`). Those of the command line start at the root of the file
system, so that `/var/cache` is anchored and `*.o` is not; those of an ignore file start at its directory. Where several
say something about a path the command line decides, then the deepest ignore file. A PATH that is named is backed up
whatever the patterns say of it and of the directories above, and ignore files above it are not read.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from coffret.engine.errors import UsageError
from coffret.engine.globs import ANY_DEPTH, parse_components
from coffret.engine.patterns import RuleSet, rule_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from pathlib import Path

    from coffret.engine.patterns import Cursor

# A file of rules this long or longer is not taken for one: half its rules might be the wrong half.
RULES_MAX_BYTES = 1 << 20
# https://bford.info/cachedir/: a directory whose CACHEDIR.TAG is a regular file that begins so is a cache.
CACHE_TAG = b"CACHEDIR.TAG"
CACHE_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"
# Views of directories that PathPatterns remembers.
_VIEWS = 4096


class FilterScope:
    """What is left out of one directory; made by `Filters.enter`."""

    __slots__ = ("_limit_bytes", "_only", "cursors")

    def __init__(self, cursors: tuple[Cursor, ...], limit_bytes: int, only: bytes | None) -> None:
        self.cursors, self._limit_bytes, self._only = cursors, limit_bytes, only

    def excluded(self, name: bytes, is_dir: bool, size_bytes: int) -> bool:
        """Whether the entry `name` is left out, with all below it. `size_bytes` is 0 for what is no regular file."""
        if self._only is not None:
            return name != self._only
        for cursor in self.cursors:
            verdict = cursor.verdict(name, is_dir)
            if verdict is not None:
                if verdict:
                    return True
                break
        return size_bytes > self._limit_bytes


class Filters:
    """What a backup leaves out; built once a run.

    `exclude_files` hold patterns a line, which count before `excludes`. `ignore_names`: each directory's files of these
    names hold patterns for it and what is below. `exclude_caches`: of a directory tagged as a cache only the directory
    itself and its tag are kept. `exclude_larger_than`: regular files of more bytes than that are left out.

    :raises UsageError: if an exclude file can't be read, or an ignore file's name is none
    """

    def __init__(
        self,
        *,
        excludes: Sequence[str] = (),
        exclude_files: Sequence[Path] = (),
        ignore_names: Sequence[str] = (),
        exclude_caches: bool = False,
        exclude_larger_than: int | None = None,
    ) -> None:
        self._command_line = RuleSet([*_lines_of(exclude_files), *_arguments(excludes)])
        self._ignore_names = [_file_name(name) for name in ignore_names]
        self._exclude_caches = exclude_caches
        self._limit_bytes = sys.maxsize if exclude_larger_than is None else exclude_larger_than
        # Many directories have the same ignore file.
        self._rule_sets: dict[tuple[bytes, ...], RuleSet] = {}

    def enter(
        self,
        directory: bytes,
        names: Collection[bytes],
        read: Callable[[bytes], bytes | None],
        parent: FilterScope | None,
    ) -> FilterScope:
        """The scope of a directory that is about to be listed.

        :param directory: its path without the leading slash; the root is b""
        :param names: what it holds
        :param read: returns the first RULES_MAX_BYTES of one of them, or None if it is no regular file (a symbolic link
            is none) or can't be read
        :param parent: the scope of the directory above, or None where the walk begins
        """
        if self._exclude_caches and CACHE_TAG in names and (read(CACHE_TAG) or b"").startswith(CACHE_SIGNATURE):
            return FilterScope((), self._limit_bytes, CACHE_TAG)
        if parent is None:
            cursors = [] if self._command_line.empty else [_descend(self._command_line.start, directory)]
        else:
            own_name = directory.rpartition(b"/")[2]
            cursors = [cursor.enter(own_name) for cursor in parent.cursors]
        contents = tuple(data for name in self._ignore_names if name in names and (data := read(name)))
        if contents:
            rules = self._rules_of(contents)
            if not rules.empty:
                cursors.insert(0 if self._command_line.empty else 1, rules.start)
        return FilterScope(tuple(cursors), self._limit_bytes, None)

    def _rules_of(self, contents: tuple[bytes, ...]) -> RuleSet:
        rules = self._rule_sets.get(contents)
        if rules is None:
            lines = [line for data in contents if len(data) < RULES_MAX_BYTES for line in rule_lines(data)]
            rules = self._rule_sets[contents] = RuleSet(lines)
        return rules


class PathPatterns:
    """Which paths of a snapshot are wanted: those that an include pattern matches, all if there is none, but for those
    that an exclude pattern matches.

    What is matched stands for all below it. Below an included directory a later `!pattern` takes out again; below an
    excluded one nothing comes back, as in gitignore.
    """

    def __init__(self, includes: Sequence[str] = (), excludes: Sequence[str] = ()) -> None:
        self._texts = [*includes, *excludes]
        self._root = _View(
            RuleSet(_arguments(includes)).start, RuleSet(_arguments(excludes)).start, not includes, False
        )
        self._views: dict[bytes, _View] = {b"": self._root}

    def wanted(self, path: bytes, is_dir: bool) -> bool:
        """Whether the entry at `path` (without a leading slash) is asked for.

        The directories on the way to what is wanted need not be wanted themselves.
        """
        if not path:
            return self._root.included
        directory, _, name = path.rpartition(b"/")
        included, excluded = self._view(directory).judge(name, is_dir)
        return included and not excluded

    def may_contain(self, directory: bytes) -> bool:
        """Whether anything in a directory or below it could be wanted. False is certain, True is not."""
        view = self._view(directory)
        return not view.excluded and (view.included or view.includes.may_ignore)

    def idle(self, start: bytes) -> list[str]:
        """Patterns that can match nothing at or below a path, as they were given; see `idle_patterns`."""
        return idle_patterns(self._texts, [start])

    def _view(self, directory: bytes) -> _View:
        missing = []
        while (view := self._views.get(directory)) is None:
            directory, _, name = directory.rpartition(b"/")
            missing.append(name)
        if len(self._views) > _VIEWS:
            self._views = {b"": self._root}
        for name in reversed(missing):
            view = view.enter(name)
            directory = directory + b"/" + name if directory else name
            self._views[directory] = view
        return view


class _View:
    """Include and exclude patterns as seen from one directory, and whether they already decided about it."""

    __slots__ = ("excluded", "excludes", "included", "includes")

    def __init__(self, includes: Cursor, excludes: Cursor, included: bool, excluded: bool) -> None:
        self.includes, self.excludes, self.included, self.excluded = includes, excludes, included, excluded

    def judge(self, name: bytes, is_dir: bool) -> tuple[bool, bool]:
        """Whether an entry of this directory is (included, excluded)."""
        included = self.includes.verdict(name, is_dir)
        excluded = self.excluded or self.excludes.verdict(name, is_dir) is True
        return self.included if included is None else included, excluded

    def enter(self, name: bytes) -> _View:
        """The view from the directory `name` in this one."""
        return _View(self.includes.enter(name), self.excludes.enter(name), *self.judge(name, True))


# What to say of them.
MATCHES_NOTHING = "matches nothing: with a slash it begins at /; to match it anywhere put **/ before it"


def idle_patterns(patterns: Sequence[str], roots: Sequence[bytes]) -> list[str]:
    """Of patterns that were meant to begin in some directory, as a shell's do, those that match nothing below `roots`.

    With a slash in it a pattern begins at `/`, whether it says so or not: `./notes` never matches, and `me/notes` does
    not where everything lies in `home`. Roots are without a leading slash; b"" is all.
    """
    tops = [root.split(b"/")[0] for root in roots]
    return [text for text, given in zip(patterns, _arguments(patterns), strict=True) if _is_idle(given, tops)]


def _is_idle(pattern: str, tops: Sequence[bytes]) -> bool:
    body = pattern.removeprefix("!").removesuffix("/")
    components = parse_components(body) if "/" in body and not body.startswith("/") else None
    if components is None or components[0] is ANY_DEPTH:
        return False
    if any(glob.literal in (b".", b"..") for glob in components):
        return True
    return not any(not top or components[0].matches(top) for top in tops)


def _descend(cursor: Cursor, directory: bytes) -> Cursor:
    for name in directory.split(b"/") if directory else ():
        cursor = cursor.enter(name)
    return cursor


def _arguments(patterns: Iterable[str]) -> list[str]:
    """Patterns of the command line, in UTF-8 whatever the locale; unlike a file's lines they are taken as they are."""
    return [os.fsencode(pattern).decode("utf-8", "surrogateescape") for pattern in patterns]


def _lines_of(paths: Iterable[Path]) -> list[str]:
    lines: list[str] = []
    for path in paths:
        try:
            lines += rule_lines(path.read_bytes())
        except OSError as error:
            raise UsageError(
                f"exclude file {path}: {error.strerror}", remedy="check the path given to --exclude-file"
            ) from None
    return lines


def _file_name(name: str) -> bytes:
    if not name or "/" in name:
        raise UsageError(
            f"not the name of an ignore file: {name!r}",
            remedy="give a file name without a directory, as in .backupignore",
        )
    return os.fsencode(name)
