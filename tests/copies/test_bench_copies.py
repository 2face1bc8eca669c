"""The benchmark of copies runs, at a two-thousandth of its size; no time is asserted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import copies, report
from bench.bars import CLONE
from bench.results import Measurement, read

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_clone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    copies.main(["--dir", str(tmp_path), "--scale", "0.0005", "--rounds", "2", "--results", str(results)])
    lines = [line for line in read(results) if isinstance(line, Measurement)]
    assert [(line.scenario, line.contender, len(line.wall_s), line.faults) for line in lines] == [
        (CLONE, "coffret", 2, []),
        (CLONE, "cp", 2, []),
    ]
    assert lines[0].memory_bytes
    assert (lines[0].repository_bytes or 0) > 500_000
    assert f"{CLONE} / cp, round by round: " in capsys.readouterr().out
    assert not list((tmp_path / "work").iterdir())
    report.main(["--results", str(results), "--scale", "0.0005"])  # has tables for others; must not stumble over these
