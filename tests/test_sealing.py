"""Sealing: what was sealed comes back, and nothing else ever does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.pretty import pretty_repr

from coffret.connectors.sftplogin import Address, Login
from coffret.engine import sealing
from coffret.engine.errors import Damaged
from coffret.engine.kdf import Cost, DerivedKeys, KdfParameters
from coffret.engine.sealing import (
    END,
    FOOTER,
    HEADER_BYTES,
    INDEX,
    LEASE,
    PACK,
    SNAPSHOT,
    TAG_BYTES,
    Sealer,
    Secrets,
    decompress,
    kind_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTEMPT, OTHER_ATTEMPT = b"a" * 16, b"b" * 16
REPOSITORY = b"r" * 32
SECRETS = Secrets(b"d" * 32, b"i" * 32, b"c" * 32)
ENCRYPTED, CLEAR = Sealer(SECRETS, REPOSITORY), Sealer(replace(SECRETS, data_key=b""), REPOSITORY)
NAME = "index/aa-0"
both = pytest.mark.parametrize("sealer", [ENCRYPTED, CLEAR], ids=["encrypted", "clear"])
payloads = st.binary(max_size=200) | st.binary(min_size=1, max_size=10).map(lambda part: part * 500)


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """`data` with one bit of each byte inverted in turn, and where."""
    for at in range(len(data)):
        yield at, data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def part(sealer: Sealer, data: bytes, position: int, header: bytes | None = None) -> tuple[bytes, bytes]:
    """(header, sealed) of a part of a pack."""
    header = header or sealer.header(PACK, ATTEMPT)
    target = bytearray(len(data) + TAG_BYTES)
    sealer.cipher(header, PACK).seal_into(data, position, memoryview(target))
    return header, bytes(target)


@both
@given(payload=payloads, kind=st.sampled_from([INDEX, SNAPSHOT, END]), level=st.integers(-3, 5))
def test_objects_come_back(sealer: Sealer, payload: bytes, kind: bytes, level: int) -> None:
    stored = sealer.seal(kind, NAME, ATTEMPT, payload, level=level)
    assert sealer.open(kind, NAME, stored) == (ATTEMPT, payload)
    assert kind_of(stored) == kind
    assert len(stored) <= HEADER_BYTES + len(payload) + TAG_BYTES


@both
@given(data=st.binary(max_size=100), position=st.integers(0, 1 << 63))
def test_parts_come_back(sealer: Sealer, data: bytes, position: int) -> None:
    header, sealed = part(sealer, data, position)
    assert sealer.cipher(header, PACK).open(memoryview(sealed), position) == data
    assert len(data) < 8 or (data in sealed) != sealer.encrypted


@both
def test_no_two_objects_are_equal(sealer: Sealer) -> None:
    """Else the bytes could not tell whose put of a name has won."""
    assert len({sealer.seal(LEASE, NAME, ATTEMPT, b"the same") for _ in range(10)}) == 10


@both
@pytest.mark.parametrize("payload", [b"short", b"compressible " * 20], ids=["raw", "zstd"])
def test_any_bit_of_an_object_matters(sealer: Sealer, payload: bytes) -> None:
    stored = sealer.seal(INDEX, NAME, ATTEMPT, payload)
    for _, altered in flips(stored):
        with pytest.raises(Damaged, match=f"^{NAME}: "):
            sealer.open(INDEX, NAME, altered)


@both
def test_any_bit_of_a_header_matters_to_every_part(sealer: Sealer) -> None:
    header, sealed = part(sealer, b"data", 64)
    for _, altered in flips(header):
        with pytest.raises(Damaged):
            sealer.cipher(altered, PACK).open(sealed, 64)
        with pytest.raises(Damaged):
            sealer.cipher_like(altered, PACK).open(sealed, 64)


@both
def test_any_bit_of_a_part_matters(sealer: Sealer) -> None:
    header, sealed = part(sealer, b"data", 64)
    cipher = sealer.cipher(header, PACK)
    for _, altered in flips(sealed):
        with pytest.raises(Damaged):
            cipher.open(altered, 64)


@both
def test_any_length_but_the_right_one_is_damage(sealer: Sealer) -> None:
    stored = sealer.seal(INDEX, NAME, ATTEMPT, b"payload")
    for cut in (*(stored[:length] for length in range(len(stored))), stored + b"\0"):
        with pytest.raises(Damaged):
            sealer.open(INDEX, NAME, cut)


@both
def test_objects_can_not_be_swapped(sealer: Sealer) -> None:
    stored = sealer.seal(INDEX, NAME, ATTEMPT, b"payload")
    elsewhere = Sealer(SECRETS if sealer.encrypted else replace(SECRETS, data_key=b""), b"R" * 32)
    for opener, kind, name in (
        (sealer, INDEX, "index/aa-1"),
        (sealer, INDEX, NAME + "0"),
        (sealer, SNAPSHOT, NAME),
        (elsewhere, INDEX, NAME),
        (CLEAR if sealer.encrypted else ENCRYPTED, INDEX, NAME),
    ):
        with pytest.raises(Damaged):
            opener.open(kind, name, stored)
    other_kind = stored[:9] + SNAPSHOT + stored[10:]
    with pytest.raises(Damaged):
        sealer.open(SNAPSHOT, NAME, other_kind)
    other_attempt = stored[:12] + OTHER_ATTEMPT + stored[28:]
    with pytest.raises(Damaged):
        sealer.open(INDEX, NAME, other_attempt)


@both
def test_parts_can_not_be_swapped(sealer: Sealer) -> None:
    header, first = part(sealer, b"first", 64)
    _, second = part(sealer, b"other", 85, header)
    other_header, elsewhere = part(sealer, b"third", 64)
    cipher = sealer.cipher(header, PACK)
    for sealed, position in ((first, 85), (second, 64), (elsewhere, 64)):
        with pytest.raises(Damaged):
            cipher.open(sealed, position)
    with pytest.raises(Damaged):
        sealer.cipher(other_header, PACK).open(first, 64)
    with pytest.raises(Damaged):
        sealer.cipher_like(header, FOOTER).open(first, 64)


def test_another_data_key_opens_nothing() -> None:
    stored = ENCRYPTED.seal(INDEX, NAME, ATTEMPT, b"payload")
    with pytest.raises(Damaged, match="authenticate"):
        Sealer(replace(SECRETS, data_key=b"e" * 32), REPOSITORY).open(INDEX, NAME, stored)


def test_id_and_chunker_key_do_not_matter_to_sealing() -> None:
    stored = ENCRYPTED.seal(INDEX, NAME, ATTEMPT, b"payload")
    assert Sealer(Secrets(SECRETS.data_key, b"", b""), REPOSITORY).open(INDEX, NAME, stored)[1] == b"payload"


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"X", "not an object"),
        (8, b"\2", "version 2"),
        (9, b"S", "another kind"),
        (10, b"\0", "encrypted or compressed otherwise"),
        (10, b"\2", "encrypted or compressed otherwise"),
        (11, b"\2", "encrypted or compressed otherwise"),
    ],
)
def test_headers_that_are_not_of_this_repository(at: int, value: bytes, says: str) -> None:
    stored = ENCRYPTED.seal(INDEX, NAME, ATTEMPT, b"payload")
    with pytest.raises(Damaged, match=says):
        ENCRYPTED.open(INDEX, NAME, stored[:at] + value + stored[at + 1 :])


def test_kinds_without_a_key() -> None:
    assert kind_of(b"") == kind_of(b"something else, long enough") == b""


def test_keys_never_show() -> None:
    derived = DerivedKeys(KdfParameters(b"s" * 16, Cost()), b"d" * 32, b"d" * 32)
    login = Login(Address("host"), _passwords={"password: ": "d" * 32})
    for held in (SECRETS, derived, login):
        assert "d" * 5 not in repr(held) + pretty_repr(held)
    assert SECRETS.data_key.hex() not in f"{SECRETS} {ENCRYPTED!r} {ENCRYPTED.cipher_like(bytes(64), PACK)!r}"


class TestDecompress:
    def test_one_frame(self) -> None:
        packed = zstandard.compress(b"x" * 1000)
        assert decompress(packed, 1000) == b"x" * 1000
        with pytest.raises(Damaged, match="absurd"):
            decompress(packed, 999)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"no frame",
            zstandard.compress(b"x" * 1000)[:-1],
            zstandard.compress(b"x" * 1000) + b"\0",
            zstandard.compress(b"x") + zstandard.compress(b"y"),
            zstandard.ZstdCompressor(write_content_size=False).compress(b"of unknown length"),
        ],
    )
    def test_anything_else(self, data: bytes) -> None:
        with pytest.raises(Damaged):
            decompress(data, 1 << 20)

    def test_what_an_object_may_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stored = ENCRYPTED.seal(INDEX, NAME, ATTEMPT, bytes(1000))
        monkeypatch.setattr(sealing, "MAX_OBJECT_BYTES", 999)
        with pytest.raises(Damaged, match="absurd"):
            ENCRYPTED.open(INDEX, NAME, stored)
