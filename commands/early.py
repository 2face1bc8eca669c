"""What is begun before the command is even imported: deriving the keys of its repository, which takes as long."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from coffret.connectors.errors import InvalidLocation
from coffret.connectors.localplace import location_of, parse_location, real_folder
from coffret.engine.derivation import begin_derivation
from coffret.engine.passphrase import passphrase_from_environment, passphrase_is_at_hand
from coffret.engine.state import likely_slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.commands.line import Globals
    from coffret.engine.derivation import Derivation

# Commands that open no repository, or not with its passphrase; and options by which others need none.
_WITHOUT_KEY = ("version", "create", "clone", "server")
_NO_KEY = ("h", "help", "packs", "from")


def derive_early(command: str, arguments: Sequence[str], globals_: Globals) -> Derivation | None:
    """Begin to derive the keys of the repository that is meant, if it is a folder's path; None if that can't be.

    To know the location of a storage elsewhere its client would have to be imported: the engine does it then.
    """
    url = globals_.location
    options = (word.lstrip("-").partition("=")[0] for word in arguments if word.startswith("-"))
    if command in _WITHOUT_KEY or any(option in _NO_KEY for option in options):
        return None
    if ":" in url or not passphrase_is_at_hand(os.environ):
        return None
    try:
        location = location_of(real_folder(parse_location(url, globals_.options)))
    except (InvalidLocation, OSError):  # told by the command
        return None
    return begin_derivation(location, likely_slot(location), lambda: passphrase_from_environment(os.environ))
