"""Merge: the tables of index objects that are to be replaced, without packs that go, and none of them twice; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.engine.index import covered
from coffret.engine.records import REF_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from coffret.engine.records import PackTable

# Chunks of tables that are held back until it is clear whether another says the same and more.
_HELD_CHUNKS = 100_000


class TableMerge:
    """Takes tables, and gives those back that say something new. Memory: some 100 bytes a pack, and what is held."""

    def __init__(self, without: Collection[bytes] = ()) -> None:
        self._without = frozenset(without)
        # Up to which offset all that a pack holds has been said.
        self._said: dict[bytes, int] = {}
        self._held: list[PackTable] = []
        self._chunks = 0

    def add(self, tables: Iterable[PackTable]) -> Iterator[PackTable]:
        """Take the tables of an index object; iterate over those to be put in the new one."""
        for table in tables:
            if table.pack in self._without or self._is_said(table):
                continue
            end = covered(table)
            if table.blocks and end > table.blocks[-1].offset:
                self._said[table.pack] = end
                yield table
            else:
                self._held.append(table)
                self._chunks += sum(len(block.refs) for block in table.blocks) // REF_BYTES
        if self._chunks > _HELD_CHUNKS:
            yield from self.rest()

    def rest(self) -> Iterator[PackTable]:
        """Iterate over what was held back, but for what has been said since."""
        held, self._held, self._chunks = self._held, [], 0
        seen: set[tuple[bytes, int, bytes]] = set()
        for table in held:
            blocks = {(table.pack, block.offset, block.refs) for block in table.blocks}
            if not self._is_said(table) and not blocks <= seen:
                seen |= blocks
                yield table

    def _is_said(self, table: PackTable) -> bool:
        end = self._said.get(table.pack, 0)
        return all(block.offset < end for block in table.blocks)
