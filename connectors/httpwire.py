"""What the client and the server of a repository served over HTTP have agreed on. docs/server.md describes it.

A refusal is a status for whoever looks from outside, a word in a header for the client, and a line of text for people.
"""

from __future__ import annotations

import msgspec

from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    InvalidName,
    InvalidRange,
    NotFound,
    NotStorage,
    PermissionRefused,
    RightMissing,
    StorageFull,
    TransientError,
)

# Changes when an older client or server would misunderstand the other; it is a part of every path.
PROTOCOL = 1
ROOT = f"/v{PROTOCOL}/"
OBJECTS = f"{ROOT}objects"
CREATE = f"{ROOT}create"
ERROR_HEADER = "Coffret-Error"
# Of an object: seconds since 1970 by the storage's clock, as Python writes a float, which loses nothing.
MTIME_HEADER = "Coffret-Modified"
# Where a server listens, and a client looks, unless told otherwise.
DEFAULT_PORT = 8471
TOKEN_VARIABLE = "COFFRET_SERVER_TOKEN"


class Refusal(msgspec.Struct, frozen=True):
    """What becomes of an error on its way: the status and the word in the header, and the class it is at the client."""

    word: str
    status: int
    kind: type[ConnectorError]


# What the storage behind the server raises; a class stands before those it derives from.
OF_STORAGE = (
    Refusal("not-found", 404, NotFound),
    Refusal("exists", 412, AlreadyExists),
    Refusal("range", 416, InvalidRange),
    Refusal("name", 400, InvalidName),
    Refusal("full", 507, StorageFull),
    Refusal("storage-refuses", 403, PermissionRefused),
    Refusal("not-storage", 409, NotStorage),
    Refusal("lost", 504, ConnectionLost),
    Refusal("again", 503, TransientError),
    Refusal("failed", 502, ConnectorError),
)
# What the server itself refuses.
TOKEN = Refusal("token", 401, PermissionRefused)
RIGHT = Refusal("right", 403, RightMissing)
TRIES = Refusal("tries", 429, PermissionRefused)
BUSY = Refusal("busy", 503, TransientError)
SLOW = Refusal("slow", 408, ConnectionLost)
LENGTH = Refusal("length", 411, ConnectorError)
TOO_LARGE = Refusal("too-large", 413, ConnectorError)
REQUEST = Refusal("request", 400, ConnectorError)
NO_ROUTE = Refusal("no-route", 404, NotStorage)
METHOD = Refusal("method", 405, ConnectorError)
STATE = Refusal("state", 503, TransientError)
BUG = Refusal("bug", 500, ConnectorError)

WORDS = {
    refusal.word: refusal
    for refusal in (
        *OF_STORAGE, TOKEN, RIGHT, TRIES, BUSY, SLOW, LENGTH, TOO_LARGE, REQUEST, NO_ROUTE, METHOD, STATE, BUG,
    )
}  # fmt: skip


def refusal_of(error: ConnectorError) -> Refusal:
    """The refusal that stands for an error of the storage."""
    return next(refusal for refusal in OF_STORAGE if isinstance(error, refusal.kind))
