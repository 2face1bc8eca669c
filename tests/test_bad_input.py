"""Whatever lies where a repository is expected: one clear line, the right exit code, and nothing stored is lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import PosixPath
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest
from tests import fault_harness
from tests.fault_harness import PASSPHRASE, Here, contents, make_source, objects, put_in_place, replace_tree
from tests.harness import NOBODY, Program, needs_root, with_mounts

from coffret import cli
from coffret.engine import check_packs, sealing
from coffret.engine.attempt import Lease
from coffret.engine.configuration import config_bytes
from coffret.engine.ops import restore
from coffret.engine.records import Config, Mark, encode
from coffret.engine.repository import OpenOptions, open_repository

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
    ("removals", "swapped"): NOTHING,
    **{(kind, "deleted"): NOTHING for kind in ("removals", "leases", "trash", "removed", "snapshots")},
}


@pytest.fixture(autouse=True)
def _one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are what costs time here."""
    monkeypatch.setattr(check_packs, "OPEN_WORKERS", 1)
    monkeypatch.setattr(restore, "OPEN_WORKERS", 1)


def put_rare_objects(run: Here) -> None:
    """A removed key slot, and what maintenance and other writers leave while they are at work."""
    with fault_harness.cheap_passphrases():
        run("passphrase", "add", environment={"COFFRET_NEW_PASSPHRASE": "another"})
    slots = run("passphrase", "list", "--json").of_type("item")
    run("passphrase", "rm", next(slot["slot_id"] for slot in slots if not slot["current"]))
    options = OpenOptions(cache_dir=run.home / "cache" / "coffret", state_dir=run.home / "state" / "coffret")
    attempt = os.urandom(16)
    bodies = {
        f"leases/{attempt.hex()}": (sealing.LEASE, encode(Lease("elsewhere", 1, "backup", 1))),
        "trash/1": (sealing.MARK, encode(Mark(os.urandom(64)))),
        f"removed/{os.urandom(16).hex()}-{attempt.hex()}": (sealing.REMOVED, encode({})),
    }

    async def put() -> None:
        async with open_repository(str(run.repository), passphrase=PASSPHRASE.encode, options=options) as opened:
            for name, (kind, payload) in bodies.items():
                await opened.connector.put(name, [opened.sealer.seal(kind, name, attempt, payload)])

    anyio.run(put)


class Stage:
    """A home whose repository can be put back as it was: two snapshots, each with an index object and packs."""

    def __init__(self, home: Path) -> None:
        self.home, self.kept, self.other = home, home / "kept", home / "other"
        self.run = fault_harness.create(home)
        put_rare_objects(self.run)
        self.source = make_source(home / "source", large_bytes=2 << 20)
        self.run("backup", self.source, "--workers", "1")
        (self.source / "second").write_bytes(os.urandom(50_000))
        self.run("backup", self.source, "--workers", "1")
        self.run.repository.rename(self.kept)
        shutil.rmtree(home / "cache")
        self.expected = contents(self.source)
        elsewhere = home / "elsewhere"
        elsewhere.mkdir()
        other = fault_harness.create(elsewhere)
        put_rare_objects(other)
        other("backup", self.source, "--workers", "1")
        self.other = other.repository

    def reset(self) -> None:
        """The repository as it was, and a cache that knows nothing."""
        replace_tree(self.kept, self.run.repository)
        shutil.rmtree(self.home / "cache", ignore_errors=True)
        shutil.rmtree(self.home / "target", ignore_errors=True)

    def restored(self, *codes: int) -> dict[str, bytes | str]:
        """What a restore of the latest snapshot brings, with one of these exit codes."""
        target = self.home / "target"
        shutil.rmtree(target, ignore_errors=True)
        self.run("restore", "latest", "--to", target, codes=codes)
        return contents(target)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    yield Stage(tmp_path_factory.mktemp("stage"))


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


def test_wrong_or_no_passphrase(stage: Stage) -> None:
    stage.reset()
    none = Here(stage.home)
    for command in (
        ["ls"],
        ["check"],
        ["backup", str(stage.source)],
        ["restore", "latest", "--to", str(stage.home / "t")],
    ):
        assert "no passphrase was given" in none(*command, codes=(12,)).stderr
        stage.run(*command, codes=(12,), environment={"COFFRET_PASSPHRASE": "another"})
    assert not (stage.home / "t").exists()
    none("check", "--packs")


