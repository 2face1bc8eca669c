"""What requests over the network fail by, below any protocol: names that do not resolve, certificates, sockets."""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

from coffret.connectors.errors import AccessDenied, ConnectionLost, ConnectorError, InvalidLocation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# What OpenSSL says when the other side does not speak TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST")


@contextmanager
def mapped(translated: Callable[[Exception], ConnectorError | None]) -> Iterator[None]:
    """Turn any error into the ConnectorError that `translated` makes of it; what it makes None of is left as it is."""
    try:
        yield
    except ConnectorError:
        raise
    except Exception as error:
        found = translated(error)
        if found is None:
            raise
        raise found from error


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, as Python and as botocore keep it."""
    todo, seen = [error], set()
    while todo:
        cause = todo.pop()
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            kept = getattr(cause, "kwargs", None)
            inner = kept.get("error") if isinstance(kept, dict) else None
            todo += [each for each in (cause.__context__, cause.__cause__, inner) if isinstance(each, BaseException)]


def reason_of(chain: Sequence[BaseException]) -> str:
    """What the operating system says, if it comes from there, else the library."""
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
            return os.strerror(cause.errno)
    return str(chain[0]) or type(chain[0]).__name__


def unreached(
    chain: Sequence[BaseException], where: str, *, reached: bool, form: str, clear: str
) -> ConnectorError | None:
    """The error for a server that can't be spoken to by its name, or by TLS; None if that is not what led to it.

    `reached`: the host answered before; `form` of a location; `clear`: the scheme that goes without TLS.
    """
    for cause in chain:
        if isinstance(cause, ssl.SSLError) and type(cause).__module__ == "ssl":  # aiohttp's classes derive from it
            return _untrusted(cause, where, clear)
        if isinstance(cause, socket.gaierror):
            # A network that is down for a moment says EAI_AGAIN, and a host that was there is still there.
            again = reached or cause.errno == socket.EAI_AGAIN
            kind: type[ConnectorError] = ConnectionLost if again else InvalidLocation
            return kind(f"{where}: the host does not resolve ({cause.strerror}); the form is {form}")
    return None


def _untrusted(cause: ssl.SSLError, where: str, clear: str) -> ConnectorError:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return AccessDenied(
            f"{where}: the server's certificate is not trusted ({cause.verify_message}); if it is yours, name the PEM "
            "file of the authority that signed it: -o ca=/path/ca.pem"
        )
    if getattr(cause, "reason", None) in _NO_TLS:
        return InvalidLocation(f"{where}: the server does not speak TLS here; {clear} goes without")
    return ConnectionLost(f"{where}: {cause}")
