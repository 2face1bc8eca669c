"""The benchmarks, at a tiny scale and untimed: that they measure what they say, and put back what they change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest
from bench import report, run
from bench.bars import BARS, OURS, Bar, Kind, judge
from bench.changes import one_percent, undo
from bench.compare import differences
from bench.contenders import available
from bench.datasets import NAMES, Dataset, load
from bench.dedup import measure_dedup
from bench.edits import EditedTree
from bench.measure import Command, CommandFailed, sync_filesystem
from bench.measure import run as run_command
from bench.memory import MemorySampler, tree_memory
from bench.primitives import significant
from bench.results import Dedup, Measurement, Primitives, Run, append, read, spread, this_run
from bench.scenarios import Scenario
from bench.tables import markdown, plain
from bench.trees import Tally, TreeCopier, units

SCALE = 0.0005
CONTENDERS = [contender.name for contender in available() if contender.name in ("coffret", "tar")]
needs_contenders = pytest.mark.skipif(CONTENDERS != ["coffret", "tar"], reason="needs coffret, tar and zstd on PATH")


def _python(script: str, folder: Path) -> Command:
    return Command((sys.executable, "-c", script), dict(os.environ), folder)


def _line(run_id: str, contender: str, wall_s: list[float | None], dataset: Dataset | None = None) -> Measurement:
    described = Run(run_id, "", "", {})
    return Measurement(
        run=described, dataset=dataset, scenario="first", contender=contender, version="", command="", wall_s=wall_s
    )


def _dataset(name: str = "big") -> Dataset:
    return Dataset(name, "/nowhere", 1, 1.0, 1000, 10, 10**6, 10**6, False)


@pytest.mark.parametrize("name", NAMES)
def test_a_generated_data_set_depends_on_its_seed_alone(name: str, tmp_path: Path) -> None:
    one, again, other = (load(name, tmp_path / str(i), scale=SCALE, seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert differences(one.path, again.path) == []
    assert differences(one.path, other.path)
    paths = list(one.path.rglob("*"))
    assert one.files == sum(path.is_file() for path in paths)
    assert one.directories == 1 + sum(path.is_dir() for path in paths) if name != "small" else one.directories > 0
    assert one.size_bytes == sum(path.stat().st_size for path in paths if path.is_file())


def test_a_data_set_is_built_once(tmp_path: Path) -> None:
    built = load("big", tmp_path, scale=SCALE)
    (built.path / "random-1.bin").unlink()
    assert load("big", tmp_path, scale=SCALE) == built
    assert not (built.path / "random-1.bin").exists()


def test_units_cover_a_tree_once_and_are_copied_without_hard_links(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(60):
        place = source / f"a{number % 3}" / f"b{number % 5}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file{number}").write_bytes(b"%d" % (number // 2))
    os.link(source / "a0" / "b0" / "file0", source / "a0" / "linked")
    (source / "a1" / "symlink").symlink_to("b1")
    copier = TreeCopier(tmp_path / "copy")
    copier.target.mkdir()
    cut = units([source], "seed", most_files=7)
    for unit in cut:
        copier.copy(unit)
    copy = copier.target / source.relative_to("/")
    assert len(cut) > 3
    assert differences(source, copy) == []
    assert all(path.stat().st_nlink == 1 for path in copy.rglob("*") if path.is_file())
    assert copier.tally.files == 61
    assert copier.tally.unique_bytes < copier.tally.size_bytes


def test_what_is_missing_is_generated(tmp_path: Path) -> None:
    copier, goal = TreeCopier(tmp_path), Tally(files=40, directories=9, size_bytes=50_000)
    copier.generate(goal, "seed")
    assert copier.tally.reached(goal)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == copier.tally.files


@pytest.mark.parametrize("name", ["big", "small"])
def test_one_percent_is_changed_and_put_back(name: str, tmp_path: Path) -> None:
    dataset = load(name, tmp_path, scale=0.009 if name == "big" else SCALE)
    before = tmp_path / "before"
    shutil.copytree(dataset.path, before)
    times = {path: path.stat().st_mtime_ns for path in dataset.path.rglob("*") if path.is_file()}
    with one_percent(dataset, "seed") as places:
        assert places >= 1
        assert differences(before, dataset.path)
    assert differences(before, dataset.path) == []
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_changes_of_a_run_that_was_killed_are_put_back_later(tmp_path: Path) -> None:
    dataset = load("small", tmp_path, scale=SCALE)
    before = tmp_path / "before"
    shutil.copytree(dataset.path, before)
    script = (
        "import os; from pathlib import Path; from bench.changes import one_percent; from bench.datasets import load\n"
        f"with one_percent(load('small', Path({str(tmp_path)!r}), scale={SCALE}), 'seed'): os._exit(9)"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 9
    assert differences(before, dataset.path)
    undo(dataset)
    assert differences(before, dataset.path) == []


def test_differences_tell_what_a_restore_left_out(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "folder").mkdir(parents=True)
        (tmp_path / name / "same").write_text("same")
        (tmp_path / name / "link").symlink_to("same")
    one, two = tmp_path / "one", tmp_path / "two"
    assert differences(one, two) == []
    (two / "extra").touch()
    assert differences(one, two) == ["extra: not in the source"]
    (two / "same").write_text("else")
    (two / "link").unlink()
    (two / "folder").chmod(0o700)
    assert set(differences(one, two)) == {
        "folder: another mode", "same: another content", "link: missing", "extra: not in the source",
    }  # fmt: skip


def test_edits_depend_on_the_seed_alone(tmp_path: Path) -> None:
    sample = load("small", tmp_path, scale=SCALE).path
    trees = [EditedTree(tmp_path / str(i), seed, scale=0.01, sample=sample) for i, seed in enumerate((1, 1, 2))]
    versions = [tmp_path / "version0"]
    shutil.copytree(trees[0].root, versions[0])
    for tree in trees:
        tree.advance()
        tree.advance()
    assert differences(trees[0].root, trees[1].root) == []
    assert differences(trees[0].root, trees[2].root)
    assert differences(trees[0].root, versions[0])


def test_memory_of_a_process_tree_counts_what_is_shared_once(tmp_path: Path) -> None:
    script = (
        "import mmap, os, sys, time\n"
        "shared = mmap.mmap(-1, 64 << 20); shared.write(bytes(64 << 20))\n"
        "if os.fork(): print('ready', flush=True); sys.stdin.read(); os.wait()\n"
        "else: shared.seek(0); shared.read(); sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, cwd=tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        now = tree_memory(process.pid)
        with MemorySampler(process.pid, every_s=0.001) as sampler:
            while sampler.samples == 0:
                pass
        process.stdin.close()
    assert now.processes == 2
    assert 64 << 20 <= now.asked < 128 << 20
    assert sampler.peak.asked >= 64 << 20
    assert tree_memory(process.pid).processes == 0


def test_a_command_is_measured_with_its_children(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**7))']); print('done')"
    usage = run_command(_python(script, tmp_path), tmp_path / "log", sample=True, sync_on=tmp_path)
    assert usage.output == "done\n"
    assert usage.user_s > 0.05
    assert usage.memory is not None
    assert usage.memory.processes >= 1


@pytest.mark.parametrize(("script", "reason"), [("exit(3)", "exit code 3"), ("while True: pass", "not done after")])
def test_a_command_that_fails_or_hangs_is_told(script: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=reason):
        run_command(_python(script, tmp_path), tmp_path / "log", sample=False, timeout_s=0.5)


def test_syncing_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    sync_filesystem(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_filesystem(tmp_path / "nothing")


def test_a_bar_takes_the_median_of_ratios_of_the_newest_run_that_compares() -> None:
    bar, dataset = Bar("big", "first", Kind.TIME_RATIO, 0.75, "tar"), _dataset()
    lines = [
        _line("1", "coffret", [9.0], dataset),
        _line("1", "tar", [1.0], dataset),
        _line("2", "coffret", [1.0, 8.0, None, 3.0], dataset),
        _line("2", "tar", [2.0, 4.0, 1.0, 10.0], dataset),
        _line("3", "coffret", [1.0], dataset),
    ]
    verdict = judge(bar, lines)
    assert (verdict.value, verdict.rounds, verdict.reached) == (0.5, 3, True)
    assert verdict.run is not None
    assert verdict.run.run == "2"
    assert judge(bar, lines[-1:]).value is None
    assert not judge(bar, lines[:2]).reached


def test_bars_on_sizes_memory_entries_and_edits() -> None:
    big, million = _dataset(), _dataset("million")
    ours, theirs = _line("1", "coffret", [0.00404], big), _line("1", "rustic", [1.0], big)
    ours.repository_bytes, theirs.repository_bytes = 103, 100
    ours.memory_bytes = 400_000_000
    unchanged = _line("1", "coffret", [0.00404], million)
    unchanged.scenario = "unchanged"
    stored: dict[str, list[int | None]] = {"coffret": [11, 10, None], "rustic": [10, 10, 10]}
    edits = [
        Dedup(
            run=ours.run, seeds=[1, 2, 3], versions=10, contender=name, version="", first_bytes=[], stored_bytes=sizes
        )
        for name, sizes in stored.items()
    ]
    values = {bar: judge(bar, [ours, theirs, unchanged, *edits]).value for bar in BARS}
    found = {(bar.dataset, bar.kind): value for bar, value in values.items() if value is not None}
    assert found == {
        ("big", Kind.SIZE_RATIO): 1.03,
        ("big", Kind.MEMORY_MB): 400,
        ("million", Kind.ENTRY_US): pytest.approx(4.0),
        ("edits", Kind.SIZE_RATIO): pytest.approx(1.05),
    }


def test_tables_are_aligned_and_marked_up() -> None:
    rows = [["a", "1"], ["long name", "22|"]]
    assert plain(["name", "s"], rows).splitlines()[2:] == ["a            1", "long name  22|"]
    assert markdown(["name", "s"], rows).splitlines()[1:3] == ["| --- | ---: |", "| a | 1 |"]


def test_a_bound_too_small_to_be_told_is_left_out() -> None:
    small = msgspec.structs.replace(_line("1", OURS, [0.5], _dataset()), wall=spread([0.5]))
    costs = Primitives(
        run=small.run,
        dataset=_dataset(),
        megabytes_per_s={},
        microseconds={},
        stored_share=1.0,
        bounds_s={"first": 0.000246, "unchanged": 0.0},
    )
    other = msgspec.structs.replace(small, scenario="unchanged")
    *_, row = report.bounds_table([small, other, costs], 1.0).splitlines()
    assert row == "| big: first | 0.000246 | 0.50 | 2032.52 |"


def test_bounds_keep_their_digits() -> None:
    assert [significant(bound) for bound in (0.000246481, 12.3456, 0.0)] == [0.000246, 12.3, 0.0]


@needs_contenders
def test_a_run_measures_every_scenario_and_is_reported(tmp_path: Path) -> None:
    results, readme, svg = tmp_path / "results.jsonl", tmp_path / "README.md", tmp_path / "report.svg"
    scenarios = [scenario for scenario in Scenario if scenario is not Scenario.COLD]
    arguments = ["--dir", tmp_path, "--scale", SCALE, "--rounds", 1, "--only", ",".join(CONTENDERS),
                 "--scenarios", ",".join(scenarios), "--results", results, "version", "primitives",
                 "small"]  # fmt: skip
    run.main([str(argument) for argument in arguments])
    lines = read(results)
    measured = {(line.scenario, line.contender): line for line in lines if isinstance(line, Measurement)}
    assert set(measured) == {
        ("version", "coffret"), ("first", "tar"), ("restore", "tar"),
        *((str(scenario), "coffret") for scenario in scenarios),
    }  # fmt: skip
    assert [line.faults for line in measured.values()] == [[]] * len(measured)
    assert all(line.wall is not None and None not in line.wall_s for line in measured.values())
    assert all(line.memory_bytes for key, line in measured.items() if key[1] == "coffret" and key[0] != "version")
    assert measured["first", "coffret"].repository_bytes
    assert measured["first", "coffret"].summary["message_type"] == "summary"
    assert measured["unchanged", "coffret"].summary["bytes_read"] == 0
    assert (
        0
        < measured["one-percent", "coffret"].summary["bytes_read"]
        < measured["first", "coffret"].summary["bytes_read"]
    )
    assert sum(isinstance(line, Primitives) for line in lines) == len(NAMES)
    assert list((tmp_path / "work").iterdir()) == []

    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    report.main(["--results", str(results), "--scale", str(SCALE), "--into", str(readme), "--svg", str(svg)])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert "| small: first | tar's | ≤ 0.80 × |" in text
    titles = [element.text for element in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "small: restore, seconds" in titles


@needs_contenders
def test_versions_of_an_edited_tree_share_what_they_have_in_common(tmp_path: Path) -> None:
    lines = measure_dedup(
        this_run(tmp_path), available(["coffret"]), tmp_path / "work", [1], scale=0.02, versions=3, tell=lambda _: None
    )
    append(tmp_path / "results.jsonl", lines)
    assert read(tmp_path / "results.jsonl") == lines
    first, last = lines[0].first_bytes[0], lines[0].stored_bytes[0]
    assert lines[0].faults == []
    assert first is not None
    assert last is not None
    assert first < last < 3 * first


@needs_contenders
def test_a_contender_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "borg").write_text('#!/bin/sh\n[ "$1" = --version ] || { echo no luck; exit 2; }\n')
    (folder / "borg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    results = tmp_path / "results.jsonl"
    arguments = ["--dir", tmp_path, "--scale", SCALE, "--rounds", 1, "--no-memory", "--only", "borg,tar",
                 "--scenarios", "first,restore", "--results", results, "big"]  # fmt: skip
    run.main([str(argument) for argument in arguments])
    by_name = {line.contender: line for line in read(results) if isinstance(line, Measurement)}
    assert by_name["borg"].wall_s == [None]
    assert "no luck" in by_name["borg"].faults[0]
    assert by_name["tar"].wall is not None
    assert "failed" in capsys.readouterr().out
