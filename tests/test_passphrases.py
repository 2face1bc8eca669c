"""Passphrases: where they come from, and adding, changing and removing them."""

from __future__ import annotations

import os
import stat
import sys
import traceback
from typing import TYPE_CHECKING

import pytest
from tests.key_samples import CHEAP, CONFIG, FOREIGN, FOREIGN_ID, HASH, IDS, SECRETS, SLOTS, opens, repository

from coffret.connectors.base import Capabilities
from coffret.connectors.memory import MemoryConnector
from coffret.engine.configuration import config_bytes, new_config
from coffret.engine.errors import (
    Damaged,
    UsageError,
    WrongPassphrase,
)
from coffret.engine.keyring import Keyring, log_removal, put_slot, read_keyring, slot_name
from coffret.engine.keys import MAX_SLOTS, new_secrets, unlock
from coffret.engine.ops import passphrases
from coffret.engine.passphrase import MAX_PASSPHRASE_BYTES, passphrase_from_environment, passphrase_is_at_hand

if TYPE_CHECKING:
    from pathlib import Path


class TestSources:
    def test_none(self) -> None:
        assert passphrase_from_environment({}) is None
        assert passphrase_from_environment({"COFFRET_PEER_PASSPHRASE": "x"}) is None

    @pytest.mark.parametrize(
        ("value", "passphrase"),
        [
            ("hunter2", b"hunter2"),
            ("h\n", b"h"),
            ("h\r\n", b"h"),
            ("h\n\n", b"h\n"),
            (" h \r", b" h \r"),
            ("é", "é".encode()),
        ],
    )
    def test_as_it_is(self, tmp_path: Path, value: str, passphrase: bytes) -> None:
        file = tmp_path / "file"
        file.write_bytes(value.encode())
        for prefix in ("COFFRET_PASSPHRASE", "COFFRET_NEW_PASSPHRASE"):
            for env in (
                {prefix: value},
                {f"{prefix}_FILE": str(file)},
                {f"{prefix}_COMMAND": f"cat '{file}'"},
            ):
                assert passphrase_from_environment(env, prefix) == passphrase

    def test_at_hand(self, tmp_path: Path) -> None:
        """What may be waited for, on a terminal or at a pipe, is not."""
        (tmp_path / "file").write_text("x")
        os.mkfifo(tmp_path / "pipe")
        assert passphrase_is_at_hand({"COFFRET_PASSPHRASE": "x"})
        assert passphrase_is_at_hand({"COFFRET_PASSPHRASE_FILE": str(tmp_path / "file")})
        assert not passphrase_is_at_hand({"COFFRET_PASSPHRASE_FILE": str(tmp_path / "pipe")})
        assert not passphrase_is_at_hand({"COFFRET_PASSPHRASE_COMMAND": "echo x"})
        assert not passphrase_is_at_hand({"COFFRET_PEER_PASSPHRASE": "x"})
        assert not passphrase_is_at_hand({})

    def test_no_shell(self) -> None:
        found = passphrase_from_environment({"COFFRET_PASSPHRASE_COMMAND": "echo '$HOME;'  x"})
        assert found == b"$HOME; x"

    @pytest.mark.parametrize(
        "env",
        [
            {"": "", "_FILE": "x"},
            {"": "x", "_COMMAND": "echo x"},
            {"": ""},
            {"": "\n"},
            {"": "\udcff"},
            {"": "x" * (MAX_PASSPHRASE_BYTES + 1)},
            {"_FILE": ""},
            {"_FILE": "/nonexistent/file"},
            {"_FILE": "/"},
            {"_FILE": "/dev/null"},
            {"_FILE": "/dev/zero"},
            {"_FILE": "a\0b"},
            {"_COMMAND": ""},
            {"_COMMAND": "echo 'x"},
            {"_COMMAND": "/nonexistent/program"},
            {"_COMMAND": "true"},
            {"_COMMAND": "false"},
            {"_COMMAND": "yes"},
            {"_COMMAND": f"{sys.executable} -c 'import os; os.kill(os.getpid(), 15)'"},
        ],
    )
    def test_what_gives_none_is_an_error(self, env: dict[str, str]) -> None:
        with pytest.raises(UsageError, match="COFFRET_PASSPHRASE"):
            passphrase_from_environment({f"COFFRET_PASSPHRASE{name}": value for name, value in env.items()})

    def test_no_error_shows_it(self, tmp_path: Path) -> None:
        latin = tmp_path / "latin"
        latin.write_bytes(b"s3cr3t\xe9")
        script = tmp_path / "script"
        script.write_text("#!/bin/sh\necho s3cr3t\nexit 3\n")
        script.chmod(stat.S_IRWXU)
        for env in (
            {"COFFRET_PASSPHRASE": "s3cr3t" * 20_000},
            {"COFFRET_PASSPHRASE": "s3cr3t", "COFFRET_PASSPHRASE_FILE": "s3cr3t"},
            {"COFFRET_PASSPHRASE_FILE": str(latin)},
            {"COFFRET_PASSPHRASE_FILE": "s3cr3t"},
            {"COFFRET_PASSPHRASE_COMMAND": str(script)},
            {"COFFRET_PASSPHRASE_COMMAND": f"{script} s3cr3t"},
            {"COFFRET_PASSPHRASE_COMMAND": "/s3cr3t"},
            {"COFFRET_PASSPHRASE_COMMAND": "echo 's3cr3t"},
        ):
            with pytest.raises(UsageError) as raised:
                passphrase_from_environment(env)
            error = raised.value
            shown = [*traceback.format_exception(error), error.remedy, repr(error.__cause__)]
            assert not any("s3cr3t" in text for text in shown)
            context = error.__context__
            assert not isinstance(context, UnicodeError)


