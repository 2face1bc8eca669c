"""What the compressor returns decompresses to what was given, with zstd's C functions and without."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from coffret.engine import compressor
from coffret.engine.compressor import Compressor
from coffret.engine.sealing import decompress
from coffret.engine.settings import BLOCK_BYTES, COMPRESSION_LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterator

WORDS = st.sampled_from([b"one ", b"two ", b"three ", bytes(100)])
FUNCTIONS = compressor._functions
LONG = b"".join(b"%d " % (n * n) for n in range(200_000))


@pytest.fixture(params=["with", "without"], autouse=True, scope="module")
def functions(request: pytest.FixtureRequest) -> Iterator[None]:
    """zstd's C functions, which nobody promises, and do without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "without":
            patch.setattr(compressor, "_functions", lambda: None)
        else:
            assert compressor._functions() is not None
        yield


@given(st.lists(st.lists(st.binary() | WORDS, min_size=1), max_size=5), st.sampled_from([*COMPRESSION_LEVELS.values()]))
def test_frames(blocks: list[list[bytes]], level: int | None) -> None:
    """One block after the other, by one compressor."""
    made = Compressor(level)
    for parts in blocks:
        data = made.join(parts)
        assert bytes(data) == b"".join(parts)
        packed = made.compress(data)
        if packed is None:
            assert level is None or len(zstandard.ZstdCompressor(level=level).compress(data)) >= len(data)
        else:
            assert packed == zstandard.ZstdCompressor(level=level or 0).compress(data)
            assert len(packed) < len(data)
            assert decompress(packed, len(data)) == data


@pytest.mark.parametrize("size_bytes", [BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 8 << 20, (8 << 20) + 1])
def test_of_any_size(size_bytes: int) -> None:
    made, data = Compressor(1), (LONG * 8)[:size_bytes]
    joined = made.join([memoryview(data)[:1000], data[1000:]])
    packed = made.compress(joined)
    assert packed is not None
    assert zstandard.frame_content_size(packed) == size_bytes
    assert decompress(packed, size_bytes) == data


def test_of_memory_that_may_not_be_written() -> None:
    assert Compressor(1).compress(memoryview(LONG)) is not None
    assert Compressor(1).compress(memoryview(bytearray(LONG))) is not None


def test_what_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressor, "_functions", FUNCTIONS)
    made = Compressor(1)
    assert made._zstd is not None
    made._packed = memoryview(bytearray(1 << 20))
    real = made._zstd.lib

    class Small:
        def __getattr__(self, name: str) -> object:
            return (lambda _: 0) if name == "ZSTD_compressBound" else getattr(real, name)

    monkeypatch.setattr(made, "_zstd", SimpleNamespace(lib=Small(), ffi=made._zstd.ffi))
    with pytest.raises(zstandard.ZstdError, match="too small"):
        made.compress(memoryview(os.urandom(2 << 20)))


def test_another_release_may_not_have_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (SimpleNamespace(), SimpleNamespace(lib=SimpleNamespace(ZSTD_compress2=1), ffi=1)):
        monkeypatch.setitem(sys.modules, "zstandard._cffi", module)
        monkeypatch.setattr(compressor, "_functions", FUNCTIONS)
        assert compressor._functions() is None
    monkeypatch.setitem(sys.modules, "zstandard._cffi", None)
    assert compressor._functions() is None
