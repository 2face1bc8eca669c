"""The load test runs, for some seconds and with fewer clients; and what it looks for it would find."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from bench import load, load_commands
from bench.load_clients import Client
from bench.load_commands import Commands, Host
from bench.remote_servers import ServerMissing, versitygw
from bench.results import Load, read
from tests.connectors.servers import missing
from tests.fault_harness import ROUNDS

if TYPE_CHECKING:
    from pathlib import Path

# CI says a minute for each.
CLIENTS, SECONDS = 3, int(os.environ.get("COFFRET_LOAD_SECONDS", str(5 * ROUNDS)))


@pytest.mark.parametrize(("storage", "more"), [("local", ["--harm"]), ("s3", [])])
def test_clients_and_maintenance(storage: str, more: list[str], tmp_path: Path) -> None:
    if storage == "s3":
        try:
            versitygw()
        except ServerMissing as error:
            missing(str(error))
    results = tmp_path / "results.jsonl"
    size = ["--clients", str(CLIENTS), "--seconds", str(SECONDS)]
    code = load.main(["--storage", storage, *size, *more, "--dir", str(tmp_path), "--results", str(results)])
    [line] = read(results)
    assert isinstance(line, Load)
    assert (code, line.faults) == (0, [])
    assert line.commands["backup"]["done"] + line.commands["backup"]["ended"] >= CLIENTS
    assert line.commands["maintenance"]["done"] >= 1
    assert line.commands["check"]["done"] >= 1
    assert line.restored >= line.snapshots >= 1
    assert not list((tmp_path / "work").iterdir())


def test_a_lost_snapshot_is_told(tmp_path: Path) -> None:
    commands = Commands({}, 0)
    client = Client("a client", Host(tmp_path), commands)
    client.expected = {"1": "its digest", "2": "another"}
    client.doubtful = {"2"}
    client.judge(set(), Host(tmp_path))
    assert commands.faults == ["snapshot 1 of a client is lost"]


def test_other_content_is_told(tmp_path: Path) -> None:
    commands = Commands({"COFFRET_REPOSITORY": str(tmp_path / "repository")}, 0)
    host = Host(tmp_path)
    commands.run(host, "create", "--no-encryption")
    client = Client("a client", host, commands)
    over = threading.Event()
    over.set()
    client.work(over)
    [(made, digest)] = client.expected.items()
    client.judge({made}, host)
    assert not commands.faults
    client.expected[made] = digest[::-1]
    client.judge({made}, host)
    assert commands.faults == [f"snapshot {made} of a client has other content than the tree had"]


def test_what_hangs_or_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands({"COFFRET_REPOSITORY": str(tmp_path / "repository")}, 0)
    assert commands.run(Host(tmp_path), "check") is None
    assert "exit code 10" in commands.faults[0]
    commands.run(Host(tmp_path), "create", "--no-encryption")
    monkeypatch.setattr(load_commands, "_PATIENCE_S", 2.0)
    assert commands.run(Host(tmp_path), "server", "--no-auth", "--listen", "127.0.0.1:0") is None
    assert "hung, -X faulthandler -m coffret in " in commands.faults[1]
    assert "most recent call first" in commands.faults[1]