class TestOperations:
    pytestmark = pytest.mark.anyio

    async def test_add_list_change_remove(self) -> None:
        connector = await repository(1)
        added = await passphrases.add(connector, CONFIG, SECRETS, b"second", label="b\x07", cost=CHEAP)
        infos = await passphrases.list_slots(connector, CONFIG, SECRETS)
        assert {(info.slot_id, info.label, info.fault) for info in infos} == {(IDS[0], "host0", ""), (added, "b?", "")}
        changed = await passphrases.change(connector, CONFIG, SECRETS, IDS[0], b"third", label="", cost=CHEAP)
        assert not await opens(connector, b"passphrase 0")
        assert await opens(connector, b"second") and await opens(connector, b"third")
        await passphrases.remove(connector, CONFIG, SECRETS, added)
        assert not await opens(connector, b"second") and await opens(connector, b"third")
        names = [info.name async for info in connector.list("keys/")]
        assert sorted(names) == sorted([slot_name(changed), "keys/removed-1", "keys/removed-2"])

    async def test_the_last_stays(self) -> None:
        connector = await repository(1)
        with pytest.raises(UsageError, match="last passphrase"):
            await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])
        assert await opens(connector, b"passphrase 0")

    async def test_the_last_that_opens_stays(self) -> None:
        """Neither a planted slot, nor a damaged one, nor one of a newer version is a way in."""
        connector = await repository(1)
        await put_slot(connector, FOREIGN_ID, FOREIGN)
        await connector.put(slot_name(IDS[1]), [SLOTS[IDS[1]][:-9]])
        await connector.put(slot_name(IDS[2]), [SLOTS[IDS[2]] * 100])
        with pytest.raises(UsageError, match="last passphrase"):
            await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])
        assert await opens(connector, b"passphrase 0")
        faults = {info.slot_id: info.fault for info in await passphrases.list_slots(connector, CONFIG, SECRETS)}
        assert faults[IDS[0]] == ""
        assert "could not open" in faults[FOREIGN_ID]
        assert "cut short or altered" in faults[IDS[1]] and "cut short or altered" in faults[IDS[2]]
        for slot in (FOREIGN_ID, IDS[1], IDS[2]):
            await passphrases.remove(connector, CONFIG, SECRETS, slot)
        assert list((await read_keyring(connector)).live) == [IDS[0]]

    async def test_unknown_slot(self) -> None:
        connector = await repository()
        with pytest.raises(UsageError, match="no key slot"):
            await passphrases.remove(connector, CONFIG, SECRETS, IDS[4])
        keyring = await read_keyring(connector)
        assert passphrases.find_slot(keyring, IDS[1][:12].upper()) == IDS[1]
        with pytest.raises(UsageError, match="more than one"):
            passphrases.find_slot(keyring, "")
        with pytest.raises(UsageError, match="no key slot"):
            passphrases.find_slot(keyring, IDS[4])

    async def test_removed_twice(self) -> None:
        connector = await repository(3)
        for _ in range(2):
            await passphrases.remove(connector, CONFIG, SECRETS, IDS[1])
        assert (await read_keyring(connector)).last == 1

    async def test_died_between_log_and_deletion(self) -> None:
        connector = await repository(3)
        assert await log_removal(connector, await read_keyring(connector), IDS[0], HASH)
        assert not await opens(connector, b"passphrase 0")
        with pytest.raises(WrongPassphrase):
            unlock((await read_keyring(connector)).live, b"passphrase 0", HASH)
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[1])
        names = [info.name async for info in connector.list("keys/")]
        assert sorted(names) == sorted([slot_name(IDS[2]), "keys/removed-1", "keys/removed-2"])
        assert (await read_keyring(connector)).removed == {IDS[0], IDS[1]}

    async def test_log_by_an_outdated_view(self) -> None:
        connector = await repository(3)
        keyring = await read_keyring(connector)
        assert await log_removal(connector, keyring, IDS[0], HASH)
        assert not await log_removal(connector, keyring, IDS[1], HASH)

    async def test_damaged_log(self) -> None:
        """It locks nobody out, and nothing more is removed by it."""
        connector = await repository(3)
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])
        await connector.put(slot_name(IDS[0]), [SLOTS[IDS[0]]])
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[1])
        body = await connector.get("keys/removed-2")
        other = b"B" if body[-20:-19] == b"A" else b"A"
        for damaged in (b"", body[:50], body.replace(b'"removed"', b'"removee"'), body[:-20] + other + body[-19:]):
            await connector.put("keys/removed-2", [damaged])
            keyring = await read_keyring(connector)
            assert keyring.log_damaged and keyring.removed == {IDS[0]} and list(keyring.live) == [IDS[2]]
            with pytest.raises(Damaged, match="removed-2"):
                await passphrases.remove(connector, CONFIG, SECRETS, IDS[2])

    async def test_the_log_of_another_repository(self) -> None:
        """It says nothing of this one's slots: an earlier one holds, and nothing more is removed."""
        connector = await repository(3)
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])
        await connector.put(slot_name(IDS[0]), [SLOTS[IDS[0]]])
        assert await log_removal(connector, await read_keyring(connector, HASH), IDS[1], bytes(32))
        keyring = await read_keyring(connector, HASH)
        assert keyring.log_damaged and keyring.removed == {IDS[0]} and [*keyring.live] == [*IDS[1:3]]
        # Whoever does not know the config yet can tell by the log itself.
        assert (await read_keyring(connector)).log_config == bytes(32).hex()
        with pytest.raises(Damaged, match="removed-2"):
            await passphrases.remove(connector, CONFIG, SECRETS, IDS[2])

    async def test_an_earlier_log_in_the_place_of_the_last(self) -> None:
        connector = await repository(3)
        for slot in IDS[:2]:
            await passphrases.remove(connector, CONFIG, SECRETS, slot)
        await connector.put("keys/removed-2", [await connector.get("keys/removed-1")])
        keyring = await read_keyring(connector, HASH)
        assert keyring.log_damaged and keyring.removed == {IDS[0]}

    async def test_absurd_number_in_the_log(self) -> None:
        connector = await repository(2)
        await connector.put("keys/removed-1", [b"x"])
        await connector.put("keys/removed-999999", [b"x"])
        assert len((await read_keyring(connector)).live) == 2
        with pytest.raises(Damaged):
            await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])

    async def test_other_objects_are_no_slots(self) -> None:
        connector = await repository(1)
        for name in ("keys/x", "keys/removed-0", "keys/removed-01", f"keys/{IDS[1]}x", "keys/a/b"):
            await connector.put(name, [b"x"])
        assert await read_keyring(connector) == Keyring(
            {IDS[0]: SLOTS[IDS[0]]}, frozenset(), frozenset(), 0, log_damaged=False
        )

    async def test_too_many(self) -> None:
        connector = await repository(1)
        for number in range(MAX_SLOTS // 2 - 1):
            await connector.put(f"keys/{number:064}", [b"x"])
        with pytest.raises(UsageError, match="32 passphrases already"):
            await passphrases.add(connector, CONFIG, SECRETS, b"x", label="", cost=CHEAP)
        for number in range(MAX_SLOTS):
            await connector.put(f"keys/{number:064}", [b"x"])
        with pytest.raises(Damaged, match="more than 64"):
            await read_keyring(connector)

    async def test_without_encryption(self) -> None:
        secrets = new_secrets(encrypted=False)
        with pytest.raises(UsageError, match="no encryption"):
            await passphrases.add(MemoryConnector(), config_bytes(new_config(secrets)), secrets, b"x", label="")

    async def test_storage_without_put_if_absent(self) -> None:
        connector = await repository(3)
        connector.capabilities = Capabilities(exclusive_puts=False)
        with pytest.raises(UsageError) as raised:
            await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])
        assert "--exclusive" in raised.value.remedy
        with pytest.raises(UsageError):
            await passphrases.change(connector, CONFIG, SECRETS, IDS[0], b"x", label="", cost=CHEAP)
        assert len((await read_keyring(connector)).live) == 3
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[0], exclusive=True)
        await passphrases.change(connector, CONFIG, SECRETS, IDS[1], b"x", label="", cost=CHEAP, exclusive=True)
        assert await opens(connector, b"x") and not await opens(connector, b"passphrase 1")

    async def test_slot_gone_while_it_is_read(self) -> None:
        """The passphrase is changed between a reader's listing and its reading."""
        connector = await repository(2)

        class Late(MemoryConnector):
            async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
                if name == slot_name(IDS[0]):
                    await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])
                return await super().get(name, offset=offset, length=length)

        late = Late()
        late._objects = connector._objects
        assert list((await read_keyring(late)).live) == [IDS[1]]
