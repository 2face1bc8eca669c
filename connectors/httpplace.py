"""Where a repository is served: from `https://host[:port]/` and options to what a client is made from."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import msgspec

from coffret.connectors.errors import AccessDenied, InvalidLocation
from coffret.connectors.httpwire import TOKEN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

FORM = "https://host[:port]/"
_OPTIONS = ("ca", "token-file")
_PORTS = {"https": 443, "http": 80}
_TOKEN = re.compile(r"[!-~]{1,1000}")
_MAX_TOKEN_FILE_BYTES = 4096


class Place(msgspec.Struct, frozen=True):
    """Where a server is, and what a client needs beside. `path` is "" or has no slash at its end."""

    scheme: str
    host: str
    port: int
    path: str
    ca: str | None
    token_file: str | None

    @property
    def location(self) -> str:
        """The canonical URL, without options or credentials."""
        authority = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{authority}{port}{quote(self.path)}"

    @property
    def is_tls(self) -> bool:
        """Whether nobody on the way can read what is moved."""
        return self.scheme == "https"


def parse_location(url: str, options: Mapping[str, str]) -> Place:
    """The place that is meant by `https://host[:port]/`, or `http://` without TLS; a path is that of a proxy.

    Options, from `-o` or the URL's query: `ca` (path of a PEM file), `token-file` (path of a file with the token).

    :raises InvalidLocation: if the form, or an option, is not known
    """
    try:
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        host, port = parts.hostname or "", _PORTS[scheme] if parts.port is None else parts.port
    except ValueError as error:
        raise InvalidLocation(f"not a location: {error}; the form is {FORM}") from None
    if parts.username is not None or parts.password is not None:
        raise InvalidLocation(
            f"credentials don't belong into a URL: set {TOKEN_VARIABLE}, or -o token-file=/path of a file with it"
        )
    chosen = dict(parse_qsl(parts.query, keep_blank_values=True)) | dict(options)
    for option in chosen:
        if option not in _OPTIONS:
            raise InvalidLocation(f"a served repository has no option {option!r}; it has {', '.join(_OPTIONS)}")
    path = unquote(parts.path).rstrip("/")
    segments = path.split("/")[1:]
    strange = any(s in ("", ".", "..") or not s.isprintable() for s in segments)
    if not host or not port or not re.fullmatch(r"[0-9A-Za-z._:%-]+", host) or parts.fragment or strange:
        raise InvalidLocation(f"{url}: a served repository has the form {FORM}")
    if "ca" in chosen and scheme != "https":
        raise InvalidLocation("-o ca= is for https://")
    return Place(scheme, host, port, path, chosen.get("ca"), chosen.get("token-file"))


def is_loopback(address: str) -> bool:
    """Whether an IP address is this very machine's."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def read_token(place: Place) -> tuple[str, str]:
    """The token that gives access, and where it is from, for messages; ("", "") if none is given.

    :raises InvalidLocation: if there is one that can't be read, or that is none
    """
    if place.token_file is not None:
        source = f"-o token-file={place.token_file}"
        try:
            with Path(place.token_file).expanduser().open("rb") as file:
                text = file.read(_MAX_TOKEN_FILE_BYTES).decode("utf-8", "replace").strip()
        except (OSError, ValueError) as error:
            raise InvalidLocation(f"{source}: {getattr(error, 'strerror', None) or error}") from None
    elif TOKEN_VARIABLE in os.environ:
        source, text = TOKEN_VARIABLE, os.environ[TOKEN_VARIABLE].strip()
    else:
        return "", ""
    if not _TOKEN.fullmatch(text):
        raise InvalidLocation(f"{source}: this is no token as `coffret at REPO server token add` prints it")
    return text, source


def refuse_clear(place: Place, address: str) -> AccessDenied:
    """The error for a server elsewhere that is to be spoken to without TLS."""
    return AccessDenied(
        f"{place.location}: {address} is another host, and without TLS anyone on the way could read the token and use "
        "it: have it served with a certificate and use https://, or say --insecure if the way is safe"
    )
