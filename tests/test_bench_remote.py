"""The remote scenarios run, at a two-thousandth of their size, on real servers; no time is asserted."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench import remote, report, server
from bench.bars import BARS, LOCAL, OURS, STORAGES, UNDELAYED, Kind, judge
from bench.contenders import available
from bench.datasets import Dataset
from bench.remote_proxy import DelayingProxy
from bench.remote_scenarios import PARTS
from bench.remote_servers import SSHD, ServerMissing, versitygw
from bench.results import Measurement, Run, read

if TYPE_CHECKING:
    from collections.abc import Iterator

SCALE = 0.0005


def _require_servers() -> None:
    """Skip the test, or fail in CI, where everything has to be there."""
    reason = "" if SSHD else "no sshd: install openssh-server"
    try:
        versitygw()
    except ServerMissing as error:
        reason = str(error)
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _line(contender: str, scenario: str, wall_s: list[float | None], memory_bytes: int | None = None) -> Measurement:
    dataset = Dataset("small" if "unchanged" in scenario else "big", "/nowhere", 1, 1.0, 1, 1, 1, 1, False)
    return Measurement(
        run=Run("1", "", "", {}), dataset=dataset, scenario=scenario, contender=contender, version="", command="",
        wall_s=wall_s, memory_bytes=memory_bytes,
    )  # fmt: skip


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it is sent, until the client has sent all."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            while data := client.recv(1 << 16):
                client.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    thread.join(10)
    listener.close()


def test_a_proxy_delays_and_keeps_the_order(echo: int) -> None:
    sent, got = os.urandom(3 << 20), bytearray()
    with DelayingProxy(echo, 30) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as client:
        begin = time.monotonic()

        def send() -> None:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while data := client.recv(1 << 16):
            got += data
        sender.join()
        assert bytes(got) == sent
        assert time.monotonic() - begin > 0.12  # a handshake and a round trip: no less, however fast the machine


def test_a_proxy_ends_with_its_parent() -> None:
    script = "from bench.remote_proxy import DelayingProxy\nimport os\nprint(DelayingProxy(1, 0).port)\n"
    root = Path(__file__).parents[1]
    done = subprocess.run(["python3", "-c", script], cwd=root, capture_output=True, text=True, check=True, timeout=30)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(done.stdout))):
                return
        time.sleep(0.05)
    pytest.fail("the proxy is still there")


def test_remote_bars() -> None:
    unchanged = _line(OURS, "s3: unchanged at 50 ms", [1.5, 1.7])
    unchanged.requests = [12, 11]
    lines = [
        _line(OURS, "s3: first", [6.0, 9.0, 6.0], 350_000_000),
        _line("restic", "s3: first", [12.0, 12.0, None]),
        _line(LOCAL, "s3: first", [5.0, 8.0, 4.0], 300_000_000),
        _line("aiobotocore", "s3: first", [4.0, 10.0, None]),
        _line(OURS, "s3: restore at 50 ms", [6.0]),
        _line(UNDELAYED, "s3: restore at 50 ms", [5.0]),
        unchanged,
    ]
    found = {(bar.scenario, bar.kind, bar.against): judge(bar, lines).value for bar in BARS}
    assert {key: value for key, value in found.items() if value is not None} == {
        ("s3: first", Kind.TIME_RATIO, "restic"): pytest.approx(0.625),
        ("s3: first", Kind.TIME_RATIO, f"{LOCAL}|aiobotocore"): pytest.approx(1.05),
        ("s3: first", Kind.MORE_MEMORY_MB, LOCAL): 50,
        ("s3: restore at 50 ms", Kind.TIME_RATIO, UNDELAYED): pytest.approx(1.2),
        ("s3: unchanged at 50 ms", Kind.SECONDS, ""): pytest.approx(1.6),
        ("s3: unchanged at 50 ms", Kind.REQUESTS, ""): 12,
    }
    bars = report.bars_table(lines, 1.0)
    assert "| big: s3: first | coffret, local's or aiobotocore's | ≤ 1.15 × | 1.05 × | yes | 1 |" in bars
    assert "| big: s3: first: memory | coffret, local's | ≤ +100 MB | +50 MB | yes | 1 |" in bars
    # Measurements on this disk are not mixed with these.
    assert "| big: peak of memory |  | ≤ 450 MB | not measured |" in bars
    assert report.newest(lines, 1.0) == {}


@pytest.mark.parametrize(("storage", "parts"), [("s3", "speed,unchanged"), ("sftp", "latency,unchanged,loops")])
def test_remote_scenarios_run(storage: str, parts: str, tmp_path: Path) -> None:
    _require_servers()
    results = tmp_path / "results.jsonl"
    arguments = ["--dir", tmp_path, "--scale", SCALE, "--rounds", 1, "--parts", parts, "--results", results, storage]
    remote.main([str(argument) for argument in arguments])
    lines = [line for line in read(results) if isinstance(line, Measurement)]
    assert [line.faults for line in lines] == [[]] * len(lines)
    assert all(line.wall is not None for line in lines)
    assert not any(line.command.startswith("/") or str(tmp_path) in line.command for line in lines)
    found = {(line.scenario, line.contender): line for line in lines}
    scenarios: dict[str, set[str]] = {}
    for scenario, name in found:
        scenarios.setdefault(scenario.removeprefix(f"{storage}: "), set()).add(name)
    library, restic = STORAGES[storage], {contender.name for contender in available()} & {"restic"}
    assert len(found[f"{storage}: unchanged at 50 ms", OURS].requests) == 1
    if "speed" in parts:
        assert scenarios.keys() == {"first", "restore", "unchanged at 50 ms"}
        assert scenarios["first"] == {OURS, LOCAL, library, *restic}
        assert found[f"{storage}: first", OURS].memory_bytes
        assert found[f"{storage}: first", OURS].repository_bytes
    else:
        assert scenarios["first at 20 ms"] == scenarios["restore at 50 ms"] == {OURS, UNDELAYED}
        assert scenarios["put"] == {"connector", "connector, uvloop", library, f"{library}, uvloop"}
        assert scenarios["get at 20 ms"] == {"connector", "connector, no delay"}
    assert list((tmp_path / "work").iterdir()) == []


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(SystemExit, match="no part 'nothing'"):
        remote.main(["--parts", f"{PARTS[0]},nothing"])


def test_the_server_beside_bare_transfers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    server.main(["--packs", "3", "--pack-mib", "1", "--rounds", "1", "--work", str(tmp_path)])
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told] == ["put", "get", "put", "get"]
    assert "coffret" in told[0]
    assert " of bare (" in told[3]
    assert not list(tmp_path.iterdir())
