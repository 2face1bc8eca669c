"""Options of the command line that show in nothing but what is read, stored or restored: each reaches the engine."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from tests import fault_harness
from tests.fault_harness import Here, contents

from coffret.engine.settings import COMPRESSION_LEVELS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """A repository, and a source of three files that counts as old: nothing is read again for being fresh."""
    monkeypatch.setattr("coffret.engine.settings.RACY_NS", 0)
    for name in ("one", "two", "below/three"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(name * 10)
    return fault_harness.create(tmp_path, encrypted=False)


def backup(run: Here, *options: str) -> dict[str, Any]:
    return run("backup", "--json", "--workers", "1", run.home / "source", *options).summary


def test_compression(run: Here) -> None:
    """The more the smaller, and none where none is wanted."""
    text = "".join(f"{number * number} line {number * 7919 % 1013}\n" for number in range(40_000))
    (run.home / "source" / "text").write_text(text)
    summaries = {level: backup(run, "--dry-run", "--compression", level) for level in COMPRESSION_LEVELS}
    stored = [summaries[level]["bytes_stored"] for level in ("off", "fast", "default", "max")]
    steps = [larger - smaller for larger, smaller in pairwise(stored)]
    assert min(steps) > 1_000  # the catalog differs by some bytes each time
    assert stored[0] > summaries["off"]["bytes_added"] > len(text) > stored[1]
    assert abs(backup(run, "--dry-run")["bytes_stored"] - stored[2]) < 1_000


def test_force(run: Here) -> None:
    assert backup(run)["files_read"] == 3
    assert backup(run)["files_read"] == 0
    assert backup(run, "--force")["files_read"] == 3


def test_ignore_ctime(run: Here) -> None:
    """A change of the metadata alone, such as this one, which leaves them as they were."""
    backup(run)
    file = run.home / "source" / "one"
    for mode in (0o600, file.stat().st_mode & 0o7777):
        file.chmod(mode)
    assert backup(run, "--dry-run", "--ignore-inode")["files_read"] == 1
    assert backup(run, "--dry-run", "--ignore-ctime")["files_read"] == 0


def test_ignore_inode(run: Here) -> None:
    """A copy in the place of a file differs in its inode number, and inevitably in its ctime."""
    backup(run)
    file, copy = run.home / "source" / "one", run.home / "copy"
    shutil.copy2(file, copy)
    status = file.stat()
    copy.rename(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(file.parent, ns=(1, 1))
    assert file.stat().st_ino != status.st_ino
    for options, read in (((), 1), (("--ignore-inode",), 1), (("--ignore-ctime",), 1)):
        assert backup(run, "--dry-run", *options)["files_read"] == read, options
    assert backup(run, "--dry-run", "--ignore-inode", "--ignore-ctime")["files_read"] == 0


def test_restore_exclude(run: Here) -> None:
    backup(run)
    target = run.home / "target"
    run("restore", "latest", "--to", target, "--exclude", "below", "--exclude", "two")
    assert contents(target).keys() == {"one"}
