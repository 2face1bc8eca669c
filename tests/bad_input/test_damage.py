"""Each kind of damage to each kind of object: what each command says, and that nothing stored is lost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests import fault_harness
from tests.fault_harness import contents, make_source, objects, put_in_place

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bad_input.stage import Stage


DAMAGES = ("emptied", "cut by a byte", "cut in half", "swapped", "deleted")
SEALED = {"magic": 0, "version": 8, "kind": 9, "attempt": 14, "salt": 40, "body": 80, "end": -1}
# The kinds of objects, and where in one a byte is changed. Removals are the log of removed key slots.
REGIONS = {
    "config": {"beginning": 1, "id": 40, "middle": 150, "end": -3},
    "keys": {"beginning": 1, "middle": 200, "end": -3},
    "removals": {"beginning": 1, "middle": 120, "end": -3},
    "leases": SEALED,
    "trash": SEALED,
    "removed": SEALED,
    "index": SEALED,
    "snapshots": SEALED,
    "packs": {"magic": 0, "version": 8, "salt": 40, "block": 80, "footer": -30, "length": -16, "end": -1},
}
CASES = [(kind, how) for kind in REGIONS for how in (*DAMAGES, *(f"one byte: {region}" for region in REGIONS[kind]))]
# The exit codes of `check`, `check --fast`, `check --packs`, `ls`, `restore` and `backup`, one for each.
ANSWERS = {
    "config": (4, 4, 4, 1, 1, 1),
    "keys": (4, 4, 0, 1, 1, 1),  # the only one; without a passphrase nothing of it is looked at
    "removals": (4, 4, 0, 0, 0, 0),
    "leases": (4, 4, 0, 0, 0, 0),
    "trash": (4, 4, 0, 0, 0, 1),  # a backup must not believe what a mark names, and can't tell
    "removed": (4, 4, 0, 0, 0, 0),
    "index": (4, 4, 0, 0, 3, 0),
    "snapshots": (4, 4, 0, 3, 1, 0),
    "packs": (4, 0, 4, 0, 0, 0),  # of a header, table or trailer, which the index has, too
}
NOTHING = (0, 0, 0, 0, 0, 0)
LOST = (4, 4, 4, 0, 3, 0)
ANSWERS_TO = {
    ("config", "swapped"): (1, 1, 0, 1, 1, 1),  # another repository
    ("config", "deleted"): (10, 10, 10, 10, 10, 10),
    ("removals", "cut by a byte"): NOTHING,  # the end of the line
    ("packs", "emptied"): LOST,
    ("packs", "cut by a byte"): (4, 4, 4, 0, 0, 0),
    ("packs", "cut in half"): LOST,
    ("packs", "swapped"): LOST,
    ("packs", "deleted"): (4, 4, 0, 0, 3, 0),  # what is there is right
    ("packs", "one byte: block"): (4, 0, 4, 0, 3, 0),
    # Nothing tells these from what is meant to be.
    **{(kind, "deleted"): NOTHING for kind in ("removals", "leases", "trash", "removed", "snapshots")},
}


def found_of(repository: Path, kind: str) -> list[Path]:
    """The objects of a kind; in keys/ lie two."""
    if kind not in ("keys", "removals"):
        return objects(repository, kind)
    return [path for path in objects(repository, "keys") if path.name.startswith("removed-") == (kind == "removals")]


def damage(stage: Stage, kind: str, how: str) -> tuple[Path, bytes]:
    """Damage one object, the newest of its kind; return where it lies and what it held."""
    found = found_of(stage.run.repository, kind)
    # The largest pack holds file content, the largest index object or snapshot is as good as another.
    path = max(found, key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "swapped":
        others = [other for other in found if other != path] or found_of(stage.other, kind)
        put_in_place(path, others[0].read_bytes())
    elif how == "emptied":
        put_in_place(path, b"")
    elif how == "cut by a byte":
        put_in_place(path, data[:-1])
    elif how == "cut in half":
        put_in_place(path, data[: len(data) // 2])
    else:
        at = REGIONS[kind][how.partition(": ")[2]] % len(data)
        put_in_place(path, data[:at] + bytes((data[at] ^ 0x01,)) + data[at + 1 :])
    return path, data


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_damaged_object(stage: Stage, kind: str, how: str) -> None:
    """Each command says so and goes as far as it can; when the object is put back, nothing is lost."""
    stage.reset()
    path, data = damage(stage, kind, how)
    answers = ANSWERS_TO.get((kind, how), ANSWERS[kind])
    told = stage.run("check", codes=(answers[0],)).stderr
    if answers[0] == 4 and how != "deleted":
        assert (path.name[:8] if kind == "keys" else path.name) in told
    for option, code in zip(("--fast", "--packs"), answers[1:3], strict=True):
        stage.run("check", option, codes=(code,))
    stage.run("ls", codes=(answers[3],))
    restored = stage.restored(answers[4])
    if answers[4] in (0, 3) and kind != "snapshots":  # an older one is the latest then
        assert restored == {name: content for name, content in stage.expected.items() if name in restored}
        assert (restored == stage.expected) == (answers[4] == 0)
    stage.run("backup", stage.source, "--workers", "1", codes=(answers[5],))

    put_in_place(path, data)
    stage.run("check", "--fast")
    assert stage.restored(0) == stage.expected


@pytest.mark.parametrize("how", ["altered", "missing"])
def test_what_check_advises(tmp_path: Path, how: str) -> None:
    """Who follows the last line of a check has a good snapshot of what is still there."""
    run, source = fault_harness.create(tmp_path, encrypted=False), make_source(tmp_path / "source")
    run("backup", source, "--workers", "1")
    (source / "later").write_bytes(b"later")
    run("backup", source, "--workers", "1")
    pack = max(objects(run.repository, "packs"), key=lambda path: path.stat().st_size)
    data = pack.read_bytes()
    pack.unlink() if how == "missing" else put_in_place(pack, data[:-1000] + bytes(1000))
    last = run("check", codes=(4,)).stdout
    assert last.startswith("check: found damage: 1 pack, 2 snapshots, ")
    assert "; run `coffret check`, then `coffret backup` on the hosts whose files are damaged" in last
    run("backup", source, "--workers", "1")
    run("check", "latest")
    run("restore", "latest", "--to", tmp_path / "target")
    assert contents(tmp_path / "target") == contents(source)


def test_damage_is_told_once(tmp_path: Path) -> None:
    """Of a snapshot's object and of an index object."""
    run, source = fault_harness.create(tmp_path, encrypted=False), make_source(tmp_path / "source")
    for number in range(2):
        (source / "fresh").write_bytes(os.urandom(1000 + number))
        run("backup", source, "--workers", "1")
    damaged = [objects(run.repository, kind)[0] for kind in ("snapshots", "index")]
    for path in damaged:
        put_in_place(path, path.read_bytes()[:-1])
    for how in ([], ["--fast"]):
        told = run("check", *how, codes=(4,)).stderr.splitlines()
        for path in damaged:
            name = f"{path.relative_to(run.repository)}: "
            assert [line.startswith(f"check: {name}") for line in told if name in line] == [True], told
    # Of one that is not looked at there is a remark.
    other = run("check", "latest", codes=(0, 4)).stderr
    assert f"left out, since it is damaged: {damaged[0].relative_to(run.repository)}" in other


