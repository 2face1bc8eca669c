"""Large buffers: made of whole pages, and given back without waiting for it."""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def fresh_memory(size_bytes: int) -> mmap.mmap:
    """Fresh memory of this process alone, zeroed, page-aligned as O_DIRECT needs it.

    Private: unlike what can be shared the system takes it back by MADV_DONTNEED.
    """
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def give_back(memories: Sequence[mmap.mmap], advice: int = mmap.MADV_DONTNEED) -> None:
    """Give memory back to the system, by a thread: 100 MiB take it 20 ms.

    Nobody reads or writes it any more: what is private is zero from then on. Whoever still has a view of it does not
    keep it: after an error tracebacks hold frames, and frames hold views.
    `advice`: what makes the system take back what can't be unmapped, MADV_REMOVE if it is shared.
    """

    def work() -> None:
        for memory in memories:
            try:
                memory.close()
            except BufferError:
                memory.madvise(advice)

    try:
        threading.Thread(target=work, name="give back", daemon=True).start()
    except RuntimeError:  # no further thread can be started
        work()
