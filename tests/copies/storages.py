"""Storages in memory under URLs of the tests' own, opened through everything that the program puts around a storage."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from tests.golden.make_repository import PASSPHRASES
from tests.harness import ROOT, Recorder

from coffret.connectors.faults import FaultyConnector
from coffret.connectors.memory import MemoryConnector
from coffret.engine.opening import open_repository
from coffret.engine.ops.check import CheckOptions
from coffret.engine.ops.clone import CloneSummary, clone
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from coffret.connectors.base import Connector

GOLDEN = ROOT / "tests" / "golden" / "version-1"
KINDS = ("packs", "index", "snapshots", "removed", "trash", "keys", "config")


class Killed(Exception):
    """What a storage raises when the test kills its user."""


class Places:
    """Storages by URL. `faults[url]`: what a `FaultyConnector` is told there, from the next opening on."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.storages: dict[str, MemoryConnector] = {}
        self.faults: dict[str, Mapping[str, Any]] = {}
        self.opened: dict[str, FaultyConnector] = {}

    def open(self, url: str, options: Mapping[str, str]) -> Connector:
        """In the place of `registry.open_connector`."""
        assert not options
        found = self.storages.setdefault(url, MemoryConnector(url))
        self.opened[url] = FaultyConnector(found, **self.faults.get(url, {}))
        return self.opened[url]

    @property
    def options(self) -> OpenOptions:
        """With folders of its own for each test."""
        return OpenOptions(cache_dir=self.home / "cache", state_dir=self.home / "state")

    def load(self, url: str, folder: Path) -> None:
        """Put the files of a repository's folder there."""
        storage = self.storages.setdefault(url, MemoryConnector(url))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                storage._objects[path.relative_to(folder).as_posix()] = (path.read_bytes(), 0.0)

    def objects(self, url: str) -> dict[str, bytes]:
        """All objects there but leases."""
        found = self.storages[url]._objects
        return {name: data for name, (data, _) in found.items() if not name.startswith("leases/")}

    def set(self, url: str, name: str, data: bytes | None) -> None:
        """Give an object other bytes, or take it away."""
        if data is None:
            del self.storages[url]._objects[name]
        else:
            self.storages[url]._objects[name] = (data, 0.0)

    async def clone(self, source: str, target: str) -> tuple[CloneSummary, Recorder]:
        """Clone, and return what was told too."""
        recorder = Recorder()
        summary = await clone(source, target, options=self.options, progress=recorder)
        return summary, recorder

    async def snapshots(self, url: str, *, fast: bool = True) -> list[str]:
        """The ids of the snapshots there; nothing may be damaged."""
        passphrase = PASSPHRASES[0]
        async with open_repository(url, passphrase=lambda: passphrase, options=self.options) as opened:
            recorder = Recorder()
            summary = await opened.check(None, CheckOptions(fast=fast), recorder)
            assert summary.clean, recorder.faults
            return [snapshot.id for snapshot in (await opened.commits()).snapshots]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """No storages yet."""
    found = Places(tmp_path)
    monkeypatch.setattr("coffret.connectors.registry.open_connector", found.open)
    yield found


def to_copy(objects: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a clone of these objects has: a slot that is logged as removed opens nothing, and is left out."""
    log = b"".join(data for name, data in objects.items() if name.startswith("keys/removed-"))
    removed = {f"keys/{slot.decode()}" for slot in re.findall(rb"[0-9a-f]{64}", log)}
    return {name: data for name, data in objects.items() if name not in removed}
