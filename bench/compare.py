"""Compare two trees by names, types, link targets and contents."""

from __future__ import annotations

import filecmp
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_TOLD = 5


def differences(source: Path, restored: Path) -> list[str]:
    """The first few paths that differ, with the reason; empty when the trees are alike."""
    found: list[str] = []
    theirs = _listing(restored)
    for name, mode in _listing(source).items():
        if len(found) == _TOLD:
            break
        reason = _difference(source / name, mode, restored / name, theirs.pop(name, None))
        if reason is not None:
            found.append(f"{name}: {reason}")
    else:
        found += [f"{name}: not in the source" for name in list(theirs)[: _TOLD - len(found)]]
    return found


def _difference(source: Path, mode: int, restored: Path, restored_mode: int | None) -> str | None:
    if restored_mode is None:
        return "missing"
    if stat.S_IFMT(mode) != stat.S_IFMT(restored_mode):
        return "of another type"
    if stat.S_ISLNK(mode):
        return None if source.readlink() == restored.readlink() else "another target"
    if mode != restored_mode:
        return "another mode"
    if stat.S_ISREG(mode) and not filecmp.cmp(source, restored, shallow=False):
        return "another content"
    return None


def _listing(root: Path) -> dict[str, int]:
    """Mode of everything below a directory, by relative path."""
    modes = {}
    for directory, subdirectories, names in os.walk(root):
        for name in subdirectories + names:
            path = os.path.join(directory, name)
            modes[os.path.relpath(path, root)] = os.lstat(path).st_mode
    return modes