def test_passphrase_without_encryption(tmp_path: Path) -> None:
    """Somebody believes that the repository is encrypted: nothing is stored in clear."""
    run = fault_harness.create(tmp_path, encrypted=False)
    for name in ("COFFRET_PASSPHRASE", "COFFRET_PASSPHRASE_FILE", "COFFRET_PASSPHRASE_COMMAND"):
        outcome = run("backup", str(tmp_path / "cache"), codes=(2,), environment={name: PASSPHRASE})
        assert "has no encryption" in outcome.stderr
    assert not objects(run.repository, "packs")


def test_nothing_or_something_else_there(tmp_path: Path) -> None:
    run = Here(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "folder2").mkdir()
    (tmp_path / "folder2" / "config").write_text("[core]\n\tbare = false\n")
    for place in ("absent", "folder", "folder/file", "folder2", "folder/file/below"):
        for command in (["ls"], ["check"], ["check", "--packs"], ["backup", "."], ["restore", "latest"]):
            run("at", tmp_path / place, *command, codes=(10,))
    for place in ("folder", "folder/file"):
        outcome = run("at", tmp_path / place, "create", "--no-encryption", codes=(10,))
        assert outcome.stderr.endswith(" (choose a new or an empty place)\n")
    run("at", tmp_path / "folder2", "create", "--no-encryption", codes=(2,))
    assert (tmp_path / "folder" / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path / "folder")) == ["file"]
    assert sorted(os.listdir(tmp_path / "folder2")) == ["config"]
    run("at", "gopher://x/y", "ls", codes=(2,))


def test_no_such_path(stage: Stage) -> None:
    stage.reset()
    outcome = stage.run("backup", stage.home / "nowhere", codes=(1,))
    assert "nowhere" in outcome.stderr
    outcome = stage.run("backup", stage.home / "nowhere", stage.source, "--workers", "1", codes=(3,))
    assert "nowhere" in outcome.stderr
    stage.run("restore", "latest:/nowhere", "--to", stage.home / "target", codes=(2,))
    stage.run("restore", "0123", "--to", stage.home / "target", codes=(1,))
    stage.run("ls", "latest:/nowhere", codes=(2,))


def test_target_in_use(stage: Stage) -> None:
    stage.reset()
    target = stage.home / "target"
    target.write_text("a file")
    stage.run("restore", "latest", "--to", target, codes=(1,))
    stage.run("restore", "latest", "--to", target / "below", codes=(1,))
    assert target.read_text() == "a file"
    target.unlink()
    target.mkdir()
    (target / "large").write_text("mine")
    assert "large is there already" in stage.run("restore", "latest", "--to", target, codes=(1,)).stderr
    assert os.listdir(target) == ["large"]
    assert (target / "large").read_text() == "mine"


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
    assert "; move damaged packs out of the repository, then run `coffret backup --force` on the hosts" in last
    pack.unlink(missing_ok=True)
    run("backup", "--force", source, "--workers", "1")
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


def test_what_was_checked(stage: Stage) -> None:
    stage.reset()
    packs = len(objects(stage.run.repository, "packs"))
    outcome = Here(stage.home)("check", "--packs")
    assert outcome.stdout == f"check: the checksums of {packs} packs are right\n"
    short = stage.run("ls").stdout.splitlines()[-1].split()[1]
    once = stage.run("check", "latest").stdout
    assert once == f"check: verification of {short}:{stage.source} completed successfully\n"
    part = f"latest:{stage.source}/second"
    for twice in (["latest", short], [part, "latest", part]):
        assert stage.run("check", *twice).stdout == once
    assert stage.run("check", part, part).stdout.count(short) == 1


def test_no_cache(stage: Stage) -> None:
    """Where the cache can't be kept that is said, and all goes on."""
    stage.reset()
    place = stage.home / "no-folder"
    place.write_text("a file")
    outcome = stage.run("ls", "--cache-dir", place)
    assert re.fullmatch(rf"ls: note: no local cache is kept: {place}/\S+: Not a directory\n", outcome.stderr)
    assert stage.run("ls", "--no-cache").stderr == ""


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


