"""A repository with one object of each kind that can be put back as it was."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import anyio
from tests import fault_harness
from tests.fault_harness import PASSPHRASE, Here, contents, make_source, replace_tree

from coffret.engine import sealing
from coffret.engine.attempt import Lease
from coffret.engine.opening import open_repository
from coffret.engine.records import Mark, Removal, encode
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from pathlib import Path


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
        f"removed/{os.urandom(16).hex()}-{attempt.hex()}": (sealing.REMOVED, encode(Removal("host", "me", 1))),
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
        """The repository as it was, a cache that knows nothing, and a user who has seen nothing."""
        fault_harness.forget_seen(self.home)
        replace_tree(self.kept, self.run.repository)
        shutil.rmtree(self.home / "cache", ignore_errors=True)
        shutil.rmtree(self.home / "target", ignore_errors=True)

    def restored(self, *codes: int) -> dict[str, bytes | str]:
        """What a restore of the latest snapshot brings, with one of these exit codes."""
        target = self.home / "target"
        shutil.rmtree(target, ignore_errors=True)
        self.run("restore", "latest", "--to", target, codes=codes)
        return contents(target)
