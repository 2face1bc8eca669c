r"""Rules of gitignore, matched one directory at a time.

A walk never asks about a whole path. In each directory a *cursor* knows how far every pattern has come, so that a name
is compared only with what may end there: `/home/*/.cache` costs nothing outside `/home`. Names are compared in the
cheapest way that decides: a set of literals, a tuple of suffixes (`*.o`), one regular expression for the rest.

The rules are git's (gitignore(5); `git check-ignore` is the oracle of the tests): a pattern without a slash, or with
one at its end only, matches names at any depth; others start at the rules' directory; `**` as a whole component is any
number of components; a slash at the end is for directories only; `!` takes back; the last match decides; what lies in
an excluded directory stays excluded. One difference: `?` and brackets match a character of UTF-8, where git sees bytes;
bytes that are not UTF-8 count one each.

Not pathspec, since that is made for lists of files. Asked about directories on the way down it takes the directory `a`
for matched by `a/**` and lets `*` win over a later `!*/`; it raises on `[z-a]`, knows no `[[:alpha:]]`, and stops at
newlines in names.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec

from coffret.engine.globs import ANY_DEPTH, parse_components, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coffret.engine.globs import Glob


class Place(msgspec.Struct, eq=False):
    """A component of a rule, as somewhere that a walk has come to: `glob` is to match the next name.

    `onward`: where the walk is then, in the directory of that name; `**` leads to itself and past itself.
    """

    rule: Rule
    glob: Glob
    ends: bool
    onward: dict[Place, None]


class Rule:
    """One pattern. `order`: among matching rules the one with the highest decides; `ignores` is False after `!`.

    `anywhere`: it is for names at any depth, those that `last` matches. Otherwise a walk begins at `start`.
    """

    __slots__ = ("anywhere", "directories_only", "ignores", "last", "order", "start")

    def __init__(self, order: int, ignores: bool, directories_only: bool, components: list[Glob]) -> None:
        self.order, self.ignores, self.directories_only = order, ignores, directories_only
        self.last = components[-1]
        self.anywhere = len(components) == 2 and components[0] is ANY_DEPTH
        self.start: dict[Place, None] = {}
        for glob in reversed(components):
            place = Place(self, glob, not self.start, self.start)
            if glob is ANY_DEPTH:
                place.onward = {place: None, **self.start}
                self.start = place.onward
            else:
                self.start = {place: None}


class Matcher:
    """What a number of rules say about a name, whatever directory it is in."""

    __slots__ = ("_for_directories", "_for_files")

    def __init__(self, rules: Iterable[Rule]) -> None:
        by_order = sorted(rules, key=lambda rule: -rule.order)
        self._for_directories = _runs(by_order)
        self._for_files = _runs([rule for rule in by_order if not rule.directories_only])

    def verdict(self, name: bytes, is_dir: bool) -> bool | None:
        """True: ignored; False: taken back by `!`; None: no rule says anything."""
        for ignores, literals, suffixes, match in self._for_directories if is_dir else self._for_files:
            if name in literals or name.endswith(suffixes) or (match is not None and match(text_of(name)) is not None):
                return ignores
        return None


_Run = tuple[bool, frozenset[bytes], tuple[bytes, ...], "Callable[[str], object] | None"]


def _runs(rules: list[Rule]) -> tuple[_Run, ...]:
    """Rules gathered where neighbours say the same: then it does not matter which of them matches."""
    runs: list[_Run] = []
    for ignores, members in groupby(rules, key=lambda rule: rule.ignores):
        globs = [rule.last for rule in members]
        expressions = dict.fromkeys(glob.regex for glob in globs if glob.regex)
        runs.append(
            (
                ignores,
                frozenset(glob.literal for glob in globs if glob.literal is not None),
                tuple({glob.suffix for glob in globs if glob.suffix is not None}),
                re.compile("|".join(expressions), re.DOTALL).fullmatch if expressions else None,
            )
        )
    return tuple(runs)


class RuleSet:
    """The rules of one source: the command line, or the ignore files of one directory.

    `start` is the cursor in the directory that the rules belong to.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        rules = [rule for order, line in enumerate(lines) if (rule := parse_rule(line, order)) is not None]
        self._anywhere = tuple(rule for rule in rules if rule.anywhere)
        self._matchers: dict[frozenset[Rule], Matcher] = {}
        self.ignores_anywhere = any(rule.ignores for rule in self._anywhere)
        self.start = self.cursor(tuple(place for rule in rules if not rule.anywhere for place in rule.start))
        self.empty = not rules

    def cursor(self, places: tuple[Place, ...]) -> Cursor:
        """The cursor of a directory in which the rules have come to these places."""
        ending = frozenset(place.rule for place in places if place.ends)
        matcher = self._matchers.get(ending)
        if matcher is None:
            matcher = self._matchers[ending] = Matcher((*self._anywhere, *ending))
        return Cursor(self, places, matcher)


class Cursor:
    """A rule set as seen from one directory. `verdict(name, is_dir)`: see `Matcher.verdict`."""

    __slots__ = ("_places", "_rules", "verdict")

    def __init__(self, rules: RuleSet, places: tuple[Place, ...], matcher: Matcher) -> None:
        self._rules, self._places, self.verdict = rules, places, matcher.verdict

    def enter(self, name: bytes) -> Cursor:
        """The cursor of the directory `name` in this one."""
        if not self._places:
            return self
        reached: dict[Place, None] = {}
        for place in self._places:
            if place.onward and place.glob.matches(name):
                reached |= place.onward
        places = tuple(reached)
        return self if places == self._places else self._rules.cursor(places)

    @property
    def may_ignore(self) -> bool:
        """Whether something in this directory or below could be matched by a rule without `!`."""
        return self._rules.ignores_anywhere or any(place.rule.ignores for place in self._places)


def parse_rule(line: str, order: int) -> Rule | None:
    """Parse one pattern, bytes that are not UTF-8 being surrogate escapes; None for one that can't match anything."""
    ignores = not line.startswith("!")
    body = line if ignores else line[1:]
    directories_only = body.endswith("/")
    body = body.removesuffix("/")
    components = parse_components(body.removeprefix("/"))
    if components is None:
        return None
    if "/" not in body:
        components.insert(0, ANY_DEPTH)
    return Rule(order, ignores, directories_only, components)


def rule_lines(data: bytes) -> list[str]:
    """The patterns in a file of rules: without comments, blanks at the end, line ends of either kind and a BOM."""
    lines = []
    for line in text_of(data.removeprefix(b"\xef\xbb\xbf")).split("\n"):
        line = line.removesuffix("\r")
        kept = line.rstrip(" ")
        if len(kept) < len(line) and (len(kept) - len(kept.rstrip("\\"))) % 2:
            kept += " "  # a blank behind a backslash belongs to the pattern
        if kept and not kept.startswith("#"):
            lines.append(kept)
    return lines
