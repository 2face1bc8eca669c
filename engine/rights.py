"""Rights: a token of `coffret server` may be for less than everything; this is said before anything is begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.connectors.base import FULL, RIGHTS
from coffret.engine.errors import OTHER_TOKEN, StorageError

if TYPE_CHECKING:
    from coffret.connectors.base import Connector


def need(connector: Connector, what: str, right: str = FULL) -> None:
    """See that `what`, which takes a right, may be done on a storage that was asked for something before.

    What is refused half-way would leave things behind: an index object that no end makes good or void.

    :raises StorageError: if the storage lets this client do less
    """
    given = connector.capabilities.right
    if RIGHTS.index(given) < RIGHTS.index(right):
        wanted = "a full one" if right == FULL else f"an {right} or a full one"
        raise StorageError(f"{connector.location}: the token is {given}; {what} takes {wanted}", remedy=OTHER_TOKEN)
