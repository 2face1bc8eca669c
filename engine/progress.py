"""What the engine tells while it works: counters to look at, and events for those who ask. It renders nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from coffret.engine.flow import ChannelStatistics


class Item(msgspec.Struct, frozen=True):
    """One path that was dealt with. `path` is absolute, with a leading slash; `status` is one of
    new, changed, unmodified, restored, verified, copied, skipped, damaged."""

    path: bytes
    status: str
    size_bytes: int = 0


class Fault(msgspec.Struct, frozen=True):
    """One path, or object of the repository, that could not be dealt with as it should, and why."""

    path: bytes
    reason: str


class Progress(msgspec.Struct):
    """Counters of a running operation, to be read at any time, and callbacks for its events.

    Totals are None until they are known; `subject` is the short id of the snapshot at work. `new`, `changed` and
    `unmodified` count all that is no directory, `read_files` those files of a backup that had to be read; `size_bytes`
    are of files, but while a check is at its packs those of packs; a clone counts objects as `files`. `on_item` is
    called for each path when it is set; `on_fault` for each fault, `on_note` for a remark that is no fault.
    Callbacks run on the event loop and must not block.
    """

    phase: str = "opening"
    subject: str = ""
    files: int = 0
    files_total: int | None = None
    entries: int = 0
    size_bytes: int = 0
    size_total: int | None = None
    new: int = 0
    changed: int = 0
    unmodified: int = 0
    new_directories: int = 0
    changed_directories: int = 0
    unmodified_directories: int = 0
    read_files: int = 0
    read_bytes: int = 0
    added_bytes: int = 0
    stored_bytes: int = 0
    errors: int = 0
    current: dict[int, bytes] = msgspec.field(default_factory=dict)
    channels: list[ChannelStatistics] = msgspec.field(default_factory=list)
    on_item: Callable[[Item], None] | None = None
    on_fault: Callable[[Fault], None] | None = None
    on_note: Callable[[str], None] | None = None

    def fault(self, path: bytes, reason: str) -> None:
        """Count and pass on a fault."""
        self.errors += 1
        if self.on_fault is not None:
            self.on_fault(Fault(path, reason))

    def note(self, text: str) -> None:
        """Pass on a remark."""
        if self.on_note is not None:
            self.on_note(text)
