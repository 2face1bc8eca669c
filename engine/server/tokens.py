"""Tokens: who may do what with a repository that is served.

    <state folder>/server/<hash of the location>.json    {"location": …, "tokens": [[id, label, right, created, hash]]}

A token is 32 random bytes, shown once. What is kept is its hash, which nobody can turn back: there is nothing to guess
or to look up in a table, as there is with passwords, so it needs neither salt nor a slow function.

What blocks here does so for milliseconds; call it in a thread, but for `TokenFile.find`.
"""

from __future__ import annotations

import datetime
import hmac
import os
import secrets
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from coffret.connectors.base import RIGHTS
from coffret.engine import state
from coffret.engine.errors import CoffretError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# So that who finds one, in a log or a public repository, knows what it is.
_PREFIX = "coffret_"
_TOKEN_BYTES = 32
_CONTEXT = "coffret 2026 server token"
_ID_DIGITS = 8
_MAX_TOKENS, _MAX_LABEL = 1000, 200
_MAX_FILE_BYTES = 1 << 20


class Token(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a token: the id people know it by, a label, its right, when it was made, its hash (hex)."""

    token_id: str
    label: str
    right: str
    created: str
    hash: str


class _Content(msgspec.Struct):
    """The content of a token file."""

    location: str
    tokens: list[Token]


class TokenFile:
    """The tokens of the repository at a location; a server that runs sees what others change."""

    def __init__(self, location: str, folder: Path | None = None) -> None:
        self.location = location
        self.path = state.file_of(location, "server", folder)
        self._seen: tuple[int, int, int] | None = None
        self._tokens: Sequence[Token] = ()

    def tokens(self) -> list[Token]:
        """The tokens there are, oldest first.

        :raises CoffretError: if the file is damaged, or can't be read
        """
        try:
            with self.path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(f"{self.path}: {error.strerror}") from None
        try:
            tokens = msgspec.json.decode(data, type=_Content).tokens
        except (ValueError, RecursionError):
            raise self._unusable(f"{self.path} is damaged") from None
        if any(token.right not in RIGHTS for token in tokens):
            raise self._unusable(f"{self.path} names a right that is none")
        return tokens

    def add(self, right: str, label: str) -> tuple[Token, str]:
        """Make a token; returns what is kept of it, and the token itself, which nobody can tell again.

        :raises UsageError: if the label can't be shown, or there are too many
        """
        if len(label) > _MAX_LABEL or not label.isprintable():
            raise UsageError(f"a label has at most {_MAX_LABEL} printable characters", remedy="choose another --label")
        text = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
        hashed = hash_of(text)
        created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with state.locked(self.path.parent):
            tokens = self.tokens()
            if len(tokens) >= _MAX_TOKENS:
                raise UsageError(f"there are {_MAX_TOKENS} tokens already", remedy="remove some with `server token rm`")
            token = Token(_unused_id(hashed, tokens), label, right, created, hashed)
            self._write([*tokens, token])
        return token, text

    def remove(self, given: str) -> Token:
        """Remove the token with an id; from then on it opens nothing.

        :raises UsageError: if there is none
        """
        with state.locked(self.path.parent):
            tokens = self.tokens()
            found = [token for token in tokens if token.token_id == given]
            if not found:
                raise UsageError(f"no token has the id {given!r}", remedy="see `coffret at REPO server token list`")
            self._write([token for token in tokens if token not in found])
        return found[0]

    def find(self, text: str) -> Token | None:
        """The token that is given, if it is one of those there are now. Costs no more than asking for the file's time.

        :raises CoffretError: if the file is damaged, or can't be read
        """
        try:
            status = os.stat(self.path)
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        except OSError:
            seen = (0, 0, 0)
        if seen != self._seen:
            self._tokens = ()
            self._tokens, self._seen = self.tokens(), seen
        hashed = hash_of(text)
        # All of them, in constant time: the hash alone would leak little, and so it leaks nothing.
        found = [token for token in self._tokens if hmac.compare_digest(token.hash, hashed)]
        return found[0] if found else None

    def _write(self, tokens: list[Token]) -> None:
        shown = self.location.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        state.replace_durably(self.path, msgspec.json.encode(_Content(shown, tokens)) + b"\n")

    def _unusable(self, message: str) -> CoffretError:
        return CoffretError(
            f"{message}; it says which tokens give access to {self.location}",
            remedy="put it right, or delete it and make the tokens anew",
        )


def hash_of(text: str) -> str:
    """What is kept of a token (hex)."""
    return blake3(text.encode("utf-8", "surrogateescape"), derive_key_context=_CONTEXT).hexdigest()


def _unused_id(hashed: str, tokens: Sequence[Token]) -> str:
    """The first digits of the hash, as many as it takes."""
    digits = _ID_DIGITS
    while any(token.token_id == hashed[:digits] for token in tokens):
        digits += 1
    return hashed[:digits]
