"""Pins: which repositories this user has met at which location, so that another one put in their place is noticed.

    <state folder>/pins/<hash of the location>.json
        {"location": …, "accepted": [[repository id, encryption, config hash]], "opened_by": a `SlotHint`}
    <state folder>/pins/<hash of location and repository id>.seen    the snapshots that were there: `engine/seen.py`

A location may have several repositories, such as USB disks mounted in turn at one place: each is accepted once. The
files are this user's alone, replaced whole and durably, and changed under a lock that all processes of the user share.

Everything here blocks for a few milliseconds: call it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from coffret.connectors.localfiles import sync_folder
from coffret.engine.errors import CoffretError, RepositoryChanged

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The folders below the state folder, by what their files are about.
KINDS = ("pins", "seen", "server")
_MAX_FILE_BYTES = 1 << 20
_ACCEPT = "if that is intended, accept it with --expect-id {}; otherwise do not trust this storage"


class Pin(msgspec.Struct, frozen=True, array_like=True):
    """A repository as it was accepted: id (hex), whether it is encrypted, hash of its config (hex)."""

    repository_id: str
    encrypted: bool
    config_hash: str


class SlotHint(msgspec.Struct, frozen=True, array_like=True):
    """The key slot that opened a repository last: id (hex, "" if none did), salt, memory in KiB, passes, lanes.

    With it the passphrase's keys can be derived while the slot is on its way. It lets nobody try a passphrase.
    """

    slot: str = ""
    salt: bytes = b""
    memory_kib: int = 0
    passes: int = 0
    lanes: int = 0


class _Location(msgspec.Struct):
    """The content of a pins file. `opened_by`: what opened the repository last."""

    location: str
    accepted: list[Pin]
    opened_by: SlotHint = SlotHint()


def state_folder() -> Path:
    """The user's state folder for this program: $XDG_STATE_HOME/coffret, or ~/.local/state/coffret."""
    from platformdirs import user_state_path  # 12 to 25 ms: not for those who only want the version

    return user_state_path("coffret", appauthor=False)


def check(
    location: str,
    repository_id: str,
    encrypted: bool,
    config_hash: bytes,
    expect_id: str | None = None,
    *,
    pin: bool = True,
    writing: bool = False,
    folder: Path | None = None,
) -> str:
    """Compare the repository found at `location` with what was accepted there, and remember it at first use.

    Without `pin` it is compared only: to be done before a passphrase is asked for, and once more with `pin` when the
    passphrase has opened it, so that what does not open is not remembered. `folder` replaces the user's state folder.

    Returns a note for the user, or "". Where nothing can be remembered, reading goes on; so does writing to a
    repository with encryption, since its passphrase proves the config, or where `expect_id` does.

    :raises RepositoryChanged: if it is not the one that was here, or not the one expected, or if data might be written
        in clear where nothing can be remembered
    :raises CoffretError: if the file that remembers is damaged
    """
    found = Pin(repository_id, encrypted, config_hash.hex())
    check_expected(location, repository_id, expect_id)
    try:
        path = file_of(location, "pins", folder)
        if _decide(location, _read(path).accepted, found, expect_id) or not pin:
            return ""
        with locked(path.parent):
            # Decided anew: another process may have met another repository here meanwhile.
            known = _read(path)
            if not _decide(location, known.accepted, found, expect_id):
                shown = location.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                _write(path, _Location(shown, [*known.accepted, found], known.opened_by))
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        note = f"this machine can't remember the repository to notice if another takes its place: {reason}"
        if writing and not encrypted and expect_id is None:
            raise RepositoryChanged(
                f"{note}; nothing is written in clear without certainty about that",
                remedy=f"set XDG_STATE_HOME to a folder that can be written to, or say --expect-id {repository_id}",
            ) from None
        return note
    return ""


