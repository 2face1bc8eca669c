"""Compression of blocks into memory that is used again and again.

What python-zstandard's own class returns lies in fresh memory each time, which is in no cache of the processor: a first
backup took 4 to 7 % longer with it. Its binding to zstd's C functions takes a target, and lets go of the interpreter.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import zstandard

from coffret.engine.memory import fresh_memory
from coffret.engine.settings import BLOCK_BYTES, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

_FUNCTIONS = (
    "ZSTD_createCCtx",
    "ZSTD_freeCCtx",
    "ZSTD_CCtx_setParameter",
    "ZSTD_c_compressionLevel",
    "ZSTD_compressBound",
    "ZSTD_compress2",
    "ZSTD_isError",
    "ZSTD_getErrorName",
)
# Chunks may be larger in repositories that were made so; then fresh memory does.
_MOST_BYTES = 8 * MIB


class Compressor:
    """zstd at one level, None for none; for one thread at a time.

    What it returns may lie in its own memory: it is good until the next call.
    """

    def __init__(self, level: int | None) -> None:
        """Prepare; memory is taken when it is needed first.

        :raises MemoryError: if there is none for zstd
        """
        self._level = level
        self._joined = self._packed = memoryview(b"")
        self._zstd = zstd = _functions() if level is not None else None
        if zstd is not None:
            self._context = zstd.ffi.gc(zstd.lib.ZSTD_createCCtx(), zstd.lib.ZSTD_freeCCtx)
            if self._context == zstd.ffi.NULL:
                raise MemoryError
            self._checked(zstd.lib.ZSTD_CCtx_setParameter(self._context, zstd.lib.ZSTD_c_compressionLevel, level))

    def join(self, parts: Sequence[bytes | memoryview]) -> bytes | memoryview:
        """The parts, one behind the other.

        :raises OSError: if there is no memory
        """
        if len(parts) == 1:
            return parts[0]
        size = sum(map(len, parts))
        if size > BLOCK_BYTES:
            return b"".join(parts)
        if not self._joined:
            self._joined = memoryview(fresh_memory(BLOCK_BYTES))
        at = 0
        for part in parts:
            self._joined[at : at + len(part)] = part
            at += len(part)
        return self._joined[:size]

    def compress(self, data: bytes | memoryview) -> bytes | memoryview | None:
        """A zstd frame that tells its content's length, or None where it would be no shorter than that.

        :raises OSError: if there is no memory
        :raises zstandard.ZstdError: if the library fails
        """
        if self._level is None:
            return None
        zstd = self._zstd
        packed: bytes | memoryview
        if zstd is None or len(data) > _MOST_BYTES:
            packed = zstandard.ZstdCompressor(level=self._level).compress(data)
        else:
            bound = zstd.lib.ZSTD_compressBound(max(len(data), BLOCK_BYTES))
            if len(self._packed) < bound:
                self._packed = memoryview(fresh_memory(bound))
            source, target = zstd.ffi.from_buffer(data), zstd.ffi.from_buffer(self._packed, require_writable=True)
            size = zstd.lib.ZSTD_compress2(self._context, target, len(self._packed), source, len(data))
            packed = self._packed[: self._checked(size)]
        return packed if len(packed) < len(data) else None

    def _checked(self, result: int) -> int:
        """What a function of the library returned.

        :raises zstandard.ZstdError: if that is an error
        """
        assert self._zstd is not None
        if self._zstd.lib.ZSTD_isError(result):
            name = self._zstd.ffi.string(self._zstd.lib.ZSTD_getErrorName(result)).decode()
            raise zstandard.ZstdError(f"cannot compress: {name}")
        return result


def _functions() -> Any:
    """The library's C functions, `lib` and `ffi`; None where python-zstandard has not got them, as it may."""
    try:
        found = import_module("zstandard._cffi")
        missing = [name for name in _FUNCTIONS if not hasattr(found.lib, name)]
        return found if found.ffi and not missing else None
    except (ImportError, AttributeError):
        return None
