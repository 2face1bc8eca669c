"""Pins: another repository at a known location is noticed, whatever is in its place and however state is stored."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import coffret
from coffret.engine import state
from coffret.engine.errors import CoffretError, RepositoryChanged

ONE, TWO, THREE = "11" * 32, "22" * 32, "33" * 32
HASH, OTHER_HASH = b"h" * 32, b"o" * 32
HERE = "sftp://host/backups"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not yet" / "state"


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder that nobody can make, root included."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "state"


def test_first_use_is_remembered(folder: Path) -> None:
    assert state.check(HERE, ONE, True, HASH, folder=folder) == ""
    assert state.check(HERE, ONE, True, HASH, folder=folder) == ""
    with pytest.raises(RepositoryChanged, match=f"{HERE} had an encrypted repository, {ONE}; now it has another") as e:
        state.check(HERE, TWO, False, HASH, folder=folder)
    assert "one without encryption" in str(e.value)
    assert f"--expect-id {TWO}" in e.value.remedy


def test_folders_are_private(tmp_path: Path) -> None:
    """The program's own, too, in which they lie."""
    folder = tmp_path / "state" / "coffret"
    state.check(HERE, ONE, True, HASH, folder=folder)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (folder, folder / "pins")] == [0o700, 0o700]


def test_compared_only(folder: Path) -> None:
    state.check(HERE, ONE, True, HASH, pin=False, folder=folder)
    state.check(HERE, TWO, True, HASH, folder=folder)
    with pytest.raises(RepositoryChanged):
        state.check(HERE, ONE, True, HASH, pin=False, folder=folder)


def test_the_slot_that_opened_it(folder: Path, unwritable: Path) -> None:
    """A hint: known where the repository is, and nothing else changes with it."""
    a_slot, another, none = state.SlotHint("a slot", b"salt", 8, 2, 1), state.SlotHint("another"), state.SlotHint()
    state.remember_slot(HERE, a_slot, folder=folder)
    assert state.likely_slot(HERE, folder=folder) == none
    state.check(HERE, ONE, True, HASH, folder=folder)
    state.remember_slot(HERE, a_slot, folder=folder)
    assert state.likely_slot(HERE, folder=folder) == a_slot
    assert state.likely_slot("elsewhere", folder=folder) == none
    state.check(HERE, TWO, True, HASH, TWO, folder=folder)
    assert state.likely_slot(HERE, folder=folder) == a_slot
    state.remember_slot(HERE, another, folder=folder)
    assert state.likely_slot(HERE, folder=folder) == another
    assert state.check(HERE, ONE, True, HASH, folder=folder) == ""
    state.remember_slot(HERE, a_slot, folder=unwritable)
    assert state.likely_slot(HERE, folder=unwritable) == none


def test_refused_is_not_remembered(folder: Path) -> None:
    state.check(HERE, ONE, True, HASH, folder=folder)
    for _ in range(2):
        with pytest.raises(RepositoryChanged):
            state.check(HERE, TWO, True, HASH, folder=folder)


@pytest.mark.parametrize(("encrypted", "config_hash"), [(False, HASH), (True, OTHER_HASH), (False, OTHER_HASH)])
@pytest.mark.parametrize("expect_id", [None, ONE])
def test_known_id_with_another_config(folder: Path, encrypted: bool, config_hash: bytes, expect_id: str | None) -> None:
    state.check(HERE, ONE, True, HASH, folder=folder)
    with pytest.raises(RepositoryChanged, match="not the one it had"):
        state.check(HERE, ONE, encrypted, config_hash, expect_id, folder=folder)
    assert state.check(HERE, ONE, True, HASH, folder=folder) == ""


def test_disks_in_turn_are_accepted_once_each(folder: Path) -> None:
    state.check(HERE, ONE, True, HASH, folder=folder)
    for disk in (TWO, THREE):
        with pytest.raises(RepositoryChanged):
            state.check(HERE, disk, True, HASH, folder=folder)
        state.check(HERE, disk, True, HASH, f" {disk.upper()}\n", folder=folder)
    for disk in (ONE, TWO, THREE) * 2:
        assert state.check(HERE, disk, True, HASH, folder=folder) == ""


def test_not_the_one_expected(folder: Path) -> None:
    with pytest.raises(RepositoryChanged, match="not the one expected"):
        state.check(HERE, ONE, True, HASH, TWO, folder=folder)
    state.check(HERE, ONE, True, HASH, ONE, folder=folder)
    with pytest.raises(RepositoryChanged, match="not the one expected"):
        state.check(HERE, ONE, True, HASH, TWO, folder=folder)