def test_no_room_to_create(tmp_path: Path) -> None:
    program = Program(tmp_path, prefix=with_mounts(f'mount -t tmpfs -o nr_inodes=50 none {tmp_path}; exec "$0" "$@"'))
    [line] = program("create", "--no-encryption", code=13).stderr.splitlines()
    assert "No space left on device" in line
    assert line.endswith("(free some space and run the command again)")


@needs_root
@pytest.mark.skipif(subprocess.run(["unshare", "--user", "true"]).returncode != 0, reason="no user namespaces here")
def test_target_of_another(tmp_path: Path) -> None:
    """A target whose own metadata can't be set has a name, too."""
    program, target = Program(tmp_path), tmp_path / "target"
    (tmp_path / "source").mkdir()
    program("create", "--no-encryption")
    program("backup", tmp_path / "source")
    target.mkdir()
    os.chown(target, NOBODY, NOBODY)
    target.chmod(0o777)
    without_privileges = replace(program, prefix=("unshare", "--user"))
    reason = "mode not set: Operation not permitted"
    outcome = without_privileges("restore", "latest", "--to", target, code=3)
    assert f"restore: {tmp_path}/source: {reason}" in outcome.stderr.splitlines()
    outcome = without_privileges("restore", "--json", "latest", "--to", target, code=3)
    assert outcome.faults[os.fsencode(tmp_path / "source")].endswith("Operation not permitted")


@needs_root
def test_not_permitted() -> None:
    """As a user who may not write: to the repository, to the target, and who may not read it either."""
    from tests.harness import scratch

    with scratch(uid=NOBODY) as home:
        run = Program(home, uid=NOBODY)
        run("create", "--no-encryption")
        source = home / "source"
        make_source(source, large_bytes=1 << 20)
        source.chmod(0o755)
        run("backup", source)
        shut = home / "shut"
        shut.mkdir(mode=0o755)
        run("restore", "latest", "--to", shut / "target", code=1)
        for folder, _, _ in os.walk(run.repository):
            os.chown(folder, 0, 0)
            os.chmod(folder, 0o755)
        outcome = run("backup", source, code=1)
        assert "permission" in outcome.stderr.lower()
        run("restore", "latest", "--to", home / "target", code=3 if os.geteuid() else 0)
        run.repository.chmod(0o700)
        outcome = run("ls", code=1)
        assert "permission" in outcome.stderr.lower()


def test_newer_version(stage: Stage) -> None:
    stage.reset()
    config = stage.run.repository / "config"
    data = config.read_bytes()
    put_in_place(config, data.replace(b'"version":0', b'"version":7').replace(b'"hash"', b'"later":[1],"hash"'))
    for command in (["ls"], ["check"], ["check", "--packs"], ["backup", str(stage.source)]):
        outcome = stage.run(*command, codes=(1,))
        assert "version 7" in outcome.stderr
        assert "newer version" in outcome.stderr


def test_config_of_absurd_size(stage: Stage) -> None:
    stage.reset()
    config = stage.run.repository / "config"
    head = config.read_bytes()[:50]
    put_in_place(config, head)
    os.truncate(config, 1 << 40)
    stage.run("ls", codes=(1,))


def test_never_in_clear(stage: Stage) -> None:
    """A config that says there is no encryption, its own id or a new one: no upload, whatever else is kept."""
    stage.reset()
    stage.run("backup", stage.source, "--workers", "1")
    config = stage.run.repository / "config"
    original = config.read_bytes()
    decoded = msgspec.json.decode(original, type=Config)
    keys = {"encryption": "none", "id_key": "11" * 32, "chunker_key": "22" * 32}
    same_id = config_bytes(msgspec.structs.replace(decoded, **keys))
    elsewhere = stage.home / "clear"
    elsewhere.mkdir(exist_ok=True)
    clear = fault_harness.create(elsewhere, encrypted=False).repository / "config"
    (stage.source / "secret").write_bytes(b"never in clear" * 1000)
    try:
        for planted in (same_id, clear.read_bytes()):
            put_in_place(config, planted)
            before = len(objects(stage.run.repository, "packs"))
            for environment in ({}, {"COFFRET_PASSPHRASE": PASSPHRASE}):
                Here(stage.home)("backup", stage.source, codes=(1,), environment=environment)
            assert len(objects(stage.run.repository, "packs")) == before
    finally:
        (stage.source / "secret").unlink()
    put_in_place(config, original)
    stage.run("check")


