"""Recovery files: what is lost comes back, and nothing else is touched."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3
from tests.key_samples import CHEAP, CONFIG, FOREIGN, FOREIGN_ID, IDS, SECRETS, SLOTS, opens, repository

from coffret.connectors.memory import MemoryConnector
from coffret.engine.configuration import config_bytes, new_config
from coffret.engine.errors import (
    Damaged,
    RepositoryChanged,
    UnsupportedVersion,
    UsageError,
    WrongPassphrase,
)
from coffret.engine.keyring import put_slot, slot_name
from coffret.engine.keys import new_secrets
from coffret.engine.ops import passphrases
from coffret.engine.ops.recovery import export, recover

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coffret.connectors.base import Buffer


BEGIN = "-----BEGIN COFFRET RECOVERY FILE-----"


class TestRecovery:
    pytestmark = pytest.mark.anyio

    async def test_config_and_slots_lost(self) -> None:
        connector = await repository(2)
        await put_slot(connector, FOREIGN_ID, FOREIGN)
        text = await export(connector, CONFIG, SECRETS)
        assert "passphrase add --from" in text and "host0" in text and "planted" not in text
        assert max(map(len, text.splitlines())) <= 120
        lost = MemoryConnector()
        await lost.put("packs/aa/x", [b"data"])
        put = await recover(lost, text, b"passphrase 1", label="")
        assert put.config and put.slots == sorted(IDS[:2])
        assert await lost.get("config") == CONFIG
        assert await opens(lost, b"passphrase 0") and await opens(lost, b"passphrase 1")
        again = await recover(lost, text, b"passphrase 1", label="")
        assert not again.config and not again.slots

    async def test_damaged_in_place(self) -> None:
        connector = await repository(2)
        text = await export(connector, CONFIG, SECRETS)
        await connector.put("config", [CONFIG.replace(b"aes256-gcm", b"aes256-gcn")])
        await connector.put(slot_name(IDS[0]), [SLOTS[IDS[0]][:100]])
        put = await recover(connector, text, b"passphrase 0", label="")
        assert put.config and put.slots == [IDS[0]]
        assert await connector.get("config") == CONFIG
        assert await opens(connector, b"passphrase 0")

    async def test_as_people_treat_it(self) -> None:
        connector = await repository(1)
        text = await export(connector, CONFIG, SECRETS)
        for treated in (text.replace("\n", "\r\n"), "hello\n" + text.replace("\n", "\n    ") + "bye", f"{text}{text}"):
            assert (await recover(MemoryConnector(), treated, b"passphrase 0", label="")).config

    async def test_refused(self) -> None:
        connector = await repository(1)
        text = await export(connector, CONFIG, SECRETS)
        lost = MemoryConnector()
        with pytest.raises(WrongPassphrase):
            await recover(lost, text, b"passphrase 1", label="")
        with pytest.raises(WrongPassphrase, match="none was given"):
            await recover(lost, text, None, label="")
        for nonsense in ("", "hello", "x" * 2_000_000):
            with pytest.raises(UsageError, match="no recovery file"):
                await recover(lost, nonsense, b"passphrase 0", label="")
        assert [info async for info in lost.list("")] == []

    async def test_altered(self) -> None:
        connector = await repository(1)
        text = await export(connector, CONFIG, SECRETS)
        begin = text.index("FILE-----\n") + 10
        end = text.index("-----END")
        for at in range(begin, end - 1):
            altered = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
            if text[at] in "=\n":
                continue
            with pytest.raises(Damaged):
                await recover(MemoryConnector(), altered, b"passphrase 0", label="")
        for cut in (text[: end - 100], text[:begin], text[:begin] + text[end:]):
            with pytest.raises(Damaged):
                await recover(MemoryConnector(), cut, b"passphrase 0", label="")

    async def test_of_a_newer_version(self) -> None:
        text = await export(await repository(1), CONFIG, SECRETS)
        lines = text.splitlines()
        body = base64.b64decode("".join(lines[lines.index(BEGIN) + 1 : -1]))[32:].replace(
            b'"version":1', b'"version":2'
        )
        newer = base64.b64encode(blake3(body).digest() + body).decode()
        with pytest.raises(UnsupportedVersion, match="version 2"):
            await recover(MemoryConnector(), f"{BEGIN}\n{newer}\n{lines[-1]}", b"passphrase 0", label="")

    async def test_another_repository_is_there(self) -> None:
        text = await export(await repository(1), CONFIG, SECRETS)
        other_config = config_bytes(new_config(SECRETS))
        for there, error in (
            (other_config, RepositoryChanged),
            (other_config.replace(b'"version":1', b'"version":9'), RepositoryChanged),
            (other_config[:200], Damaged),
            (b"[core]\n", Damaged),
        ):
            other = MemoryConnector()
            await other.put("config", [there])
            with pytest.raises(error):
                await recover(other, text, b"passphrase 0", label="")
            assert [info.name async for info in other.list("")] == ["config"]
            assert await other.get("config") == there

    async def test_another_is_created_at_this_moment(self) -> None:
        text = await export(await repository(1), CONFIG, SECRETS)

        class Raced(MemoryConnector):
            async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
                if name == "config" and if_absent:
                    await super().put(name, [b"other"])
                await super().put(name, body, if_absent=if_absent)

        with pytest.raises(RepositoryChanged, match="at this moment"):
            await recover(Raced(), text, b"passphrase 0", label="")

    async def test_removed_stays_removed(self) -> None:
        connector = await repository(2)
        text = await export(connector, CONFIG, SECRETS)
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])
        with pytest.raises(UsageError, match="was removed"):
            await recover(connector, text, b"passphrase 0", label="")
        assert (await recover(connector, text, b"passphrase 1", label="")).slots == []
        assert not await opens(connector, b"passphrase 0")

    async def test_removed_and_nothing_else_left(self) -> None:
        connector = await repository(1)
        text = await export(connector, CONFIG, SECRETS)
        changed = await passphrases.change(connector, CONFIG, SECRETS, IDS[0], b"new", label="", cost=CHEAP)
        await connector.delete(slot_name(changed))
        put = await recover(connector, text, b"passphrase 0", label="recovered", cost=CHEAP)
        assert len(put.slots) == 1 and put.slots != [IDS[0]]
        assert await opens(connector, b"passphrase 0")

    async def test_without_encryption(self) -> None:
        secrets = new_secrets(encrypted=False)
        config = config_bytes(new_config(secrets))
        connector = MemoryConnector()
        await connector.put("config", [config])
        text = await export(connector, config, secrets)
        assert "no encryption" in text
        lost = MemoryConnector()
        assert (await recover(lost, text, None, label="")).config
        assert await lost.get("config") == config
