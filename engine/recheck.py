"""Recheck: look up what a parent's catalog names, where that can't be taken for granted.

A snapshot that is listed can be resolved, so an unchanged entry costs no look-up. That is not so while packs are
marked to be swept or are known to be bad, when index objects have disappeared or are damaged, or when this machine
does not know (see `Mirror.is_sound`). Then each page of the parent is looked up before the scan goes by it: what the
repository lacks is read, or written, again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coffret.engine.catalog_walk import payload_length
from coffret.engine.errors import Damaged
from coffret.engine.records import ID_BYTES, REF_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coffret.engine.catalog_reader import BlockingLoad
    from coffret.engine.catalog_walk import LoadedPage
    from coffret.engine.records import Entry

    Absent = Callable[[Sequence[bytes]], set[bytes]]


class Recheck:
    """Takes pages of the parent's catalog, in the scan's thread. `absent` tells which chunks the repository lacks."""

    def __init__(self, load: BlockingLoad, absent: Absent) -> None:
        self._load, self._absent = load, absent

    def __call__(self, page: LoadedPage) -> None:
        """Make sure that an entry which can't be relied on is not taken for unchanged, nor the page kept.

        :raises Damaged: if the page is not well-formed
        """
        entries = [entry for section in page.sections for entry in section.entries]
        named = [(entry, list(_ids(_refs_of(entry)))) for entry in entries]
        wanted = [chunk_id for _, ids in named for chunk_id in ids] + list(_ids(page.ref.ref))
        lacking = self._absent(wanted)
        if not lacking.isdisjoint(_ids(page.ref.ref)):
            page.entries = 0
        for entry, ids in named:
            if not lacking.isdisjoint(ids) or (entry.extra and entry.extra.depth and not self._has_lists(entry)):
                entry.racy = True

    def _has_lists(self, entry: Entry) -> bool:
        """Whether all is there that the lists of a large file name; the lists above them are."""
        assert entry.extra is not None
        refs, left = entry.content, entry.size
        for _ in range(entry.extra.depth):
            below = []
            for at in range(0, len(refs), REF_BYTES):
                ref = refs[at : at + REF_BYTES]
                [payload] = self._load([ref])
                # No chunk is empty: of a list that repeats itself only the file's size says where it ends.
                left -= len(payload) // REF_BYTES
                if len(payload) != payload_length(ref) or not payload or len(payload) % REF_BYTES or left < 0:
                    raise Damaged(f"the chunk list of {entry.name!r} is not whole")
                below.append(payload)
            refs = b"".join(below)
            if self._absent(list(_ids(refs))):
                return False
        return True


def _refs_of(entry: Entry) -> bytes:
    extra = entry.extra
    return entry.content if extra is None else entry.content + extra.xattrs_ref + extra.extents_ref


def _ids(refs: bytes) -> Iterator[bytes]:
    return (refs[at : at + ID_BYTES] for at in range(0, len(refs), REF_BYTES))
