"""Mark: which packs may be swept, and which attempts stand in the way for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio import to_thread

from coffret.engine.maintenance_choice import PackUse, choose
from coffret.engine.maintenance_dead import bury, find_dead
from coffret.engine.maintenance_marks import MAX_PACKS
from coffret.engine.maintenance_sound import sound_packs
from coffret.engine.maintenance_view import NAMED, UNNAMED
from coffret.engine.mirror import attempt_of
from coffret.engine.objects import list_leases, list_objects
from coffret.engine.records import ATTEMPT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coffret.engine.maintenance_choice import Choice
    from coffret.engine.maintenance_needs import Needs
    from coffret.engine.maintenance_view import Scene
    from coffret.engine.repository import Repository


async def choose_packs(repository: Repository, scene: Scene, needs: Needs) -> Choice:
    """Choose packs by what is needed of them: only of attempts that have ended, and named by no other.

    Of those that are known to be damaged (which `needs` takes for doomed) all of which what is needed can be copied.
    Packs that are missing hold nothing that is needed, or it could not be told what is: the index forgets them.
    """
    sound = await sound_packs(repository.fetcher(scene.attempt.mirror, strict=True), needs)
    named, missing = await scene.named(), await scene.missing(MAX_PACKS)
    owners = await scene.owners(named)
    ended, bad = scene.ended, scene.attempt.mirror.bad_packs

    def uses() -> Iterator[PackUse]:
        for number, (pack, size_bytes, _) in enumerate(scene.packs):
            live_bytes = needs.live[number]
            free = named[number] == NAMED or (named[number] == UNNAMED and owners.get(number) in ended)
            if live_bytes and pack in bad and pack not in sound:
                free = False
            yield PackUse(pack, size_bytes, live_bytes, free, bool(needs.catalogs[number]), hurt=pack in sound)
        yield from (PackUse(pack, 0, 0, free=True) for pack in missing)

    return await to_thread.run_sync(lambda: choose(uses(), repository.config.pack_bytes))


async def clear_the_dead(repository: Repository, scene: Scene, now_s: float, grace_s: float) -> int:
    """End attempts that are dead, and take away the leases of those that have ended; how many were ended."""
    connector = repository.connector
    left: dict[str, float] = {}
    for info in scene.index:
        left[attempt_of(info.name)] = max(info.mtime_s, left.get(attempt_of(info.name), 0.0))
    for number, attempt in (await scene.owners(await scene.named())).items():
        left[attempt] = max(scene.packs[number][2], left.get(attempt, 0.0))
    # After all that: an attempt whose objects were seen, and that has no lease now, commits no more.
    leases = await list_leases(connector)
    # Whose snapshot was removed has ended, also in the moment in which some servers replace it by a small end.
    removed = {info.name.rpartition("-")[2] for info in await list_objects(connector, "removed/")}
    ended = scene.ended | removed
    dead = find_dead(leases, ended, left, now_s=now_s, grace_s=grace_s, own=scene.attempt.id.hex())
    for attempt in sorted(dead.drop):
        await connector.delete(f"leases/{attempt}")
    buried = 0
    for attempt in sorted(dead.bury):
        if _is_attempt(attempt):
            buried += await bury(connector, repository.sealer, attempt, scene.attempt.id)
    return buried


def _is_attempt(text: str) -> bool:
    return len(text) == 2 * ATTEMPT_BYTES and set(text) <= set("0123456789abcdef")
