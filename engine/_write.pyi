"""Types of the compiled writer; what they mean is in `_write.pyx`."""

from collections.abc import Callable
from typing import Any, Protocol

DIRECT_BYTES: int

class UnusualWriter(Protocol):
    """Sees to what the compiled writer leaves to others."""

    @property
    def inherits(self) -> bool:
        """Whether what is made in the directory entered last gets an ACL that is not its own."""

    def enter(self, directory: bytes) -> int:
        """A descriptor of a directory, by its path below the root."""

    def unusual(
        self, folder: int, name: bytes, temporary: bytes, meta: tuple[Any, ...], data: list[memoryview], extents: bytes
    ) -> list[str]:
        """Write a file that is not of the usual kind; return notes on what could not be set."""

    def dress(self, fd: int, meta: tuple[Any, ...]) -> list[str]:
        """Set the metadata of an open file, as far as the system lets it be set; return notes."""

    def kept(self, directory: bytes, name: bytes, notes: list[str]) -> list[tuple[bytes, str, int]]:
        """Faults of a file that is there, though not in every respect as it should be."""

    def lost(self, directory: bytes, name: bytes, error: Exception) -> tuple[bytes, str, int]:
        """The fault of a file that is not there."""

class SmallWriter:
    direct: bool
    def __init__(self, buffer: object, words: memoryview, number: int, *, owner: bool) -> None: ...
    def group(
        self,
        writer: UnusualWriter,
        opened: Callable[[tuple[int, int, int, bytes]], memoryview],
        job: int,
        number: int,
        directory: bytes,
        files: list[Any],
    ) -> list[tuple[bytes, str, int]]: ...
    def usual_metadata(self, fd: int, meta: tuple[Any, ...]) -> bool: ...
