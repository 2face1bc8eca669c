"""A snapshot goes from storage to storage, of every kind, and is the same at the end."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from tests.fault_harness import contents, make_source
from tests.harness import Program
from tests.server.serving import Serving
from tests.test_storages import s3, sftp

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_through_every_kind_of_storage(tmp_path: Path) -> None:
    """Local, without encryption → SQLite → SFTP → S3 → another host → local: each with keys of its own."""
    source = make_source(tmp_path / "source", files=60, large_bytes=5 << 20)
    with ExitStack() as stack:
        serving = stack.enter_context(Serving(tmp_path / "host"))
        nas, bucket = sftp(), s3(tls=False)
        environment = {
            **bucket.environment,
            **nas.environment,
            "COFFRET_SERVER_TOKEN": serving.token(),
            "COFFRET_PASSPHRASE": "correct horse",
            "COFFRET_PEER_PASSPHRASE": "correct horse",
        }
        program = Program(tmp_path, environment=environment)
        locations = [f"sqlite://{tmp_path}/copy.db", nas.url, bucket.url, serving.url, str(tmp_path / "last")]
        first = str(tmp_path / "first")
        unset = {name: value for name, value in environment.items() if name != "COFFRET_PASSPHRASE"}
        clear = Program(tmp_path, environment=unset)
        clear("at", first, "create", "--no-encryption")
        made = clear("at", first, "backup", "--json", source).summary["snapshot_id"]
        for number, location in enumerate(locations):
            program("at", location, "create")
            reader, origin = (program, locations[number - 1]) if number else (clear, first)
            assert reader("at", origin, "sync", "to", location).stdout == "sync: synchronized 1 snapshot\n"
            assert program("at", location, "check", "--json").summary["clean"]
        # Asked again, each is told to have all: by lists of snapshots, whatever there is of packs.
        for here, there in itertools.pairwise(locations):
            outcome = program("at", here, "sync", "with", there, "--json")
            assert outcome.summary["snapshots"] == 0
            assert sum(calls["calls"] for calls in outcome.summary["storage"].values()) <= 8
        program("at", locations[-1], "restore", "--to", tmp_path / "back", made)
        assert contents(tmp_path / "back") == contents(source)