@pytest.mark.parametrize("how", ["rolled back", "swapped for a clone"])
def test_other_state_of_the_repository(tmp_path: Path, how: str) -> None:
    """With the same cache the next backup stores all that this state of the repository lacks."""
    run = fault_harness.create(tmp_path, encrypted=False)
    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    early, late = tmp_path / "early", tmp_path / "late"
    if how.startswith("rolled"):
        run("backup", source, "--workers", "1")
    shutil.copytree(run.repository, early)
    (source / "second").write_bytes(os.urandom(300_000))
    run("backup", source, "--workers", "1")
    (source / "third").write_bytes(os.urandom(300_000))
    run("backup", source, "--workers", "1")
    run.repository.rename(late)
    early.rename(run.repository)
    run("backup", source, "--workers", "1")
    run("check")
    run("restore", "latest", "--to", tmp_path / "target")
    assert contents(tmp_path / "target") == contents(source)
    # And back again.
    run.repository.rename(early)
    late.rename(run.repository)
    (source / "fourth").write_bytes(os.urandom(300_000))
    run("backup", source, "--workers", "1")
    run("check")
    run("restore", "latest", "--to", tmp_path / "target2")
    assert contents(tmp_path / "target2") == contents(source)


@pytest.mark.parametrize("level", ["as it is", "with tracebacks"])
def test_secrets_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """An unexpected error deep inside, with tracebacks asked for: neither passphrase nor keys are in the output."""
    from coffret.engine import keys

    run = fault_harness.create(tmp_path)
    found = []
    unlock = keys.unlock

    def broken(*arguments: object) -> object:
        found.append(unlock(*arguments)[1])  # type: ignore[arg-type]
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(keys, "unlock", broken)
    with run._surroundings({} if level == "with tracebacks" else {"COFFRET_TRACEBACK": ""}) as (out, err):
        assert cli.run(["ls"]) == 1
    shown = (out.getvalue() + err.getvalue()).decode()
    assert ("Traceback" in shown) == (level == "with tracebacks")
    for secret in (found[0].data_key, found[0].id_key, found[0].chunker_key):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
    assert PASSPHRASE not in shown


def test_swapped_where_nothing_can_be_remembered(tmp_path: Path) -> None:
    """An encrypted storage swapped for one without encryption, no passphrase in the environment: nothing is written."""
    run = fault_harness.create(tmp_path)
    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    (tmp_path / "no folder").touch()
    shut = {"XDG_STATE_HOME": str(tmp_path / "no folder")}
    run("backup", source, "--workers", "1", environment=shut)
    run.repository.rename(tmp_path / "encrypted")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fault_harness.create(elsewhere, encrypted=False).repository.rename(run.repository)
    before = sorted(run.repository.rglob("*"))
    clear = Here(tmp_path, shut)
    outcome = clear("backup", source, "--workers", "1", codes=(1,))
    assert "--expect-id" in outcome.stderr
    assert "XDG_STATE_HOME" in outcome.stderr
    assert sorted(run.repository.rglob("*")) == before
    clear("ls")  # reading goes on
    repository_id = msgspec.json.decode((run.repository / "config").read_bytes(), type=Config).repository_id
    clear("--expect-id", repository_id, "backup", source, "--workers", "1")


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service, say: it is told what to do, and no directory called "~" is made."""
    run = fault_harness.create(tmp_path, encrypted=False)
    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    for folder in ("state", "cache"):
        monkeypatch.setattr(f"platformdirs.user_{folder}_path", lambda *_, **__: PosixPath("~/folder"))
    monkeypatch.chdir(tmp_path)
    homeless = Here(tmp_path)
    outcome = homeless("backup", source, "--workers", "1", codes=(1,))
    assert "--expect-id" in outcome.stderr
    assert "XDG_STATE_HOME" in outcome.stderr
    assert not objects(run.repository, "packs")
    repository_id = msgspec.json.decode((run.repository / "config").read_bytes(), type=Config).repository_id
    homeless("--expect-id", repository_id, "backup", source, "--workers", "1")
    assert not (tmp_path / "~").exists()


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
