"""What the documents show works: commands, the library example, links."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests import terminal
from tests.connectors import s3_server, sshd
from tests.harness import ROOT, Program, interpreter

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENTS = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")]
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# A figure, an id or a time in what a command printed: it differs from run to run.
_VARYING = [
    (r"[0-9a-f]{64}", "ID64"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"\b[0-9a-f]{8}\b", "ID8"),
    (r"[\d.]+ [kMG]?B", "SIZE"),
    (r"(?<=in )[\d.]+(µs|ms|s)", "DURATION"),
    (r"  +\d+(\.\d+)?s  +", "  DURATION  "),
    (r" {2,}", "  "),
]


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document that are in a language ("" if none is named)."""
    return [body for found, body in _FENCE.findall((ROOT / document).read_text()) if found == language]


def shape(text: str) -> str:
    for pattern, replacement in _VARYING:
        text = re.sub(pattern, replacement, text)
    return text.rstrip()


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links(document: Path) -> None:
    """What a document links to is there, headings too."""
    text = _FENCE.sub("", (ROOT / document).read_text())
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}, link


def test_transcript(tmp_path: Path) -> None:
    """The run that the README opens with prints what it shows: each line, but for ids, times and sizes."""
    transcript = next(block for block in blocks("README.md", "") if block.startswith("$ coffret"))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    shown: list[tuple[str, list[str]]] = []
    for line in transcript.splitlines():
        if line.startswith("$ "):
            shown.append((line[2:], []))
        else:
            shown[-1][1].append(line)
    program, short = Program(tmp_path), ""
    for command, lines in shown:
        places = {"/var/backups": "backups", "/etc": "etc", "/tmp/restore": "restore"}
        words = [re.sub(r"^[0-9a-f]{8}$", short, word) for word in shlex.split(command)[1:]]
        words = [str(tmp_path / places[word]) if word in places else word for word in words]
        if "create" in words:
            create = terminal.start(program, *words)
            for prompt in ("repository passphrase:", "(confirm):"):
                create.expect(prompt)
                create.type("correct horse")
            assert create.end() == 0
            printed = [line.rstrip() for line in create.plain if line]
            program = program.with_environment(COFFRET_PASSPHRASE="correct horse")
        else:
            printed = program(*words).stdout.splitlines()
        if found := re.search(r"snapshot ([0-9a-f]{8})", printed[-1]):
            short = found[1]
        for place, name in places.items():
            printed = [re.sub(rf"{re.escape(str(tmp_path / name))}\b", place, line) for line in printed]
        assert [shape(line) for line in printed] == [shape(line) for line in lines], command


def test_every_day(tmp_path: Path) -> None:
    """The commands of the README's second block run as they stand, in a shell, with other directories."""
    [block] = [block for block in blocks("README.md", "sh") if "COFFRET_REPOSITORY" in block]
    for name in ("etc/ssh", "home/user", "bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc" / "ssh" / "config").write_text("Host *\n")
    (tmp_path / "home" / "user" / "a.o").write_text("object")
    (tmp_path / "passphrase").write_text("correct horse\n")
    python, search_path = interpreter(None)
    for name, text in (("coffret", f'exec {shlex.quote(python)} -m coffret "$@"'), ("pg_dump", "echo a dump of $1")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = block
    for place in ("/var/backups", "/root/passphrase", "/tmp/back", "/etc", "/home"):
        script = re.sub(rf"(?<![\w/]){place}\b", str(tmp_path / place.rpartition("/")[2]), script)
    script = re.sub(r"^(export COFFRET_PASSPHRASE_FILE.*)$", r"\1" + "\ncoffret create", script, flags=re.MULTILINE)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "PYTHONPATH": search_path,
        "HOME": str(tmp_path),
        "LC_ALL": "C.UTF-8",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    outcome = subprocess.run(
        ["sh", "-euc", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "back" / "config").read_text() == "Host *\n"
    listed = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "correct horse"})("at", tmp_path / "backups", "ls")
    assert len(listed.stdout.splitlines()) == block.count("coffret backup")


