"""Passphrases: where they come from, and adding, changing, removing and recovering them, by many hosts at once."""

from __future__ import annotations

import json
import random
import re
import stat
import sys
import traceback
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coffret.connectors.base import Capabilities, Connector
from coffret.connectors.memory import MemoryConnector
from coffret.engine.configuration import config_bytes, config_hash, new_config
from coffret.engine.errors import (
    Damaged,
    RepositoryChanged,
    UsageError,
    WrongPassphrase,
)
from coffret.engine.keyring import Keyring, log_removal, put_slot, read_keyring, slot_name
from coffret.engine.keys import MAX_SLOTS, Cost, new_secrets, unlock, wrap
from coffret.engine.ops import passphrases
from coffret.engine.ops.recovery import export, recover
from coffret.engine.passphrase import MAX_PASSPHRASE_BYTES, PEER_PREFIX, passphrase_from_environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from coffret.connectors.base import Buffer, ObjectInfo

CHEAP = Cost(memory_kib=32, passes=1, lanes=1)
SECRETS = new_secrets(encrypted=True)
CONFIG = config_bytes(new_config(SECRETS))
HASH = config_hash(CONFIG)
SLOTS = dict(wrap(SECRETS, b"passphrase %d" % n, HASH, label=f"host{n}", cost=CHEAP) for n in range(5))
IDS = list(SLOTS)
FOREIGN_ID, FOREIGN = wrap(new_secrets(encrypted=True), b"passphrase 0", HASH, label="planted", cost=CHEAP)


async def repository(count: int = 2) -> MemoryConnector:
    """A repository with that many passphrases."""
    connector = MemoryConnector()
    await connector.put("config", [CONFIG])
    for slot in IDS[:count]:
        await put_slot(connector, slot, SLOTS[slot])
    return connector


