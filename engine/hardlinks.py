"""Hard links of a restore: the first of a group is written, the others are linked to it at the end."""

from __future__ import annotations

import os
import tempfile
from typing import IO, TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from coffret.engine.places import Places
    from coffret.engine.records import Entry


class HardLinks:
    """Groups seen so far, and the links to be made, which wait on disk: there may be millions.

    A group is forgotten when all its links were seen.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], tuple[bytes, bytes, int]] = {}
        self._spool: IO[bytes] | None = None

    def seen(self, directory: bytes, entry: Entry) -> bool:
        """Whether another link of this entry's group came before; then it is noted, and nothing is to be written."""
        assert entry.extra is not None
        group = (entry.device, entry.inode)
        found = self._groups.get(group)
        if found is None:
            self._groups[group] = (directory, entry.name, entry.extra.nlink - 1)
            return False
        first_directory, first_name, left = found
        if left <= 1:
            del self._groups[group]
        else:
            self._groups[group] = (first_directory, first_name, left - 1)
        if self._spool is None:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed by make
        record = msgspec.msgpack.encode((first_directory, first_name, directory, entry.name))
        self._spool.write(len(record).to_bytes(4, "little") + record)
        return True

    def make(self, places: Places, replace: bool) -> list[tuple[bytes, str]]:
        """Make the links; return (path, reason) of those that could not be made."""
        faults: list[tuple[bytes, str]] = []
        if self._spool is None:
            return faults
        with self._spool as spool:
            spool.seek(0)
            while head := spool.read(4):
                record = msgspec.msgpack.decode(
                    spool.read(int.from_bytes(head, "little")), type=tuple[bytes, bytes, bytes, bytes]
                )
                try:
                    _link(places, *record, replace=replace)
                except OSError as error:
                    path = record[2] + b"/" + record[3] if record[2] else record[3]
                    faults.append((path, error.strerror or str(error)))
        return faults


def _link(
    places: Places, first_directory: bytes, first_name: bytes, directory: bytes, name: bytes, *, replace: bool
) -> None:
    source = os.dup(places.enter(first_directory))
    try:
        folder = places.enter(directory)
        try:
            os.link(first_name, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            if not replace:
                raise
            os.unlink(name, dir_fd=folder)
            os.link(first_name, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
    finally:
        os.close(source)
