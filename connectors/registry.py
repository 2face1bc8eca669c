"""From a location to its connector, and the wrappers around it. A new connector is one module and one line here."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

import msgspec

from coffret.connectors.errors import InvalidLocation
from coffret.connectors.limit import LimitConnector
from coffret.connectors.retry import RetryConnector
from coffret.connectors.trace import TraceConnector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coffret.connectors.base import Connector
    from coffret.connectors.errors import ConnectorError
    from coffret.connectors.trace import Calls

# Scheme: the module, whose `open_url(url, options)` makes the connector, and the form to offer to users. A module is
# imported when its scheme is used: storage clients take 80 to 280 ms.
SCHEMES = {
    "file": ("coffret.connectors.local", "/path or file:///path"),
    "http": ("coffret.connectors.http", ""),
    "https": ("coffret.connectors.http", "https://host[:port]/"),
    "s3": ("coffret.connectors.s3", "s3://host[:port]/bucket[/prefix]"),
    "s3+http": ("coffret.connectors.s3", ""),
    "sftp": ("coffret.connectors.sftp", "sftp://[user@]host[:port]/path"),
    "sqlite": ("coffret.connectors.sqlite", "sqlite:///path/file.db"),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")


def open_connector(url: str, options: Mapping[str, str]) -> Connector:
    """The connector for a location: a URL, or a local path (absolute, relative, or from `~` on).

    `options` are the connector's own (`-o key=value`). Nothing is read or written before the connector is used.

    :raises InvalidLocation: if the form or an option is not known
    """
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else "file"
    forms = ", ".join(form for _, form in SCHEMES.values() if form)
    if match and not match[2]:
        # Other programs write locations so: a folder of this name would be taken for a repository elsewhere.
        if scheme in SCHEMES:
            raise InvalidLocation(f"{url}: a repository is given as {forms}; a folder of this name is ./{url}")
        scheme = "file"
    if scheme not in SCHEMES:
        raise InvalidLocation(f"{url}: {scheme}:// is not a known kind of repository; a repository is given as {forms}")
    opener: Callable[[str, Mapping[str, str]], Connector] = importlib.import_module(SCHEMES[scheme][0]).open_url
    return opener(url, options)


class Transfers(msgspec.Struct, frozen=True):
    """How a storage is to be used.

    `connections`: transfers at a time, None for what suits it. `upload` and `download`: bytes a second over all
    together, None for no limit. `insecure`: without TLS even to another host. `on_retry` is told what failed, and why,
    when it is about to be tried again. `on_call` is told (method, name, bytes, seconds, error or "") of each call.
    """

    connections: int | None = None
    upload: float | None = None
    download: float | None = None
    insecure: bool = False
    on_retry: Callable[[str, ConnectorError], None] | None = None
    on_call: Callable[[str, str, int, float, str], None] | None = None


def connect(url: str, options: Mapping[str, str], transfers: Transfers) -> tuple[Connector, Mapping[str, Calls]]:
    """The connector for a location with what every storage gets around it, and the calls as they will be counted.

    Counted is what goes over the wire: a call that is tried again counts twice, and does not count its waiting.

    :raises InvalidLocation: as `open_connector`
    """
    bare = open_connector(url, options)
    if transfers.connections is not None:
        bare.set_connections(transfers.connections)
    if transfers.insecure:
        bare.set_insecure()
    traced = TraceConnector(bare, on_call=transfers.on_call)
    connector: Connector = traced
    if transfers.upload is not None or transfers.download is not None:
        connector = LimitConnector(connector, upload=transfers.upload, download=transfers.download)
    return RetryConnector(connector, on_retry=transfers.on_retry), traced.calls
