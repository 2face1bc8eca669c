"""`repair snapshots --forget`: what it removes is lost indeed, and what is lost for good does not stand in the way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests import fault_harness
from tests.fault_harness import Here, objects, put_in_place

if TYPE_CHECKING:
    from pathlib import Path


def files(source: Path, *names: str) -> None:
    source.mkdir(exist_ok=True)
    for name in names:
        (source / name).write_bytes(os.urandom(100_000))


def spoil(path: Path, how: str) -> None:
    if how == "lost":
        path.unlink()
    else:
        data = path.read_bytes()
        put_in_place(path, data[:100] + bytes([data[100] ^ 1]) + data[101:])


def restored(run: Here, target: Path, snapshot: str = "latest") -> dict[str, bytes]:
    run("restore", snapshot, "--to", str(target))
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_what_only_the_index_has_lost(tmp_path: Path, how: str) -> None:
    """It is found again first: all packs are there, and nothing is forgotten."""
    run, source = fault_harness.create(tmp_path), tmp_path / "source"
    files(source, "a", "b")
    run("backup", source, "--workers", "1")
    [index] = objects(run.repository, "index")
    files(source, "c", "d")
    run("backup", source, "--workers", "1")
    run("prune", "--keep-last", "1")
    spoil(index, how)
    told = run("repair", "snapshots", "--dry-run", codes=(0, 3))
    assert "`repair index` first, and less may be lost" in told.stderr
    told = run("repair", "snapshots", "--forget")
    assert "packs that were not in the index are put there first" in told.stderr
    assert told.stdout == "repair: 0 snapshots of 1 are damaged, 0 repaired, 0 removed\n"
    run("maintenance", "--grace", "0")
    run("check")
    assert restored(run, tmp_path / "target") == {path.name: path.read_bytes() for path in source.iterdir()}


def test_what_the_index_has_lost_and_a_mark_names(tmp_path: Path) -> None:
    """Of that it is not known whether it is lost: the snapshot stays."""
    run, source = fault_harness.create(tmp_path), tmp_path / "source"
    files(source, "a", "b")
    run("backup", source, "--workers", "1")
    (source / "b").unlink()
    run("backup", source, "--workers", "1")
    first, second = (str(item["snapshot_id"]) for item in run("ls", "--json").of_type("item"))
    run("rm", first)
    run("maintenance")
    for index in objects(run.repository, "index"):
        index.unlink()
    told = run("repair", "snapshots", "--forget", codes=(0, 3))
    assert "nothing is forgotten while packs are marked for removal" in told.stderr
    assert second in [str(item["snapshot_id"]) for item in run("ls", "--json").of_type("item")]
    run("repair", "index", "--exclusive")
    run("check")
    assert restored(run, tmp_path / "target", second) == {"a": (source / "a").read_bytes()}


def test_what_is_lost_for_good(tmp_path: Path) -> None:
    """A snapshot of which nothing can be read is removed, if so asked, and maintenance goes on."""
    run, source = fault_harness.create(tmp_path), tmp_path / "source"
    files(source, "a")
    run("backup", source, "--workers", "1")
    for pack in objects(run.repository, "packs"):
        pack.unlink()
    files(source, "a")
    run("backup", source, "--workers", "1", "--force")
    lost, whole = (str(item["snapshot_id"]) for item in run("ls", "--json").of_type("item"))
    assert lost[:8] in run("maintenance", "--grace", "0", codes=(1,)).stderr
    told = run("repair", "snapshots", codes=(3,))
    assert f"{lost[:8]} can't be repaired, nothing of it can be read" in told.stderr
    told = run("repair", "snapshots", "--forget", codes=(3,))
    assert told.stdout == "repair: 1 snapshot of 2 is damaged, 0 repaired, 1 removed\n"
    assert [str(item["snapshot_id"]) for item in run("ls", "--json").of_type("item")] == [whole]
    run("maintenance", "--grace", "0")
    run("check")
    assert restored(run, tmp_path / "target") == {"a": (source / "a").read_bytes()}
