"""Config and key slots: golden bytes, the error for each kind of damage, ceilings, and secrets that never show."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from hypothesis import given, settings
from hypothesis import strategies as st

import coffret
from coffret.engine import kdf, keys
from coffret.engine.configuration import (
    MAX_CONFIG_BYTES,
    clear_secrets,
    config_bytes,
    config_hash,
    new_config,
    parse_config,
)
from coffret.engine.errors import (
    CoffretError,
    Damaged,
    NoRepository,
    RepositoryChanged,
    UnsupportedVersion,
    UsageError,
    WrongPassphrase,
)
from coffret.engine.kdf import Cost
from coffret.engine.keys import endorsed, new_secrets, parse_slot, slot_id_of, unlock, wrap
from coffret.engine.records import ChunkerConfig
from coffret.engine.sealing import Secrets

if TYPE_CHECKING:
    from collections.abc import Iterator

CHEAP = Cost(memory_kib=32, passes=1, lanes=1)
SECRETS = Secrets(b"d" * 32, b"i" * 32, b"c" * 32)
PASSPHRASE = "corrèct horse".encode()
CREATED = "2026-01-02T03:04:05Z"


def counting(length: int) -> bytes:
    return bytes(range(length))


ENCRYPTED = new_config(SECRETS, entropy=counting, created=CREATED)
CLEAR = new_config(Secrets(b"", b"i" * 32, b"c" * 32), entropy=counting, created=CREATED)
CONFIG = config_bytes(ENCRYPTED)
HASH = config_hash(CONFIG)
SLOT_ID, SLOT = wrap(SECRETS, PASSPHRASE, HASH, label="me@host", cost=CHEAP, entropy=counting, created=CREATED)

GOLDEN_CONFIG = (
    b'{"version":1,"repository_id":"000102030405060708090a0b0c0d0e0f7a3457a753bd4b33fa897ea7fe30f2f2","encrypt'
    b'ion":"aes256-gcm","hash":"blake3-256","chunker":{"name":"fastcdc-gear64","min_bytes":524288,"avg_bytes":'
    b'1048576,"max_bytes":4194304},"pack_bytes":33554432,"created":"2026-01-02T03:04:05Z"}\n'
)
GOLDEN_SLOT_ID = "97f94eea6d7413e0716bff445cef04a521ef91278039bf9a99ea648fc379b0b2"
GOLDEN_SLOT = (
    b'{"version":1,"kdf":"argon2id","memory_kib":32,"passes":1,"lanes":1,"salt":"AAECAwQFBgcICQoLDA0ODw==","cr'
    b'eated":"2026-01-02T03:04:05Z","label":"me@host","commitment":"pks4IRs3VjTdiDpyP9xXl11I88KI6BRrt29wCmSjMc'
    b'c=","nonce":"AAECAwQFBgcICQoL","wrapped":"JZlsAJti7Q+6U5vuYiVgnxnv4PY3SW+K53z4X5xi9jFNm3rjlj0eDJvG7gUac5'
    b'9beqqgxqkk1iOob6Op1auli1AWZZ5oaKyAQCndne2JBBI/0+QRZTe3E6zGwTNPGic3/Y2C29y8Dbf+EabJPmd0VA==","endorsement'
    b'":"lFAC8/87yBTRAjGcpe2Ww704ZDWmIOxAas0VGI89+A8="}\n'
)


def flips(data: bytes) -> Iterator[bytes]:
    """`data` with each of its bits inverted in turn."""
    for at in range(len(data)):
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def edited(data: bytes, **changes: Any) -> bytes:
    """One line of JSON with fields replaced, in the form it is stored in."""
    return json.dumps(json.loads(data) | changes, separators=(",", ":")).encode() + b"\n"


def recertified(data: bytes) -> bytes:
    """A config as someone writes it who knows how ids are made."""
    nonce = json.loads(data)["repository_id"][:32]
    context = "coffret 2026 repository id of a config"
    digest = blake3(edited(data, repository_id=nonce), derive_key_context=context).hexdigest(length=16)
    return edited(data, repository_id=nonce + digest)


class TestConfig:
    def test_golden(self) -> None:
        assert CONFIG == GOLDEN_CONFIG
        assert recertified(CONFIG) == CONFIG

    @pytest.mark.parametrize("config", [ENCRYPTED, CLEAR])
    def test_round_trip(self, config: Any) -> None:
        assert parse_config(config_bytes(config)) == config

    def test_keys_in_clear_only_without_encryption(self) -> None:
        assert ENCRYPTED.encrypted and not ENCRYPTED.id_key and not ENCRYPTED.chunker_key
        found = clear_secrets(CLEAR)
        assert (found.data_key, found.id_key, found.chunker_key) == (b"", b"i" * 32, b"c" * 32)

    @pytest.mark.parametrize("config", [ENCRYPTED, CLEAR])
    def test_every_flipped_bit_is_damage(self, config: Any) -> None:
        for altered in flips(config_bytes(config)):
            with pytest.raises((Damaged, UnsupportedVersion)):
                parse_config(altered)

    @settings(deadline=None)
    @given(st.integers(0, len(CONFIG) - 1))
    def test_cut_short(self, length: int) -> None:
        with pytest.raises(Damaged):
            parse_config(CONFIG[:length])

    @settings(deadline=None)
    @given(st.binary(max_size=200))
    def test_other_bytes(self, data: bytes) -> None:
        with pytest.raises((Damaged, NoRepository, UnsupportedVersion)):
            parse_config(data)

    def test_something_else(self) -> None:
        with pytest.raises(NoRepository, match="not coffret's"):
            parse_config(b"[core]\n\tbare = true\n")
        with pytest.raises(NoRepository):
            parse_config(b'{"x":' + b"[" * 10_000)

    def test_too_long(self) -> None:
        with pytest.raises(Damaged):
            parse_config(CONFIG + b" " * MAX_CONFIG_BYTES)

    def test_newer_version(self) -> None:
        with pytest.raises(UnsupportedVersion, match="version 7"):
            parse_config(edited(CONFIG, version=7, chunker="all new"))

    def test_not_in_the_one_form(self) -> None:
        with pytest.raises(Damaged):
            parse_config(CONFIG + b"\n")
        with pytest.raises(Damaged):
            parse_config(edited(CONFIG, extra=1))

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"encryption": "none"}, Damaged),
            ({"id_key": "69" * 32, "chunker_key": "63" * 32}, Damaged),
            ({"encryption": "rot13"}, UnsupportedVersion),
            ({"hash": "md5"}, UnsupportedVersion),
            ({"pack_bytes": 1 << 20}, Damaged),
            ({"pack_bytes": 512 << 20}, Damaged),
            ({"pack_bytes": 4 << 20}, Damaged),
            ({"pack_bytes": -1}, Damaged),
            ({"created": "yesterday"}, Damaged),
            ({"chunker": {"name": "x", "min_bytes": 64, "avg_bytes": 128, "max_bytes": 256}}, UnsupportedVersion),
            ({"chunker": {"name": "fastcdc-gear64", "min_bytes": 0, "avg_bytes": 128, "max_bytes": 256}}, Damaged),
        ],
    )
    def test_absurd_though_its_id_fits(self, changes: dict[str, Any], error: type[CoffretError]) -> None:
        """What only a hostile storage writes."""
        with pytest.raises(error):
            parse_config(recertified(edited(CONFIG, **changes)))

    def test_no_encryption_put_in_place_of_encryption(self) -> None:
        altered = edited(CONFIG, encryption="none", id_key="69" * 32, chunker_key="63" * 32)
        with pytest.raises(Damaged, match="does not fit its id"):
            parse_config(altered)
        assert parse_config(recertified(altered)).repository_id != ENCRYPTED.repository_id

    def test_refuses_to_make_nonsense(self) -> None:
        with pytest.raises(UsageError):
            new_config(SECRETS, pack_bytes=1 << 40)
        with pytest.raises(UsageError):
            new_config(SECRETS, chunker=ChunkerConfig(min_bytes=1 << 30))


class TestSlot:
    def test_golden(self) -> None:
        assert (SLOT_ID, SLOT) == (GOLDEN_SLOT_ID, GOLDEN_SLOT)

    def test_golden_by_its_description(self) -> None:
        """The format, from primitives alone."""
        slot = json.loads(GOLDEN_SLOT)
        raw = {key: base64.b64decode(slot[key]) for key in ("salt", "commitment", "nonce", "wrapped", "endorsement")}
        derived = Argon2id(salt=raw["salt"], length=64, iterations=1, lanes=1, memory_cost=32).derive(PASSPHRASE)
        assert raw["commitment"] == blake3(derived[32:], derive_key_context="coffret 2026 key slot commitment").digest()
        clear = b"coffret key slot\0" + HASH + edited(GOLDEN_SLOT, wrapped="", endorsement="")
        bundle = AESGCM(derived[:32]).decrypt(raw["nonce"], raw["wrapped"], clear)
        assert bundle == SECRETS.data_key + SECRETS.id_key + SECRETS.chunker_key
        key = blake3(SECRETS.data_key, derive_key_context="coffret 2026 key slot endorsement").digest()
        unendorsed = b"coffret key slot\0" + HASH + edited(GOLDEN_SLOT, endorsement="")
        assert raw["endorsement"] == blake3(unendorsed, key=key).digest()
        assert blake3(GOLDEN_SLOT).hexdigest() == GOLDEN_SLOT_ID

    @settings(max_examples=30, deadline=None)
    @given(st.binary(min_size=1, max_size=100), st.text(max_size=300))
    def test_round_trip(self, passphrase: bytes, label: str) -> None:
        secrets = new_secrets(encrypted=True)
        slot_id, data = wrap(secrets, passphrase, HASH, label=label, cost=CHEAP)
        assert unlock({slot_id: data}, passphrase, HASH) == (slot_id, secrets)
        slot = parse_slot(slot_id, data)
        assert slot.label.isprintable()
        assert endorsed(slot, secrets, HASH)
        assert not endorsed(slot, new_secrets(encrypted=True), HASH)
        assert not endorsed(slot, secrets, bytes(32))

    def test_default_cost_is_rfc_9106s(self) -> None:
        slot_id, data = wrap(SECRETS, PASSPHRASE, HASH, label="")
        assert parse_slot(slot_id, data).cost == (64 << 10, 3, 4)
        assert unlock({slot_id: data}, PASSPHRASE, HASH) == (slot_id, SECRETS)

    def test_the_right_one_of_several(self) -> None:
        made = [wrap(SECRETS, b"%d" % n, HASH, label="", cost=CHEAP) for n in range(5)]
        for n, (slot_id, _) in enumerate(made):
            assert unlock(dict(made), b"%d" % n, HASH) == (slot_id, SECRETS)

    def test_wrong_passphrase(self) -> None:
        with pytest.raises(WrongPassphrase, match="none of the repository's 1 key slots"):
            unlock({SLOT_ID: SLOT}, b"wrong", HASH)

    def test_empty_passphrase(self) -> None:
        with pytest.raises(UsageError):
            wrap(SECRETS, b"", HASH, label="", cost=CHEAP)

    def test_no_slot(self) -> None:
        with pytest.raises(Damaged, match="no key slot"):
            unlock({}, PASSPHRASE, HASH)

    def test_right_passphrase_beside_another_config(self) -> None:
        with pytest.raises(RepositoryChanged, match="passphrase is right"):
            unlock({SLOT_ID: SLOT}, PASSPHRASE, config_hash(config_bytes(CLEAR)))

    def test_slot_of_another_repository_beside_the_right_one(self) -> None:
        other_id, other = wrap(SECRETS, PASSPHRASE, bytes(32), label="", cost=CHEAP)
        assert unlock({other_id: other, SLOT_ID: SLOT}, PASSPHRASE, HASH) == (SLOT_ID, SECRETS)

    def test_every_flipped_bit_is_damage(self) -> None:
        for altered in flips(SLOT):
            with pytest.raises(Damaged):
                unlock({SLOT_ID: altered}, PASSPHRASE, HASH)

    def test_every_flipped_bit_under_a_name_that_fits(self) -> None:
        """What only a hostile storage does: nothing but the endorsement, which is for those inside, may be altered."""
        opened = set()
        for altered in flips(SLOT):
            slot_id = slot_id_of(altered)
            try:
                _, secrets = unlock({slot_id: altered}, PASSPHRASE, HASH)
            except (Damaged, UnsupportedVersion, WrongPassphrase, RepositoryChanged):
                continue
            slot = parse_slot(slot_id, altered)
            assert not endorsed(slot, secrets, HASH)
            opened.add(msgspec.structs.replace(slot, endorsement=b""))
        assert opened == {msgspec.structs.replace(parse_slot(SLOT_ID, SLOT), endorsement=b"")}

    def test_altered_label_is_told_from_a_wrong_passphrase(self) -> None:
        altered = edited(SLOT, label="you@host")
        with pytest.raises(RepositoryChanged):
            unlock({slot_id_of(altered): altered}, PASSPHRASE, HASH)

    @pytest.mark.parametrize(
        "changes",
        [
            {"memory_kib": (1 << 20) + 1},
            {"memory_kib": 1 << 62},
            {"memory_kib": 7},
            {"memory_kib": -1},
            {"passes": 17},
            {"passes": 0},
            {"lanes": 17},
            {"lanes": 0},
            {"lanes": 16},
            {"salt": ""},
            {"wrapped": ""},
            {"nonce": base64.b64encode(bytes(13)).decode()},
            {"label": "\x1b[2J"},
            {"label": 5},
        ],
    )
    def test_absurd(self, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """Refused before anything is derived."""
        monkeypatch.delattr(kdf, "Argon2id")
        altered = edited(SLOT, **changes)
        with pytest.raises(Damaged):
            unlock({slot_id_of(altered): altered}, PASSPHRASE, HASH)

    @pytest.mark.parametrize("changes", [{"version": 2, "wrapped": {}}, {"kdf": "argon3"}])
    def test_newer(self, changes: dict[str, Any]) -> None:
        newer = edited(SLOT, **changes)
        with pytest.raises(UnsupportedVersion):
            unlock({slot_id_of(newer): newer}, PASSPHRASE, HASH)
        assert unlock({slot_id_of(newer): newer, SLOT_ID: SLOT}, PASSPHRASE, HASH)[0] == SLOT_ID
        with pytest.raises(WrongPassphrase, match="1 more can't be read"):
            unlock({slot_id_of(newer): newer, SLOT_ID: SLOT}, b"wrong", HASH)

    def test_too_long_and_too_many(self) -> None:
        long = b"{" * (keys.MAX_SLOT_BYTES + 1)
        with pytest.raises(Damaged):
            parse_slot(slot_id_of(long), long)
        with pytest.raises(Damaged, match="more than 64"):
            unlock({f"{n:064}": b"" for n in range(65)}, PASSPHRASE, HASH)

    def test_reformatted_is_not_another_slot(self) -> None:
        """Else a removed slot could come back under another name."""
        spaced = SLOT.replace(b",", b", ")
        with pytest.raises(Damaged):
            unlock({slot_id_of(spaced): spaced}, PASSPHRASE, HASH)

    def test_too_little_memory(self) -> None:
        program = """