@pytest.mark.parametrize(("slots", "code"), [("the one", 1), ("one of two", 12)])
def test_damaged_key_slot(tmp_path: Path, slots: str, code: int) -> None:
    """The way back is a recovery file."""
    run = fault_harness.create(tmp_path)
    [slot] = objects(run.repository, "keys")
    if slots == "one of two":
        with fault_harness.cheap_passphrases():
            run("passphrase", "add", environment={"COFFRET_NEW_PASSPHRASE": "another"})
    put_in_place(slot, slot.read_bytes()[:-1])
    assert "`coffret at REPO passphrase add --from FILE`" in run("ls", codes=(code,)).stderr
    assert "run `coffret at REPO check`" not in run("check", codes=(4 if code == 1 else code,)).stderr
    if slots == "one of two":
        other = {"COFFRET_PASSPHRASE": "another"}
        assert run("ls", environment=other).stderr == ""
        assert f"check: keys/{slot.name}: " in run("check", codes=(4,), environment=other).stderr


def test_latest_can_t_be_read(stage: Stage) -> None:
    """It is not silently an older one; by its id that one can be had."""
    stage.reset()
    snapshots = sorted(objects(stage.run.repository, "snapshots"), key=lambda path: path.stat().st_mtime)
    data = snapshots[-1].read_bytes()
    put_in_place(snapshots[-1], data[:-1])
    for words in (["ls", "latest"], ["restore", "latest", "--to", str(stage.home / "t")]):
        outcome = stage.run(*words, codes=(1,))
        assert snapshots[-1].name in outcome.stderr
        assert "by its id" in outcome.stderr
    assert not (stage.home / "t").exists()
    [older] = stage.run("ls", "--json", codes=(0, 3)).of_type("item")
    stage.run("ls", str(older["snapshot_id"]), codes=(0, 3))