def test_three_copies(tmp_path: Path) -> None:
    """The five commands of the section on copies, with servers of the tests in the places of those named."""
    [block] = [block for block in blocks("README.md", "sh") if "sync to" in block]
    assert len(block.splitlines()) == 5
    ssh, s3 = sshd.shared_server(chroot=False), s3_server.shared_server(tls=True)
    user, password = s3_server.CREDENTIALS
    environment = {"S3_REPOSITORY_USER": user, "S3_REPOSITORY_PASSWORD": password, "HOME": str(ssh.home.path)}
    passphrases = {"COFFRET_PASSPHRASE": "correct horse", "COFFRET_PEER_PASSPHRASE": "correct horse"}
    program = Program(tmp_path, environment={**environment, **passphrases})
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    fresh = os.urandom(8).hex()
    places = {
        "/var/backups": str(tmp_path / "backups"),
        "/etc": str(tmp_path / "etc"),
        "sftp://backup@nas.example/srv/backups": f"sftp://{ssh.user}@127.0.0.1:{ssh.port}{ssh.root}/data/{fresh}",
        "s3://s3.example/bucket/prefix": f"s3://127.0.0.1:{s3.port}/test-{fresh}/prefix?ca={s3.ca}",
    }
    program("at", places["/var/backups"], "create")
    for line in block.splitlines():
        program(*(places.get(word, word) for word in shlex.split(line)[1:]))
    listed = [program("at", place, "ls").stdout for place in places.values() if place != places["/etc"]]
    assert len(set(listed)) == 1 and listed[0]


def test_removing_old_snapshots(tmp_path: Path) -> None:
    """The commands of that block run as they stand, in a repository with some snapshots."""
    [block] = [block for block in blocks("README.md", "sh") if "coffret rm" in block]
    program = Program(tmp_path)
    (tmp_path / "source").mkdir()
    program("create", "--no-encryption")
    for _ in range(3):
        program.backup(tmp_path / "source")
    for line in block.splitlines():
        program(*shlex.split(line, comments=True)[1:])
    assert program("ls", "--json").summary["snapshots"] < 3
    program("check")


def test_library_example(tmp_path: Path) -> None:
    [example] = blocks("README.md", "python")
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "config").write_text("Host *\n")
    code = example.replace("/tmp/coffret", str(tmp_path / "coffret")).replace("/etc/ssh", str(tmp_path / "ssh"))
    python, search_path = interpreter(None)
    environment = {
        "PYTHONPATH": search_path,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    words = [python, "-W", "error", "-c", code]
    outcome = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert re.fullmatch(r"made [0-9a-f]{8} 1 files\n", outcome.stdout)
    assert (tmp_path / "coffret-restored" / "config").read_text() == "Host *\n"


def test_files_that_are_named() -> None:
    """Sources that documents name in backticks are there; what is compiled is named where the bytes are followed."""
    named: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        text = _FENCE.sub("", (ROOT / document).read_text())
        named[str(document)] = set(
            re.findall(r"`((?:engine|connectors|commands|tests|bench|docs)/(?:[\w./-]*(?:/|\.pyx?|\.md))?)`", text)
        )
        missing = [name for name in named[str(document)] if not (ROOT / name).exists() and "mine" not in name]
        assert document.name == "CHANGELOG.md" or not missing, document
    for name in ("docs/architecture.md", "CONTRIBUTING.md"):
        compiled = {path.relative_to(ROOT).as_posix() for path in (ROOT / "engine").rglob("*.pyx")}
        assert compiled <= named[name], name
    parts = {
        path.relative_to(ROOT).as_posix()
        for stem in ("restore_*", "check_*", "sync_*")
        for path in (ROOT / "engine").glob(f"{stem}.py")
    }
    assert parts <= named["docs/architecture.md"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a new environment, with all that is compiled
def test_demo(tmp_path: Path) -> None:
    """`make demo` from nothing but what git has: it installs, and ends in a compared restore."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        ["make", "demo", f"PYTHON={sys.executable}"],
        cwd=tmp_path / "clone",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The restored directory is the same as /usr/include: " in done.stdout


def test_make_targets() -> None:
    """The targets of `make` that documents name are there."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / document).read_text(), re.MULTILINE)
        assert set(named) <= targets, document