async def opens(connector: Connector, passphrase: bytes) -> bool:
    try:
        return unlock((await read_keyring(connector)).live, passphrase, HASH)[1] == SECRETS
    except WrongPassphrase:
        return False


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
        for prefix in ("COFFRET_PASSPHRASE", PEER_PREFIX):
            for env in (
                {prefix: value},
                {f"{prefix}_FILE": str(file)},
                {f"{prefix}_COMMAND": f"cat '{file}'"},
            ):
                assert passphrase_from_environment(env, prefix) == passphrase

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
        assert await log_removal(connector, await read_keyring(connector), IDS[0])
        assert not await opens(connector, b"passphrase 0")
        with pytest.raises(WrongPassphrase):
            unlock((await read_keyring(connector)).live, b"passphrase 0", HASH)
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[1])
        names = [info.name async for info in connector.list("keys/")]
        assert sorted(names) == sorted([slot_name(IDS[2]), "keys/removed-1", "keys/removed-2"])

    async def test_log_by_an_outdated_view(self) -> None:
        connector = await repository(3)
        keyring = await read_keyring(connector)
        assert await log_removal(connector, keyring, IDS[0])
        assert not await log_removal(connector, keyring, IDS[1])

    async def test_damaged_log(self) -> None:
        """It locks nobody out, and nothing more is removed by it."""
        connector = await repository(3)
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[0])
        await connector.put(slot_name(IDS[0]), [SLOTS[IDS[0]]])
        await passphrases.remove(connector, CONFIG, SECRETS, IDS[1])
        body = await connector.get("keys/removed-2")
        for damaged in (b"", body[:50], body.replace(b'"removed"', b'"removee"'), body[:-20] + b"A" + body[-19:]):
            await connector.put("keys/removed-2", [damaged])
            keyring = await read_keyring(connector)
            assert keyring.log_damaged and keyring.removed == {IDS[0]} and list(keyring.live) == [IDS[2]]
            with pytest.raises(Damaged, match="removed-2"):
                await passphrases.remove(connector, CONFIG, SECRETS, IDS[2])

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

    async def test_another_repository_is_there(self) -> None:
        text = await export(await repository(1), CONFIG, SECRETS)
        other_config = config_bytes(new_config(SECRETS))
        for there, error in (
            (other_config, RepositoryChanged),
            (other_config.replace(b'"version":0', b'"version":9'), RepositoryChanged),
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


class Killed(Exception):
    """The process that makes this call dies before it."""


class Interleaved(Connector):
    """A connector whose every call waits for its turn; a listing misses or shows what changes meanwhile.

    With `exclusive` false, put-if-absent is a put.
    """

    def __init__(self, rnd: random.Random, *, exclusive: bool = True) -> None:
        self.location = "memory://interleaved"
        self.objects = MemoryConnector()
        self.waiting: list[tuple[anyio.Event, list[bool]]] = []
        self._rnd, self._exclusive = rnd, exclusive

    async def turn(self) -> None:
        event, killed = anyio.Event(), [False]
        self.waiting.append((event, killed))
        await event.wait()
        if killed[0]:
            raise Killed

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        await self.turn()
        await self.objects.put(name, body, if_absent=if_absent and self._exclusive)

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        await self.turn()
        return await self.objects.get(name, offset=offset, length=length)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        await self.turn()
        before = {info.name: info async for info in self.objects.list(prefix)}
        early = {name: info for name, info in before.items() if self._rnd.random() < 0.5}
        await self.turn()
        late = {info.name: info async for info in self.objects.list(prefix)}
        appeared = {name: info for name, info in late.items() if name not in before and self._rnd.random() < 0.5}
        kept = {name: info for name, info in late.items() if name in before}
        for info in (early | kept | appeared).values():
            yield info

    async def stat(self, name: str) -> ObjectInfo:
        await self.turn()
        return await self.objects.stat(name)

    async def delete(self, name: str) -> None:
        await self.turn()
        await self.objects.delete(name)


def live_slots(objects: dict[str, tuple[bytes, float]]) -> set[str]:
    """The live slots, by the format's description alone."""
    numbers = [int(match[1]) for name in objects if (match := re.fullmatch(r"keys/removed-(\d+)", name))]
    removed = json.loads(objects[f"keys/removed-{max(numbers)}"][0])["removed"] if numbers else []
    return {name[5:] for name in objects if name.startswith("keys/") and "removed" not in name} - {*removed}


async def race(rnd: random.Random, *, exclusive: bool = True, kill: bool = True) -> int:
    """Let several hosts remove, change and add slots in a random order of calls; the least number of live slots."""
    connector = Interleaved(rnd, exclusive=exclusive)
    for slot in IDS[: rnd.randint(1, 3)]:
        await connector.objects.put(slot_name(slot), [SLOTS[slot]])
    await connector.objects.put(slot_name(FOREIGN_ID), [FOREIGN])
    running = 0

    async def host(removes: list[str], adds: list[str]) -> None:
        nonlocal running
        try:
            for slot in adds:
                await put_slot(connector, slot, SLOTS[slot])
            for slot in removes:
                await passphrases.remove(connector, CONFIG, SECRETS, slot)
        except* (UsageError, Killed):
            pass
        finally:
            running -= 1

    fewest = len(IDS)
    async with anyio.create_task_group() as group:
        for _ in range(rnd.randint(2, 4)):
            running += 1
            adds = rnd.sample(IDS[3:], rnd.choice((0, 0, 1)))
            group.start_soon(host, rnd.sample(IDS, rnd.randint(1, 5)), adds)
        while running:
            await anyio.wait_all_tasks_blocked()
            if connector.waiting:
                event, killed = connector.waiting.pop(rnd.randrange(len(connector.waiting)))
                killed[0] = kill and rnd.random() < 0.02
                event.set()
            fewest = min(fewest, len(live_slots(connector.objects._objects) - {FOREIGN_ID}))
    return fewest


class TestRaces:
    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, 1 << 32))
    def test_never_none_left(self, seed: int) -> None:
        assert anyio.run(race, random.Random(seed)) >= 1

    def test_the_model_finds_what_is_missing(self) -> None:
        """Without put-if-absent, two removers leave none."""

        async def found(seed: int) -> bool:
            return await race(random.Random(seed), exclusive=False, kill=False) == 0

        assert any(anyio.run(found, seed) for seed in range(200))
