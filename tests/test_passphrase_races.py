"""Hosts that add, change and remove passphrases at the same time, and die anywhere: never none left."""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.key_samples import CONFIG, FOREIGN, FOREIGN_ID, IDS, SECRETS, SLOTS

from coffret.connectors.base import Connector
from coffret.connectors.memory import MemoryConnector
from coffret.engine.errors import UsageError
from coffret.engine.keyring import Keyring, put_slot, read_keyring, slot_name
from coffret.engine.ops import passphrases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import pytest

    from coffret.connectors.base import Buffer, ObjectInfo

# Of the event loop, until what was woken has come to its next call (wait_all_tasks_blocked sleeps 0.1 s each time).
_CYCLES = 10


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
    # How likely it is that whoever made the last step makes the next: others then stand still for long.
    persistence = rnd.choice((0.0, 0.5, 0.9))

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
            for _ in range(_CYCLES):
                await anyio.lowlevel.checkpoint()
            if connector.waiting:
                latest = rnd.random() < persistence
                event, killed = connector.waiting.pop(-1 if latest else rnd.randrange(len(connector.waiting)))
                killed[0] = kill and rnd.random() < 0.02
                event.set()
            fewest = min(fewest, len(live_slots(connector.objects._objects) - {FOREIGN_ID}))
    return fewest


class TestRaces:
    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, 1 << 32))
    def test_never_none_left(self, seed: int) -> None:
        assert anyio.run(race, random.Random(seed)) >= 1

    def test_without_put_if_absent_none_is_left(self) -> None:
        async def none_left(seed: int) -> bool:
            return await race(random.Random(seed), exclusive=False, kill=False) == 0

        assert any(anyio.run(none_left, seed) for seed in range(500))

    def test_with_logged_slots_counted_none_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def forgetful(connector: Connector, config_hash: bytes) -> Keyring:
            keyring = await read_keyring(connector, config_hash)
            undeleted = {slot: SLOTS[slot] for slot in keyring.undeleted & SLOTS.keys()}
            return msgspec.structs.replace(keyring, live=keyring.live | undeleted)

        async def none_left(seed: int) -> bool:
            return await race(random.Random(seed)) == 0

        monkeypatch.setattr(passphrases, "read_keyring", forgetful)
        assert any(anyio.run(none_left, seed) for seed in range(1000))
