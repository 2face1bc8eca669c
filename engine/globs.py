r"""One component of a gitignore pattern: what `*`, `?`, brackets and backslashes match in a file name.

Malformed patterns (a bracket that never closes, a backslash at the end, an unknown character class) match nothing, as
in git; no text a user or a stranger's ignore file may hold is an error.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# POSIX character classes, as git has them: ASCII only.
_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": r" \t",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": r"\x21-\x7e",
    "lower": "a-z",
    "print": r"\x20-\x7e",
    "punct": r"\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7e",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}


class Glob:
    """What one component of a pattern matches: a literal name, names with a suffix, or a regular expression."""

    __slots__ = ("_match", "literal", "regex", "suffix")

    def __init__(self, *, literal: bytes | None = None, suffix: bytes | None = None, regex: str = "") -> None:
        self.literal, self.suffix, self.regex = literal, suffix, regex
        self._match: Callable[[str], object] | None = None

    def matches(self, name: bytes) -> bool:
        """Whether a file name, as bytes, matches."""
        if self.literal is not None:
            return name == self.literal
        if self.suffix is not None:
            return name.endswith(self.suffix)
        if self._match is None:
            self._match = re.compile(self.regex, re.DOTALL).fullmatch
        return self._match(text_of(name)) is not None


# The component `**`: every name, and any number of components when it is not the last.
ANY_DEPTH = Glob(suffix=b"")


# One piece of a component: (the character if it is literal, the regular expression).
_Token = tuple[str, str]
_STAR: _Token = ("", ".*")
_ONE: _Token = ("", ".")


def parse_components(pattern: str) -> list[Glob] | None:
    """The components of a pattern, or None if it is malformed or one is empty: then it never matches."""
    parts: list[list[_Token]] = [[]]
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "*":
            parts[-1].append(_STAR)
        elif char == "?":
            parts[-1].append(_ONE)
        elif char == "[":
            bracket = _bracket(pattern, at)
            if bracket is None:
                return None
            expression, at = bracket
            parts[-1].append(("", expression))
        else:
            if char == "\\":
                if at == len(pattern):
                    return None
                char = pattern[at]
                at += 1
            if char == "/":
                parts.append([])
            else:
                parts[-1].append((char, re.escape(char)))
    return [_glob(part) for part in parts] if all(parts) else None


def _glob(tokens: list[_Token]) -> Glob:
    """The cheapest form of a component."""
    if len(tokens) > 1 and all(token is _STAR for token in tokens):
        return ANY_DEPTH
    stars = 0
    while stars < len(tokens) and tokens[stars] is _STAR:
        stars += 1
    rest = tokens[stars:]
    if all(literal for literal, _ in rest):
        name = "".join(literal for literal, _ in rest).encode("utf-8", "surrogateescape")
        return Glob(suffix=name) if stars else Glob(literal=name)
    # What stands between two stars is taken where it first occurs, atomically: no pattern, and a backup may meet an
    # evil one in an ignore file, makes the search more than quadratic in the name's length.
    pieces = [
        "".join(expression for _, expression in members)
        for star, members in groupby(tokens, key=lambda token: token is _STAR)
        if not star
    ]
    begin = "" if tokens[0] is _STAR else pieces.pop(0)
    end = "" if tokens[-1] is _STAR or not pieces else pieces.pop()
    middle = "".join(f"(?>.*?{piece})" for piece in pieces)
    return Glob(regex=f"{begin}{middle}.*{end}" if _STAR in tokens else begin)


def _bracket(pattern: str, at: int) -> tuple[str, int] | None:
    """The expression of a bracket that opens before `at`, and where it ends; None if it never does."""
    negated = pattern[at : at + 1] in ("!", "^")
    at += negated
    begin, items, low = at, "", ""  # low: the character that a range may begin with
    while (char := pattern[at : at + 1]) != "]" or at == begin:
        if not char:
            return None
        if pattern.startswith("[:", at):
            end = pattern.find("]", at + 2)
            if end < 0:
                return None
            if end > at + 2 and pattern[end - 1] == ":":
                members = _CLASSES.get(pattern[at + 2 : end - 1])
                if members is None:
                    return None
                items, low, at = items + members, "", end + 1
                continue
        is_range = char == "-" and low != "" and pattern[at + 1 : at + 2] not in ("", "]")
        at += is_range
        if pattern[at] == "\\":
            at += 1
        char = pattern[at : at + 1]
        if not char:
            return None
        if not is_range:
            items, low = items + re.escape(char), char
        else:
            if low <= char:
                items += f"{re.escape(low)}-{re.escape(char)}"
            low = ""
        at += 1
    return f"[{'^' if negated else ''}{items}]", at + 1


def text_of(data: bytes) -> str:
    """Characters of UTF-8, with a surrogate escape for each byte that is none."""
    return data.decode("utf-8", "surrogateescape")
