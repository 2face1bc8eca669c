"""Where a local repository lies: from a path or `file:///path` to its folder, and to its location."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes, urlsplit

from coffret.connectors.errors import InvalidLocation

if TYPE_CHECKING:
    from collections.abc import Mapping


def parse_location(url: str, options: Mapping[str, str]) -> str:
    """The path that is meant by a path or a `file:///` URL (percent-encoded).

    :raises InvalidLocation: if there are options, a host other than this one, or no absolute path in the URL
    """
    if options:
        raise InvalidLocation(f"a local repository has no option {min(options)!r}")
    if url[:7].lower() == "file://":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
            raise InvalidLocation(f"{url}: a file URL has the form file:///path, and ? and # are written %3F and %23")
        return os.fsdecode(unquote_to_bytes(parts.path))
    if url.startswith("~"):
        return os.path.expanduser(url)  # not Path's, which fails for ~unknown: a file may be called so
    return url


def real_folder(path: str | os.PathLike[str]) -> str:
    """The folder at a path, whatever links lead to it.

    :raises InvalidLocation: if nothing can have this path
    """
    if "\0" in os.fspath(path) or not os.fspath(path):
        raise InvalidLocation(f"not a path: {os.fspath(path)!r}")
    return os.path.realpath(path)


def location_of(folder: str | os.PathLike[str]) -> str:
    """The canonical URL of a folder."""
    return f"file://{quote(os.fsencode(folder))}"
