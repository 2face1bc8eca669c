"""What lies in the cache and state folders: private to the user, and of no use without the passphrase."""

from __future__ import annotations

import os
import sqlite3
import stat
from typing import TYPE_CHECKING

import anyio
import pytest
from blake3 import blake3
from tests import fault_harness
from tests.fault_harness import PASSPHRASE, Here

from coffret.connectors.local import LocalConnector
from coffret.engine.opening import open_repository
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from pathlib import Path

    from coffret.engine.sealing import Secrets

NAME, CONTENT = "an-unmistakable-name", b"content that is like no other " * 20


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """A repository that counts as one elsewhere, so that everything is kept that ever is, by a user without a umask."""
    monkeypatch.setattr(LocalConnector, "places", property(lambda self: ()))
    before = os.umask(0)
    try:
        run = fault_harness.create(tmp_path)
        source = tmp_path / "source"
        source.mkdir()
        (source / NAME).write_bytes(CONTENT)
        (source / "link").symlink_to(f"{NAME}-target")
        for _ in range(2):
            (source / f"{NAME}-2").write_bytes(os.urandom(1000))
            run("backup", source, "--workers", "1", "--tag", f"{NAME}-tag", "--host", f"{NAME}-host")
        run("ls", "latest")
        run("check")
    finally:
        os.umask(before)
    return run


def secrets(run: Here) -> Secrets:
    options = OpenOptions(cache_dir=run.home / "other", state_dir=run.home / "other")

    async def get() -> Secrets:
        async with open_repository(str(run.repository), passphrase=PASSPHRASE.encode, options=options) as opened:
            return opened.secrets

    return anyio.run(get)


def test_only_the_user_can_enter(run: Here) -> None:
    [folder] = (run.home / "cache" / "coffret").iterdir()
    assert {"manifest", "lock", "stored.db"} <= {path.name for path in folder.iterdir()}
    state = run.home / "state" / "coffret"
    for place in (folder, state / "pins", state / "seen"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        for path in place.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_of_no_use_without_the_passphrase(run: Here) -> None:
    """No name, no content, no key; what is found in it are ids that only keys can make."""
    keys = secrets(run)
    kept = {
        path: path.read_bytes()
        for folder in ("cache", "state")
        for path in (run.home / folder).rglob("*")
        if path.is_file()
    }
    everything = b"".join(kept.values())
    assert blake3(CONTENT, key=keys.id_key).digest() in everything  # that much for how this looks
    hidden = [NAME.encode(), CONTENT[:29], PASSPHRASE.encode(), str(run.home / "source").encode()]
    for key in (keys.data_key, keys.id_key, keys.chunker_key):
        hidden += [key, key.hex().encode()]
    for path, data in kept.items():
        for each in hidden:
            assert each not in data, path
    [stored] = (path for path in kept if path.name == "stored.db")
    connection = sqlite3.connect(stored)
    rows = connection.execute("select name, body from items").fetchall()
    connection.close()
    objects = {str(path.relative_to(run.repository)) for path in run.repository.rglob("*") if path.is_file()}
    assert any(name in objects for name, _ in rows) and any(":" in name for name, _ in rows)
    packs = {path.name: path.read_bytes() for path in (run.repository / "packs").rglob("*") if path.is_file()}
    for name, body in rows:
        pack, _, offset = name.partition(":")
        if offset:  # a block, as it is stored
            assert packs[pack][int(offset) :].startswith(body)
        else:
            assert (run.repository / name).read_bytes() == body


def test_what_is_changed_in_it_is_not_believed(run: Here) -> None:
    [stored] = (run.home / "cache").rglob("stored.db")
    before = run("ls", "-r", "latest:/").stdout
    connection = sqlite3.connect(stored)
    assert connection.execute("update items set body = zeroblob(length(body))").rowcount > 2
    connection.commit()
    connection.close()
    assert run("ls", "-r", "latest:/", codes=(0, 3)).stdout == before
