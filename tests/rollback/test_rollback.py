"""An older state, or a hidden snapshot: noticed by who saw the newer one, and elsewhere by `--expect-state`."""

from __future__ import annotations

import os
import shutil
import stat
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import fault_harness
from tests.fault_harness import Here, make_source, objects, put_in_place, replace_tree

from coffret.engine import sealing
from coffret.engine.opening import open_repository
from coffret.engine.records import End, encode
from coffret.engine.repository import OpenOptions
from coffret.engine.seen import change_seen, read_seen, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.harness import Outcome

    Pairs = set[tuple[bytes, bytes]]

WARNING = "WARNING: "
GONE = "snapshots are gone that nobody has removed: "
BACK = "snapshots are back that were removed: "


@pytest.fixture
def run(tmp_path: Path) -> Here:
    """A repository with two snapshots."""
    run = fault_harness.create(tmp_path)
    make_source(tmp_path / "source", files=5, large_bytes=100_000)
    for number in range(2):
        (tmp_path / "source" / f"more{number}").write_bytes(os.urandom(1000))
        run("backup", tmp_path / "source", "--workers", "1")
    return run


def ids(run: Here) -> list[str]:
    return [str(item["snapshot_id"]) for item in run("ls", "--json").of_type("item")]


def warned(outcome: Outcome) -> str:
    """The warning there is, or ""."""
    found = [line.partition(WARNING)[2] for line in outcome.stderr.splitlines() if WARNING in line]
    assert len(found) < 2
    return found[0] if found else ""


def state(run: Here) -> str:
    return str(run("info", "--json").summary["state"])


def put(run: Here, objects: Mapping[str, tuple[bytes, object]]) -> None:
    """Put sealed objects as somebody with the keys can: by name, (kind, record)."""
    options = OpenOptions(cache_dir=run.home / "c", state_dir=run.home / "s")
    passphrase = fault_harness.PASSPHRASE.encode

    async def work() -> None:
        async with open_repository(str(run.repository), passphrase=passphrase, options=options) as opened:
            for name, (kind, record) in objects.items():
                await opened.connector.put(name, [opened.sealer.seal(kind, name, os.urandom(16), encode(record))])

    anyio.run(work)


def snapshot_file(run: Here, snapshot_id: str) -> Path:
    """The file of the snapshot object with an id: the one without which it is not listed."""
    for path in objects(run.repository, "snapshots"):
        aside = run.home / "aside"
        path.rename(aside)
        left = ids(Here(run.home, {**run.environment, **elsewhere(run)}))
        aside.rename(path)
        if snapshot_id not in left:
            return path
    raise AssertionError(snapshot_id)


def elsewhere(run: Here) -> dict[str, str]:
    """Another machine each time: one that has seen nothing."""
    return {"XDG_STATE_HOME": str(run.home / f"elsewhere-{os.urandom(4).hex()}")}


@pytest.mark.parametrize("cache", [[], ["--no-cache"]])
def test_older_state(run: Here, tmp_path: Path, cache: list[str]) -> None:
    replace_tree(run.repository, tmp_path / "older")
    (tmp_path / "source" / "later").write_bytes(b"later")
    run("backup", tmp_path / "source", "--workers", "1", *cache)
    latest = ids(run)[-1]
    assert warned(run("check")) == ""
    run.repository.rename(tmp_path / "newer")
    replace_tree(tmp_path / "older", run.repository)
    for words in (["ls"], ["restore", "latest", "--to", str(tmp_path / "target")], ["info"], ["ls", "latest"]):
        assert GONE + latest[:8] in warned(run(*words, *cache))
    outcome = run("check", "--json", codes=(4,))
    assert outcome.summary["missing_snapshots"] == [latest]
    assert outcome.summary["clean"] is False
    told = run("check", "latest", *cache, codes=(4,))
    assert told.stdout == "check: 1 snapshot not as before: see the warning\n"
    # A backup goes on, and says it; and that it was said does not make it good.
    assert GONE in warned(run("backup", tmp_path / "source", "--workers", "1"))
    assert GONE in warned(run("ls"))
    # Nobody else was told anything.
    assert warned(run("check", environment=elsewhere(run))) == ""
    # The newer state comes back: then the snapshot that was made meanwhile is what is missed.
    between = ids(run)[-1]
    run.repository.rename(tmp_path / "between")
    replace_tree(tmp_path / "newer", run.repository)
    found = warned(run("ls"))
    assert between[:8] in found and latest[:8] not in found
    run.repository.rename(tmp_path / "newest")
    replace_tree(tmp_path / "between", run.repository)
    # Accepted, as the warning says.
    now = warned(run("ls")).rpartition(" ")[2]
    assert warned(run("ls", "--expect-state", now)) == ""
    assert warned(run("check")) == ""
    # What was accepted as gone is not to come back unnoticed.
    replace_tree(tmp_path / "newer", run.repository)
    assert BACK + latest[:8] in warned(run("check", codes=(4,)))