def check_expected(location: str, repository_id: str, expect_id: str | None) -> None:
    """Compare the repository found with the one that is expected, if one is.

    :raises RepositoryChanged: if it is another
    """
    if expect_id is not None and expect_id.strip().lower() != repository_id:
        raise RepositoryChanged(
            f"{location} holds repository {repository_id}, not the one expected, {expect_id.strip()}",
            remedy="check the location; if the repository is the right one, expect its id",
        )


def remember(
    location: str, repository_id: str, encrypted: bool, config_hash: bytes, *, folder: Path | None = None
) -> str:
    """Accept a repository that was just created at `location`, beside others met there; return a note, or "".

    :raises CoffretError: if the file that remembers is damaged
    """
    return check(location, repository_id, encrypted, config_hash, repository_id, folder=folder)


def likely_slot(location: str, folder: Path | None = None) -> SlotHint:
    """The key slot that opened the repository at a location last, as a hint; an empty one if none is known."""
    try:
        return _read(file_of(location, "pins", folder)).opened_by
    except (CoffretError, OSError):
        return SlotHint()


def remember_slot(location: str, slot: SlotHint, folder: Path | None = None) -> None:
    """Keep for `likely_slot`, if it can be, which key slot has opened the repository that is known at a location."""
    with contextlib.suppress(CoffretError, OSError):
        path = file_of(location, "pins", folder)
        if _read(path).opened_by == slot:
            return
        with locked(path.parent):
            if (known := _read(path)).accepted:
                _write(path, msgspec.structs.replace(known, opened_by=slot))


def _decide(location: str, accepted: list[Pin], found: Pin, expect_id: str | None) -> bool:
    """Whether this repository is known here; False if it is to be accepted now.

    :raises RepositoryChanged: if it is neither
    """
    if found in accepted:
        return True
    if any(pin.repository_id == found.repository_id for pin in accepted):
        raise RepositoryChanged(
            f"the config of the repository at {location} is not the one it had when it was last used",
            remedy="do not trust this storage; put back the config from a recovery file or an earlier copy",
        )
    if accepted and expect_id is None:
        was = "an encrypted" if any(pin.encrypted for pin in accepted) else "a"
        now = "an encrypted one" if found.encrypted else "one without encryption"
        raise RepositoryChanged(
            f"{location} had {was} repository, {accepted[-1].repository_id}; now it has another, {now}: "
            f"{found.repository_id}",
            remedy=_ACCEPT.format(found.repository_id),
        )
    return False


def file_of(location: str, kind: str, folder: Path | None = None) -> Path:
    """The file of a kind that belongs to a repository's location; `folder` replaces the user's state folder.

    :raises FileNotFoundError: if the user has none
    """
    name = blake3(location.encode("utf-8", "surrogateescape")).hexdigest(length=16)
    folder = folder or state_folder()
    if not folder.is_absolute():  # a literal "~"
        raise FileNotFoundError(errno.ENOENT, "this user has no home directory", str(folder))
    return folder / kind / f"{name}.json"


def _write(path: Path, content: _Location) -> None:
    """Replace a pins file. Call under the lock."""
    replace_durably(path, msgspec.json.encode(content) + b"\n")


def _read(path: Path) -> _Location:
    """What is known of a location; nothing is accepted there if there is no file.

    :raises CoffretError: if the file is damaged: to take that for a first use would accept anything
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        return _Location("", [])
    try:
        known = msgspec.json.decode(data, type=_Location)
    except (ValueError, RecursionError):
        known = _Location("", [])
    if not known.accepted:
        raise CoffretError(
            f"{path} is damaged; it says which repositories were used at this location",
            remedy="check the repository's id, delete that file, and say --expect-id ID once",
        )
    return known


def make_private(folder: Path) -> None:
    """Make a folder of this user's alone, and the program's own above it, if they are missing."""
    if not folder.parent.exists():
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from changing what lies in a folder, which is made if need be."""
    make_private(folder)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file of this user's alone, durably: whole or not at all. Call under the lock of its folder."""
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    fresh.replace(path)
    sync_folder(path.parent)
