"""From a location to its connector. A new connector is one module and one line here."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

from coffret.connectors.errors import InvalidLocation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coffret.connectors.base import Connector

# Scheme: the module, whose `open_url(url, options)` makes the connector, and the form to offer to users. A module is
# imported when its scheme is used: storage clients take 80 to 280 ms.
SCHEMES = {
    "file": ("coffret.connectors.local", "/path or file:///path"),
    "s3": ("coffret.connectors.s3", "s3://host[:port]/bucket[/prefix]"),
    "s3+http": ("coffret.connectors.s3", ""),
    "sftp": ("coffret.connectors.sftp", "sftp://[user@]host[:port]/path"),
    "sqlite": ("coffret.connectors.sqlite", "sqlite:///path/file.db"),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_connector(url: str, options: Mapping[str, str]) -> Connector:
    """The connector for a location: a URL, or a local path (absolute, relative, or from `~` on).

    `options` are the connector's own (`-o key=value`). Nothing is read or written before the connector is used.

    :raises InvalidLocation: if the form or an option is not known
    """
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else "file"
    if scheme not in SCHEMES:
        forms = ", ".join(form for _, form in SCHEMES.values())
        raise InvalidLocation(f"{url}: {scheme}:// is not a known kind of repository; a repository is given as {forms}")
    opener: Callable[[str, Mapping[str, str]], Connector] = importlib.import_module(SCHEMES[scheme][0]).open_url
    return opener(url, options)
