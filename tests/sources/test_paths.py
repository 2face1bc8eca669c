"""Which paths are taken, how they are named, and what of its own the program leaves out."""

from __future__ import annotations

import os
from pathlib import Path

from tests.harness import IS_ROOT, NOBODY, Program, scratch


def listed(program: Program, below: Path) -> dict[str, str]:
    """Path below a directory → type, of what the latest snapshot holds there."""
    prefix = os.fsencode(below) + b"/"
    return {
        os.fsdecode(path.removeprefix(prefix)): entry["type"]
        for path, entry in program.listing().items()
        if path.startswith(prefix)
    }


class TestPaths:
    def test_several(self, program: Program) -> None:
        source = program.home / "source"
        made = program.backup(source / "two", source / "file", source / "one" / "sub")
        assert made["paths"] == sorted(str(source / name) for name in ("two", "file", "one/sub"))
        assert made["files"] == 3
        assert set(listed(program, source)) == {"file", "one", "one/sub", "one/sub/b", "two", "two/c"}

    def test_overlapping_ones_are_merged(self, program: Program) -> None:
        source = program.home / "source"
        made = program.backup(source / "one" / "sub", source, source, source / "one", f"{source}/two/")
        assert made["paths"] == [str(source)]
        assert made["files"] == 4
        # A name that only begins alike is no part of it.
        (program.home / "source-2").mkdir()
        made = program.backup(source, program.home / "source-2")
        assert made["paths"] == [str(source), f"{source}-2"]

    def test_relative_ones(self, program: Program) -> None:
        source = program.home / "source"
        assert program.backup(cwd=source)["paths"] == [str(source)]
        assert program.backup("one", "../source/two/c", cwd=source)["paths"] == [f"{source}/one", f"{source}/two/c"]
        assert program.backup("..", cwd=source / "two")["paths"] == [str(source)]

    def test_a_link_is_followed_where_it_is_named(self, program: Program) -> None:
        source = program.home / "source"
        (source / "bin").symlink_to("one")
        (source / "text").symlink_to("../source/file")
        (source / "dangling").symlink_to("nowhere")
        (source / "loop").symlink_to("loop")
        program.backup(source)
        assert listed(program, source)["bin"] == listed(program, source)["text"] == "symlink"
        made = program("push", "--json", "-v", "bin", "text", "dangling", cwd=source).summary
        assert made["paths"] == [f"{source}/{name}" for name in ("bin", "dangling", "text")]
        types = {"bin": "directory", "bin/a": "file", "bin/sub": "directory", "bin/sub/b": "file"}
        assert listed(program, source) == {**types, "text": "file", "dangling": "symlink"}
        # Named along with a directory around it, it is followed too.
        made = program.backup("bin", ".", "text", cwd=source)
        assert made["paths"] == [str(source)]
        found = listed(program, source)
        assert {name: found[name] for name in types} == types
        assert (found["text"], found["dangling"], found["loop"]) == ("file", "symlink", "symlink")
        program.backup("loop", code=3, cwd=source)

    def test_a_path_that_is_not_utf8(self, program: Program) -> None:
        path = os.fsencode(program.home) + b"/na\xefve\n"
        Path(os.fsdecode(path)).mkdir()
        Path(os.fsdecode(path + b"/\xff")).write_text("x")
        program.backup(path)
        assert path + b"/\xff" in program.listing()

    def test_one_is_missing(self, program: Program) -> None:
        source = program.home / "source"
        outcome = program("backup", "--json", source / "nothing", source / "file" / "below", source / "one", code=3)
        assert outcome.summary["errors"] == 2
        assert outcome.faults == {
            os.fsencode(source / "nothing"): "No such file or directory",
            os.fsencode(source / "file" / "below"): "Not a directory",
        }
        assert set(listed(program, source)) == {"one", "one/a", "one/sub", "one/sub/b"}
        assert [item["errors"] for item in program("ls", "--json").of_type("item")] == [2]

    def test_all_are_missing(self, program: Program) -> None:
        outcome = program("backup", "nothing", "nobody", code=1)
        assert "No such file or directory" in outcome.stderr
        assert program("ls", "--json").of_type("item") == []

    def test_what_is_not_readable(self) -> None:
        uid = NOBODY if IS_ROOT else os.geteuid()
        with scratch(uid=uid) as place:
            program = Program(place, uid=uid)
            program("create", "--no-encryption")
            source = place / "source"
            source.mkdir()
            (source / "closed-directory").mkdir()
            (source / "closed-directory" / "inside").touch()
            for name in ("closed", "open"):
                (source / name).write_text(name)
            for path in (source, *source.iterdir()):
                os.chown(path, uid, uid)
                path.chmod(0 if "closed" in path.name else 0o755)
            outcome = program("backup", "--json", source, code=3)
            denied = {os.fsencode(source / name): "Permission denied" for name in ("closed", "closed-directory")}
            assert outcome.faults == denied
            assert listed(program, source) == {"open": "file", "closed-directory": "directory"}
            program("restore", "--to", "target", "latest")
            assert sorted(os.listdir(place / "target")) == ["closed-directory", "open"]


class TestOwnPlaces:
    def test_are_left_out(self, program: Program) -> None:
        """The repository, the cache and the state lie in what is backed up."""
        first = program.backup(program.home)
        assert first["errors"] == 0
        names = {name.partition("/")[0] for name in listed(program, program.home)}
        assert names == {"source", "cache", "state"}
        assert not any("coffret" in name for name in listed(program, program.home))
        second = program.backup(program.home)
        assert second["files"] == first["files"] == 4
        # By device and inode: a link to it is as good as its name.
        (program.home / "alias").symlink_to("repository")
        program.with_environment(COFFRET_REPOSITORY=str(program.home / "alias")).backup(program.home)
        assert "repository" not in listed(program, program.home)

    def test_one_that_is_named_is_reported(self, program: Program) -> None:
        outcome = program("backup", "--json", program.repository, program.home / "source", code=3)
        assert list(outcome.faults) == [os.fsencode(program.repository)]
        assert outcome.summary["files"] == 4
