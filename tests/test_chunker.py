"""The chunker against a reference written from its definition, and against cut points that may never change."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from coffret.engine.chunker import FASTCDC_GEAR64, Chunker, check_parameters
from coffret.engine.errors import Damaged, UnsupportedVersion

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chunker.json").read_text())
KEY = bytes(range(32))
SMALL = (64, 128, 512)
LANES = 2 * 4096  # positions the kernel looks at together; spans longer than this take its fast path


def stream(seed: str, size: int) -> bytes:
    """Bytes that anybody can make again: the BLAKE3 output of a seed."""
    return blake3(seed.encode()).digest(length=size)


def reference(sizes: tuple[int, int, int], key: bytes, data: bytes) -> list[int]:
    """Chunk lengths by the definition: every hash is summed up anew from its 64 bytes."""
    min_bytes, avg_bytes, max_bytes = sizes
    raw = blake3(b"coffret gear table", key=key).digest(length=2048)
    table = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, 2048, 8)]
    hard = avg_bytes.bit_length() - 1
    lengths, start = [], 0
    while start < len(data):
        length = end = min(len(data) - start, max_bytes)
        for offset in range(min_bytes, end):
            window = data[start + offset - 63 : start + offset + 1]
            gear = sum(table[byte] << (63 - at) for at, byte in enumerate(window)) % 2**64
            if gear >> (64 - (hard if offset < avg_bytes else hard - 2)) == 0:
                length = offset + 1
                break
        lengths.append(length)
        start += length
    return lengths


def chunker(sizes: tuple[int, int, int] = SMALL, key: bytes = KEY) -> Chunker:
    """A chunker of these sizes."""
    return Chunker(FASTCDC_GEAR64, *sizes, key)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A few KiB, random or of few different bytes, with stretches that repeat."""
    parts = draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1500), st.sampled_from([2, 16, 256])), max_size=4)
    )
    return b"".join(bytes(b % kinds for b in stream(str(seed), size)) for seed, size, kinds in parts)


sizes_drawn = st.sampled_from([(64, 128, 129), (64, 256, 1024), (70, 128, 512), (100, 128, 2000), (511, 512, 513)])


@given(sizes_drawn, st.binary(min_size=32, max_size=32), texts())
def test_cuts_are_those_of_the_definition(sizes: tuple[int, int, int], key: bytes, data: bytes) -> None:
    assert chunker(sizes, key).cut(data, final=True) == reference(sizes, key, data)


@pytest.mark.parametrize("sizes", [(64, 1 << 15, 1 << 16), (5000, 1 << 13, 1 << 15)])
def test_cuts_of_long_spans_are_those_of_the_definition(sizes: tuple[int, int, int]) -> None:
    data = stream("long spans", 3 * sizes[2])
    assert sizes[2] > LANES
    assert chunker(sizes).cut(data, final=True) == reference(sizes, KEY, data)


@given(sizes_drawn, texts(), st.lists(st.integers(1, 3000), min_size=1, max_size=8))
@example((64, 128, 129), b"\0" * 1000, [1])
def test_cuts_do_not_depend_on_where_the_buffers_end(
    sizes: tuple[int, int, int], data: bytes, steps: list[int]
) -> None:
    cutter, got, carry, at, turn = chunker(sizes), [], b"", 0, 0
    while at < len(data):
        step = steps[turn % len(steps)]
        carry, at, turn = carry + data[at : at + step], at + step, turn + 1
        lengths = cutter.cut(carry, final=False)
        got += lengths
        carry = carry[sum(lengths) :]
        assert len(carry) < sizes[2]
    assert got + cutter.cut(carry, final=True) == cutter.cut(data, final=True)


@given(texts(), st.integers(0, 2000), st.booleans())
def test_start_skips_what_is_before_it(data: bytes, start: int, final: bool) -> None:
    start = min(start, len(data))
    cutter = chunker()
    assert cutter.cut(data, start=start, final=final) == cutter.cut(data[start:], final=final)


def test_start_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        chunker().cut(b"abc", start=4, final=True)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["name"]))
def test_golden_cuts(case: dict[str, object]) -> None:
    """These cuts are in repositories: when one changes, the chunker needs another name."""
    size, seed, sizes = case["size"], case["seed"], case["sizes"]
    assert isinstance(size, int)
    assert isinstance(sizes, list)
    data = bytes(size) if seed is None else stream(str(seed), size)
    assert (
        chunker((sizes[0], sizes[1], sizes[2]), bytes.fromhex(str(case["key"]))).cut(data, final=True)
        == case["lengths"]
    )


def test_an_insertion_changes_few_chunks() -> None:
    data, cutter = stream("edited", 200_000), chunker((256, 1024, 4096))
    edited = data[:100_000] + b"inserted" + data[100_000:]

    def pieces(text: bytes) -> list[bytes]:
        at, found = 0, []
        for length in cutter.cut(text, final=True):
            found.append(text[at : at + length])
            at += length
        return found

    before, after = pieces(data), pieces(edited)
    assert b"".join(after) == edited
    assert len(set(after) - set(before)) <= 8


def test_keys_cut_differently() -> None:
    data = stream("keys", 100_000)
    assert chunker(key=KEY).cut(data, final=True) != chunker(key=bytes(32)).cut(data, final=True)


@pytest.mark.parametrize("size", [1, 63, 64, 65])
def test_data_up_to_min_is_one_chunk(size: int) -> None:
    assert chunker().cut(stream("short", size), final=False) == []
    assert chunker().cut(stream("short", size), final=True)[0] >= min(size, 65)


def test_empty_data_has_no_chunks() -> None:
    assert chunker().cut(b"", final=True) == chunker().cut(b"", final=False) == []


@pytest.mark.parametrize("size", [127, 128, 129, 511, 512, 513, 1024])
def test_data_without_candidates_is_cut_at_max(size: int) -> None:
    """All windows of all-zero data are the same, and with this key none is a candidate."""
    whole, rest = divmod(size, 512)
    assert chunker().cut(bytes(size), final=False) == [512] * whole
    assert chunker().cut(bytes(size), final=True) == [512] * whole + [rest] * bool(rest)


def test_any_contiguous_buffer_will_do() -> None:
    data = stream("buffers", 5000)
    expected = chunker().cut(data, final=True)
    assert chunker().cut(bytearray(data), final=True) == chunker().cut(memoryview(data), final=True) == expected
    with pytest.raises(BufferError):
        chunker().cut(memoryview(data)[::2], final=True)


def test_threads_may_share_a_chunker() -> None:
    cutter, data = chunker((4096, 8192, 65536)), stream("threads", 4 << 20)
    expected, got = cutter.cut(data, final=True), []
    threads = [threading.Thread(target=lambda: got.append(cutter.cut(data, final=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 4


def test_an_unknown_chunker_needs_a_newer_version() -> None:
    with pytest.raises(UnsupportedVersion, match="quickcdc"):
        check_parameters("quickcdc", 64, 128, 512)


@pytest.mark.parametrize(
    "sizes",
    [
        (63, 128, 512),
        (128, 128, 512),
        (64, 100, 512),
        (64, 128, 128),
        (64, 128, (64 << 20) + 1),
        (-1, 128, 512),
        (0, 0, 0),
    ],
)
def test_absurd_sizes_are_damage(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(Damaged, match="make no sense"):
        chunker(sizes)