@pytest.mark.parametrize("words", [["rm", "latest"], ["prune", "--keep-last", "1"]])
def test_what_was_removed_here_is_back(run: Here, tmp_path: Path, words: list[str]) -> None:
    """Nothing was listed in between."""
    before = ids(run)
    replace_tree(run.repository, tmp_path / "older")
    run(*words)
    replace_tree(tmp_path / "older", run.repository)
    assert BACK + before[1 if words[0] == "rm" else 0][:8] in warned(run("ls"))
    assert warned(run("ls", environment=elsewhere(run))) == ""


def test_removed_with_the_keys(run: Here) -> None:
    """By a record, or swept later: nothing is missed. A record by somebody without keys hides nothing."""
    first, second = ids(run)
    path = snapshot_file(run, first)
    record = f"removed/{first}-{path.name}"
    (run.repository / "removed").mkdir(exist_ok=True)
    (run.repository / record).write_bytes(b"planted")
    assert ids(Here(run.home, {**run.environment, **elsewhere(run)})) == [second]
    assert GONE + first[:8] in warned(run("ls"))
    run("check", codes=(4,))
    (run.repository / record).unlink()
    assert warned(run("check")) == ""
    put(run, {record: (sealing.REMOVED, {"host": "h", "user": "u", "time_ns": 1})})
    assert ids(run) == [second]
    assert warned(run("check")) == ""
    data = (run.repository / record).read_bytes()
    (run.repository / record).unlink()
    assert BACK + first[:8] in warned(run("check", codes=(4,)))
    put_in_place(run.repository / record, data)
    assert warned(run("check")) == ""
    # Swept: its end stands in its place. The second is swept by somebody else, and the record is gone.
    other = snapshot_file(run, second)
    put(run, {f"snapshots/{other.name}": (sealing.END, End("swept", 1))})
    assert warned(run("check")) == ""


def test_what_is_swept_can_t_be_copied(run: Here) -> None:
    first, second = (snapshot_file(run, each) for each in ids(run))
    put(run, {f"snapshots/{first.name}": (sealing.END, End("swept", 1))})
    assert warned(run("ls")) == ""
    put_in_place(second, first.read_bytes())
    # It is damaged, which is told; and is it put away, it is missed.
    run("check", codes=(4,))
    second.unlink()
    assert GONE in warned(run("check", codes=(4,)))


def test_damaged_is_not_gone(run: Here) -> None:
    path = snapshot_file(run, ids(run)[0])
    data = path.read_bytes()
    put_in_place(path, data[:-1])
    assert warned(run("ls", codes=(3,))) == ""
    put_in_place(path, data)
    assert warned(run("check")) == ""


