"""Where an S3 repository lies: from `s3://host[:port]/bucket[/prefix]` and options to what a client is made from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import msgspec

from coffret.connectors.errors import InvalidLocation
from coffret.connectors.s3errors import FORM

if TYPE_CHECKING:
    from collections.abc import Mapping

_OPTIONS = ("region", "ca", "path-style", "storage-class")
_AWS_HOST = re.compile(r"s3(?:[.-]([a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?")
_PORTS = {"s3": 443, "s3+http": 80}


class Place(msgspec.Struct, frozen=True):
    """Where a repository lies, and how to speak to the server. `endpoint` is None for AWS, which has one a region."""

    scheme: str
    host: str
    endpoint: str | None
    bucket: str
    prefix: str  # "" or with a slash at its end
    region: str | None
    ca: str | None
    path_style: bool
    storage_class: str | None

    @property
    def location(self) -> str:
        """The canonical URL, without credentials."""
        return quote(f"{self.scheme}://{self.host}/{self.bucket}/{self.prefix}".removesuffix("/"), safe=":/[]+")


def parse_location(url: str, options: Mapping[str, str]) -> Place:
    """The place that is meant by `s3://host[:port]/bucket[/prefix]`, or `s3+http://` without TLS.

    Options, from `-o` or the URL's query: `region`, `ca` (path of a PEM file), `path-style` (auto, true, false),
    `storage-class`.

    :raises InvalidLocation: if the form, or an option, is not known
    """
    try:
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        host, port = parts.hostname or "", _PORTS[scheme] if parts.port is None else parts.port
    except ValueError as error:
        raise InvalidLocation(f"{url}: {error}; the form is {FORM}") from None
    chosen = dict(parse_qsl(parts.query, keep_blank_values=True)) | dict(options)
    for option in chosen:
        if option not in _OPTIONS:
            raise InvalidLocation(f"an S3 repository has no option {option!r}; it has {', '.join(_OPTIONS)}")
    if parts.username is not None:
        raise InvalidLocation(
            "credentials don't belong into a URL: set S3_REPOSITORY_USER and S3_REPOSITORY_PASSWORD, or an AWS profile"
        )
    bucket, *segments = unquote(parts.path).strip("/").split("/")
    strange = any(s in ("", ".", "..") or not s.isprintable() for s in segments)
    if not host or not port or not bucket or parts.fragment or strange:
        raise InvalidLocation(f"{url}: an S3 repository has the form {FORM}")
    aws = _AWS_HOST.fullmatch(host) if scheme == "s3" and port == _PORTS[scheme] else None
    authority = f"[{host}]" if ":" in host else host
    if port != _PORTS[scheme]:
        authority += f":{port}"
    return Place(
        scheme=scheme,
        host=authority,
        endpoint=None if aws else f"{'https' if scheme == 's3' else 'http'}://{authority}",
        bucket=bucket,
        prefix="".join(f"{segment}/" for segment in segments),
        region=chosen.get("region") or (aws[1] if aws else None),
        ca=chosen.get("ca"),
        path_style=_path_style(chosen.get("path-style", "auto"), is_aws=aws is not None, bucket=bucket),
        storage_class=_storage_class(chosen.get("storage-class")),
    )


def _path_style(value: str, *, is_aws: bool, bucket: str) -> bool:
    """Whether the bucket stands in the path or before the host; all servers know the first, but AWS gives it up."""
    if value not in ("auto", "true", "false"):
        raise InvalidLocation(f"-o path-style={value}: it is auto, true or false")
    return value == "true" or (value == "auto" and (not is_aws or "." in bucket))


def _storage_class(value: str | None) -> str | None:
    if value is not None and (value in ("GLACIER", "DEEP_ARCHIVE") or not re.fullmatch(r"[A-Z][A-Z0-9_-]*", value)):
        raise InvalidLocation(f"-o storage-class={value}: it must be a class whose objects can be read at once")
    return value
