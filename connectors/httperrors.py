"""What a server of repositories, and aiohttp, raise, put into the connectors' tree.

aiohttp's classes are known by name (`s3errors.KINDS`: the S3 client is built on it as well).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.connectors import neterrors
from coffret.connectors.errors import (
    AccessDenied,
    ConnectorError,
    InvalidLocation,
    NotStorage,
    PermissionRefused,
    TransientError,
)
from coffret.connectors.httpplace import FORM
from coffret.connectors.httpwire import REQUEST, RIGHT, TOKEN, TOKEN_VARIABLE, TRIES, WORDS
from coffret.connectors.neterrors import chain_of, reason_of, unreached
from coffret.connectors.s3errors import kind_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

# What proxies on the way say by themselves.
_PROXIES = {
    413: (ConnectorError, "a proxy on the way takes no body as large: raise its limit (nginx: client_max_body_size)"),
    **dict.fromkeys((408, 425, 429, 500, 502, 503, 504), (TransientError, "the server, or a proxy, has a bad time")),
    **dict.fromkeys((401, 403, 407), (PermissionRefused, "a proxy on the way refuses")),
}


def mapped(where: str, *, reached: bool = True) -> AbstractContextManager[None]:
    """Turn any error of a request into the ConnectorError that fits, naming what was asked for and the reason.

    `reached`: the host answered before, so that its name is right even if nobody knows it for a while.
    """
    return neterrors.mapped(lambda error: _translated(error, where, reached))


def refused(where: str, status: int, word: str, message: str, token_source: str) -> ConnectorError:
    """The error for an answer that says no: by the word of our server, or else by the status of whoever answers."""
    refusal = WORDS.get(word)
    if refusal is None:
        if 300 <= status < 400:
            return InvalidLocation(f"{where}: it sends us elsewhere (HTTP {status}): give the location it means")
        kind, text = _PROXIES.get(status, (NotStorage, "no coffret server answers there"))
        return kind(f"{where}: {text} (HTTP {status})")
    if refusal == TOKEN:
        return AccessDenied(f"{where}: {_about_token(token_source)}")
    if refusal == TRIES:
        return AccessDenied(f"{where}: {_about_token(token_source)}; there were too many tries: wait a minute")
    if refusal == RIGHT and not message:  # HEAD
        message = "the token does not give the right to do this"
    if refusal == REQUEST and not message:
        message = "the server does not understand the request: are both of one version?"
    return refusal.kind(f"{where}: {message or f'refused (HTTP {status})'}")


def _about_token(source: str) -> str:
    if not source:
        return (
            f"the server wants a token: set {TOKEN_VARIABLE}, or -o token-file=/path; who runs the server makes one"
            " with `coffret at REPO server token add`"
        )
    return (
        f"the server does not know the token ({source}): it was removed, or is another repository's; who runs the"
        " server makes one with `coffret at REPO server token add`"
    )


def _translated(error: Exception, where: str, reached: bool) -> ConnectorError | None:
    chain = list(chain_of(error))
    for cause in chain:
        if isinstance(cause, ConnectorError):  # raised by our resolver, below the library
            return cause
    if unreachable := unreached(chain, where, reached=reached, form=FORM, clear="http://"):
        return unreachable
    found = kind_of(type(error))
    if found is None:
        return None
    if found is NotStorage:
        return NotStorage(f"{where}: what answers there is no coffret server ({_first_line(error)})")
    hint = ""
    if type(error).__name__ == "ServerDisconnectedError" and not reached and where.startswith("http://"):
        hint = "; if the server speaks TLS, it is https://"
    return found(f"{where}: {reason_of(chain)}{hint}")


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    return text.splitlines()[0].rstrip(":")[:200]
