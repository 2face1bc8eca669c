"""Deriving a passphrase's keys before it is known which slot they are for: beside imports, and while a storage answers.

A derivation takes 0.15 to 0.2 s of CPU without the interpreter. What is remembered of the slot that opened a
repository last (`state.SlotHint`) says what its keys are derived from; the slot itself decides whether they are used.
"""

from __future__ import annotations

import hmac
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from coffret.engine import kdf
from coffret.engine.errors import CoffretError

if TYPE_CHECKING:
    from collections.abc import Callable

    from coffret.engine.state import SlotHint


class Derivation:
    """Keys being derived from a passphrase, in a thread, for the repository at `location`."""

    def __init__(self, location: str, hint: SlotHint, passphrase: bytes) -> None:
        """Begin.

        :raises RuntimeError: if no further thread can be started
        """
        self.location, self._passphrase = location, passphrase
        self._parameters = kdf.KdfParameters(hint.salt, kdf.Cost(hint.memory_kib, hint.passes, hint.lanes))
        self._keys: kdf.DerivedKeys | None = None
        # No daemon: a process that ends meanwhile must not take OpenSSL down under it.
        self._thread = threading.Thread(target=self._derive, name="derive")
        self._thread.start()

    def keys(self, passphrase: bytes) -> kdf.DerivedKeys | None:
        """Wait for the keys, and hand them over, once; None if they are another passphrase's, or memory was short."""
        self._thread.join()
        derived, self._keys = self._keys, None
        return derived if hmac.compare_digest(passphrase, self._passphrase) else None

    def _derive(self) -> None:
        with suppress(Exception):  # whoever opens the slot derives them anew, and tells what is wrong
            self._keys = kdf.derive(self._parameters, self._passphrase)


def begin_derivation(location: str, hint: SlotHint, passphrase: Callable[[], bytes | None]) -> Derivation | None:
    """Begin to derive what the repository at a location needed last; None if that is not known, or can't be.

    `passphrase` gives it at once, or None; what is wrong with it is told when it is needed.
    """
    if not hint.slot:
        return None
    with suppress(CoffretError, RuntimeError):
        if given := passphrase():
            return Derivation(location, hint, given)
    return None