def test_locations_are_apart(folder: Path) -> None:
    state.check(HERE, ONE, True, HASH, folder=folder)
    assert state.check(f"{HERE}2", TWO, True, HASH, folder=folder) == ""
    assert state.check("file:///b\udcff", TWO, True, HASH, folder=folder) == ""
    assert state.check("file:///b\udcff", TWO, True, HASH, folder=folder) == ""


def test_created_beside_what_was_there(folder: Path) -> None:
    state.remember(HERE, ONE, True, HASH, folder=folder)
    assert state.remember(HERE, TWO, False, HASH, folder=folder) == ""
    for repository_id, encrypted in ((ONE, True), (TWO, False)):
        assert state.check(HERE, repository_id, encrypted, HASH, folder=folder) == ""
    with pytest.raises(RepositoryChanged):
        state.check(HERE, THREE, True, HASH, folder=folder)


def test_of_this_user_alone(folder: Path) -> None:
    state.check(HERE, ONE, True, HASH, folder=folder)
    pins = folder / "pins"
    assert stat.S_IMODE(pins.stat().st_mode) == 0o700
    files = list(pins.iterdir())
    assert len(files) == 2 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize("content", [b"", b"{", b'{"location":"x","accepted":[]}', b"\xff" * 100, b"[" * 10_000])
def test_damaged_file_is_no_first_use(folder: Path, content: bytes) -> None:
    state.check(HERE, ONE, True, HASH, folder=folder)
    (file,) = (folder / "pins").glob("*.json")
    file.write_bytes(content)
    for pin in (True, False):
        with pytest.raises(CoffretError, match=r"\.json is damaged") as raised:
            state.check(HERE, ONE, True, HASH, ONE, pin=pin, folder=folder)
        assert str(file) in str(raised.value)
    assert file.read_bytes() == content


def test_left_over_of_a_crash(folder: Path) -> None:
    state.check(HERE, ONE, True, HASH, folder=folder)
    (file,) = (folder / "pins").glob("*.json")
    file.with_suffix(".new").write_bytes(b'{"location":')
    assert state.check(HERE, TWO, True, HASH, TWO, folder=folder) == ""
    assert state.check(HERE, ONE, True, HASH, folder=folder) == ""


def test_nothing_can_be_remembered(unwritable: Path) -> None:
    for encrypted, writing, expect_id in (
        (True, False, None),
        (True, True, None),
        (False, False, None),
        (False, True, ONE),
    ):
        note = state.check(HERE, ONE, encrypted, HASH, expect_id, writing=writing, folder=unwritable)
        assert "can't remember" in note
    assert "can't remember" in state.remember(HERE, ONE, False, HASH, folder=unwritable)


def test_no_upload_in_clear_where_nothing_can_be_remembered(unwritable: Path) -> None:
    with pytest.raises(RepositoryChanged, match="nothing is written in clear") as raised:
        state.check(HERE, ONE, False, HASH, writing=True, folder=unwritable)
    assert "XDG_STATE_HOME" in raised.value.remedy


def test_known_where_nothing_more_can_be_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.check(HERE, ONE, False, HASH, folder=folder)
    monkeypatch.delattr(state, "locked")
    assert state.check(HERE, ONE, False, HASH, writing=True, folder=folder) == ""


def test_one_of_several_threads_is_first(folder: Path) -> None:
    accepted = []
    start = threading.Barrier(8)

    def first(number: int) -> None:
        start.wait()
        try:
            state.check(HERE, f"{number:064x}", True, HASH, folder=folder)
            accepted.append(number)
        except RepositoryChanged:
            pass

    threads = [threading.Thread(target=first, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accepted) == 1
    assert state.check(HERE, f"{accepted[0]:064x}", True, HASH, folder=folder) == ""


def test_nothing_is_lost_between_processes(folder: Path) -> None:
    program = """
import sys
from pathlib import Path
from coffret.engine import state
for n in range(25):
    repository_id = f"{int(sys.argv[2]):032x}{n:032x}"
    state.check(sys.argv[3], repository_id, True, b"h" * 32, repository_id, folder=Path(sys.argv[1]))
"""
    package = str(Path(next(iter(coffret.__path__))).parent)
    running = [
        subprocess.Popen([sys.executable, "-c", program, folder, str(number), HERE], env={"PYTHONPATH": package})
        for number in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    for number in range(3):
        for n in range(25):
            assert state.check(HERE, f"{number:032x}{n:032x}", True, HASH, folder=folder) == ""


def test_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state.state_folder() == tmp_path / "coffret"
    state.check(HERE, ONE, True, HASH)
    assert list((tmp_path / "coffret" / "pins").glob("*.json"))
