"""What commands print, and in which form."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import anyio
from tests import fault_harness
from tests.cli.sources import SNAPSHOT, make_source
from tests.harness import Program

from coffret.connectors.local import LocalConnector
from coffret.engine import check_packs
from coffret.engine.ops import restore

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class TestForms:
    def test_quiet(self, program: Program) -> None:
        for arguments in (["backup", program.home / "source"], ["check"], ["check", "latest"]):
            outcome = program("-q", *arguments)
            assert outcome.stdout + outcome.stderr == ""
        assert re.fullmatch(SNAPSHOT, program("-q", "ls").stdout.splitlines()[0])  # what was asked for

    def test_plain_lines_at_most_one_a_second(self, program: Program) -> None:
        outcome = program("backup", "--stdin-command", "sh -c 'echo 1; sleep 2.5; echo 2'", "--stdin-name", "slow")
        *lines, last = outcome.stdout.splitlines()
        assert not lines
        assert last.startswith("backup: created ")
        told = outcome.stderr.splitlines()
        assert told
        assert all(re.fullmatch(r"backup: (opening|(commit: )?\d files?, [\d.]+ B)", line) for line in told), told

    def test_ls_long(self, program: Program) -> None:
        source = program.home / "source"
        found = program("ls", "-r", f"latest:{source}", code=None)
        if found.code:  # another test's snapshot is the latest
            program("backup", source)
            found = program("ls", "-r", f"latest:{source}")
        line = next(line for line in found.stdout.splitlines() if line.endswith("hosts"))
        assert re.fullmatch(r"-[rwx-]{9} +\S+ +\S+ +20 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ /.*/hosts", line), line

    def test_tag_and_host(self, program: Program) -> None:
        summary = program.backup(program.home / "source", "--tag", "a", "--tag", "b", "--host", "db1")
        found = {item["snapshot_id"]: item for item in program("ls", "--json").of_type("item")}
        assert (found[summary["snapshot_id"]]["tags"], found[summary["snapshot_id"]]["host"]) == (["a", "b"], "db1")

    def test_dry_run_stores_nothing(self, tmp_path: Path) -> None:
        program = Program(tmp_path)
        program("create", "--no-encryption")
        before = sorted(program.repository.rglob("*"))
        outcome = program("backup", "--dry-run", make_source(tmp_path))
        begin, end = "backup: would create an unsigned snapshot of size 27 B in", "2 files of 27 B to read,"
        assert re.fullmatch(rf"{begin} \S+s: {end} [\d.]+ k?B to add\n", outcome.stdout), outcome.stdout
        lines = program("backup", "--dry-run", "-v", tmp_path / "source").stdout.splitlines()
        assert f"backup: new: {tmp_path}/source/hosts" in lines
        assert sorted(program.repository.rglob("*")) == before

    def test_cache_places(self, program: Program, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        program("ls", "--cache-dir", cache)
        assert any(cache.iterdir())
        shutil.rmtree(cache)
        bare = program.with_environment(XDG_CACHE_HOME=str(cache))
        bare("ls", "--no-cache")
        assert not cache.exists()

    def test_restore_without_a_target(self, program: Program, tmp_path: Path) -> None:
        short = program("ls", "--json").messages[0]["short_id"]
        outcome = program("restore", short, cwd=tmp_path)
        assert f" at coffret-{short} completed" in outcome.stdout
        assert (tmp_path / f"coffret-{short}" / "hosts").exists()

    def test_paths_in_a_snapshot(self, program: Program, tmp_path: Path) -> None:
        short = program("ls", "--json").messages[0]["short_id"]
        program("restore", "--to", tmp_path / "one", f"{short}:{program.home}/source/ssh")
        assert os.listdir(tmp_path / "one") == ["config"]
        program("restore", "--to", tmp_path / "two", f"{short}:{program.home}/source/hosts")
        assert os.listdir(tmp_path / "two") == ["hosts"]

    def test_paths_are_normalised(self, program: Program) -> None:
        short = program("ls", "--json").messages[0]["short_id"]
        odd = "/".join(("", *str(program.home).split("/"), ".", "source", "", "ssh", "..", "hosts", ""))
        assert program("ls", f"{short}:{odd}").stdout == program("ls", f"{short}:{program.home}/source/hosts").stdout

    def test_errors_of_a_snapshot(self, tmp_path: Path) -> None:
        """What could not be read is not forgotten when the backup's output is."""
        program, source = Program(tmp_path), make_source(tmp_path)
        program("create", "--no-encryption")
        program("backup", source)
        program("backup", source, "/no/such", "/nor/this", code=3)
        plain, marked = program("ls").stdout.splitlines()
        assert plain.endswith("/source")
        assert marked.endswith("   2 errors")
        line = "ls: not backed up as it should be: %s: No such file or directory"
        assert program("ls", "latest").stderr.splitlines() == [line % path for path in ("/no/such", "/nor/this")]
        assert program("-q", "ls", "latest").stderr == program("ls", f"latest:{source}").stderr == ""

    def test_workers_and_connections(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Taken everywhere; where packs are read there are as many processes, and reads at a time, as asked for."""
        run, source = fault_harness.create(tmp_path, encrypted=False), make_source(tmp_path)
        for number in range(3):
            (source / "fresh").write_bytes(os.urandom(10_000 + number))
            run("backup", source, "--workers", "1")
        started: list[int] = []
        for module in (check_packs, restore):
            pool = module.OpenPool

            def record(*arguments: Any, pool: Any = pool, **options: Any) -> Any:
                started.append(options["workers"])
                return pool(*arguments, **options)

            monkeypatch.setattr(module, "OpenPool", record)
        at_once: list[int] = []
        get_into = LocalConnector.get_into

        async def counted(*arguments: Any) -> None:
            reading.append(None)
            at_once.append(len(reading))
            await anyio.sleep(0.02)
            await get_into(*arguments)
            reading.pop()

        reading: list[None] = []
        monkeypatch.setattr(LocalConnector, "get_into", counted)
        run("check", "--workers", "2", "--connections", "3")
        assert (started, max(at_once)) == ([2], 3)
        at_once.clear()
        run("--workers", "1", "check", "--connections", "1")
        run("restore", "latest", "--to", tmp_path / "to", "--workers", "4", "--connections", "1")
        assert (started, max(at_once)) == ([2, 1, 4], 1)
        run("ls", "--workers", "1", "--connections", "1")

    def test_reader_gone(self, program: Program) -> None:
        """`coffret … | head`: ends without a word; not with 0, since not all was printed."""
        for arguments in (["ls", "-r", "latest"], ["backup", "-v", program.home / "source"], ["--help"], ["info"]):
            process = program.start(*arguments)
            assert process.stdout is not None
            process.stdout.close()
            assert process.stderr is not None
            errors = process.stderr.read()
            process.stderr.close()
            assert (process.wait(), errors) == (1, b""), arguments
