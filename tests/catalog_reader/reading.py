"""Catalogs opened from memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from tests.catalogs import KEY, PATHS, FineCutter, tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from coffret.engine.records import Entry


TREES = st.lists(PATHS, max_size=40).map(tree)
_FINE = FineCutter(KEY)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what awaits nothing but `Chunks.load`, which never waits: without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it awaits something else")


def collect(iterator: AsyncIterator[Any]) -> list[Any]:
    async def all_of_it() -> list[Any]:
        return [item async for item in iterator]

    return list(run(all_of_it()))


def flat(batches: list[tuple[bytes, list[Entry]]]) -> list[tuple[bytes, Entry]]:
    assert all(entries for _, entries in batches)
    return [(directory, entry) for directory, entries in batches for entry in entries]