def test_expected_state(run: Here, tmp_path: Path) -> None:
    """Told by a backup, asked for on another machine: the same, or more; nothing less, and nothing else."""
    source = tmp_path / "source"
    replace_tree(run.repository, tmp_path / "older")
    older = state(run)
    (source / "later").write_bytes(b"later")
    outcome = run("backup", source, "--workers", "1", "-v")
    [told] = [line.removeprefix("state ") for line in outcome.stdout.splitlines() if line.startswith("state ")]
    assert told == state(run) != older
    for _ in range(2):
        (source / "later").write_bytes(os.urandom(10))
        newest = str(run("backup", source, "--workers", "1", "--json").summary["state"])
    assert newest == state(run)
    for expected in (older, told, newest, f" {newest.upper()} "):
        run("check", "--fast", "--expect-state", expected, environment=elsewhere(run))
    made = run("backup", source, "--workers", "1", "--json", "--expect-state", told, environment=elsewhere(run)).summary
    assert made["state"] == state(run)
    newest = state(run)
    assert "is no state" in run("ls", "--expect-state", "zz", codes=(2,)).stderr
    outcome = run("ls", "--expect-state", "0" * 32, codes=(1,), environment=elsewhere(run))
    assert newest in outcome.stderr
    run.repository.rename(tmp_path / "newer")
    replace_tree(tmp_path / "older", run.repository)
    before = sorted(run.repository.rglob("*"))
    for words in (["check"], ["backup", str(source)], ["restore", "latest", "--to", str(tmp_path / "no")], ["info"]):
        run(*words, "--expect-state", told, codes=(1,), environment=elsewhere(run))
    assert sorted(run.repository.rglob("*")) == before
    assert not (tmp_path / "no").exists()
    run("check", "--packs", "--expect-state", told, codes=(2,))
    Here(tmp_path)("at", tmp_path / "new", "create", "--no-encryption", "--expect-state", told, codes=(2,))


def test_where_nothing_can_be_remembered(run: Here, tmp_path: Path) -> None:
    """All goes on, with the one note there is about that."""
    (tmp_path / "a file").touch()
    shut = {"XDG_STATE_HOME": str(tmp_path / "a file")}
    assert warned(run("ls", environment=shut)) == ""
    shutil.rmtree(run.repository / "snapshots")
    assert warned(run("ls", environment=shut)) == ""
    assert warned(run("ls")) != ""


def test_the_file(run: Here) -> None:
    """It is private, and says nothing to who has no key; damaged, it is begun anew."""
    [path] = (run.home / "state").rglob("seen/*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    data = path.read_bytes()
    assert len(data) < 200
    known = read_seen(path)
    assert {each.hex() for each, _ in known.live} == set(ids(run))
    for damaged in (b"", data[:-1], data[:10], data + bytes(32), bytes(len(data))):
        path.write_bytes(damaged)
        assert read_seen(path).live == set()
        run("ls")
        assert read_seen(path) == known


_HALF = st.binary(min_size=16, max_size=16)
_PAIRS = st.sets(st.tuples(_HALF, _HALF), max_size=20)


@settings(deadline=None, max_examples=30)  # each step is flushed to the disk
@given(steps=st.lists(st.tuples(_PAIRS, _PAIRS, st.booleans()), max_size=4))
def test_remembering(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Pairs, Pairs, bool]]) -> None:
    path = tmp_path_factory.mktemp("seen") / "seen" / "x.json"
    live: Pairs = set()
    removed: Pairs = set()
    for shown, gone, accept in steps:
        change_seen(path, shown, gone, accept)
        removed = (removed | gone) - (shown if accept else set())
        live = (live | shown) - removed
        seen = read_seen(path)
        assert (seen.live, seen.removed) == (live, removed)


@given(
    ids=st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=6), key=st.binary(min_size=32, max_size=32)
)
def test_a_state_is_of_the_set(ids: list[bytes], key: bytes) -> None:
    assert state_of(ids, key) == state_of(reversed(ids), key)
    others = {state_of(ids[:number], key) for number in range(len(ids) + 1)}
    assert len(others) == len(ids) + 1
    assert state_of(ids, bytes(32)) != state_of(ids, key) or key == bytes(32)