import resource
from pathlib import Path
from coffret.engine import errors, keys
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), -1))
try:
    keys.wrap(keys.new_secrets(encrypted=True), b"s3cr3t", bytes(32), label="")
except errors.CoffretError as error:
    print(error)
"""
        package = str(Path(next(iter(coffret.__path__))).parent)
        found = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONPATH": package}, stdout=subprocess.PIPE, text=True, check=True
        )
        assert found.stdout == "not enough memory to try the passphrase: 64 MiB are needed\n"

    def test_from_two_threads_at_once(self) -> None:
        """Unguarded, two derivations with several lanes block each other for ever."""
        slot_id, data = wrap(SECRETS, PASSPHRASE, HASH, label="", cost=Cost(4096, 1, 4))
        opened: list[str] = []
        threads = [
            threading.Thread(target=lambda: opened.append(unlock({slot_id: data}, PASSPHRASE, HASH)[0]), daemon=True)
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert opened == [slot_id] * 20


class TestSecrets:
    def test_new(self) -> None:
        one, two = new_secrets(encrypted=True), new_secrets(encrypted=False)
        parts = {one.data_key, one.id_key, one.chunker_key, two.id_key, two.chunker_key}
        assert {len(part) for part in parts} == {32} and len(parts) == 5
        assert two.data_key == b""

    def test_never_shown(self) -> None:
        secret = b"s3cr3t" * 5 + b"!!"
        held = Secrets(secret, secret, secret)
        shown = [repr(held), str(held)]
        good_id, good = wrap(held, secret, HASH, label="", cost=CHEAP)
        shown.append(repr(parse_slot(good_id, good)))
        relabelled = edited(good, label="x")
        for slots, passphrase, bound in (
            ({good_id: good}, b"not " + secret, HASH),
            ({good_id: good}, secret, bytes(32)),
            ({slot_id_of(relabelled): relabelled}, secret, HASH),
            ({good_id: relabelled}, secret, HASH),
        ):
            with pytest.raises(CoffretError) as raised:
                unlock(slots, passphrase, bound)
            shown += traceback.format_exception(raised.value)
            shown.append(repr((raised.value.args, raised.value.__cause__, raised.value.__context__)))
        assert not any("s3cr3t" in text for text in shown)
