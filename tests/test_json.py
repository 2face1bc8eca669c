"""`--json`: each line of each command is as docs/json.md says, and nothing else is on standard output."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from tests.harness import ROOT, Outcome, Program, path_of

from coffret.display import SCHEMA_VERSION
from coffret.engine.settings import RACY_NS

if TYPE_CHECKING:
    from collections.abc import Callable

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{9})?Z")
ODD = b"odd \xff\x1b[31m\nname"


def read_schema() -> dict[str, dict[str, str]]:
    """The tables of docs/json.md: heading → member → type. A member that may be missing ends in `?`."""
    tables: dict[str, dict[str, str]] = {}
    heading = ""
    for line in (ROOT / "docs" / "json.md").read_text().splitlines():
        if line.startswith("### "):
            heading = line[4:]
        elif heading and (row := re.fullmatch(r"\| `(\w+)`(\??) \| (\w+\??) \| .+ \|", line)):
            tables.setdefault(heading, {})[row[1] + row[2]] = row[3]
    return tables


SCHEMA = read_schema()
CHECKS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: isinstance(value, bool),
    "list": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "path": lambda value: isinstance(value, str),
    "paths": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "time": lambda value: isinstance(value, str) and _TIME.fullmatch(value) is not None,
    "object": lambda value: isinstance(value, dict),
    "objects": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
}


def validate(message: dict[str, Any], *headings: str, common: dict[str, str] | None = None) -> None:
    """A message has the members that the tables of `headings` and `common` name, of those types, and no others."""
    left = dict(message)
    table = dict(common or {})
    for heading in headings:
        table |= SCHEMA[heading]
    for member, kind in table.items():
        name = member.rstrip("?")
        if member != name and name not in left:
            continue
        assert name in left, (name, message)
        value = left.pop(name)
        if not (kind.endswith("?") and value is None):
            assert CHECKS[kind.rstrip("?")](value), (name, kind, value)
        if kind in ("path", "paths") and f"{name}_b64" in left:
            twins = left.pop(f"{name}_b64")
            for text, twin in zip(*((value, twins) if kind == "paths" else ([value], [twins])), strict=True):
                assert base64.b64decode(twin, validate=True).decode("utf-8", "replace") == text
    assert not left, f"not in docs/json.md: {left}"


def validate_all(outcome: Outcome, item: str = "", summary: str = "") -> list[dict[str, Any]]:
    """Validate each line a command printed: its items and its summary by these headings. Returns the messages."""
    messages = outcome.messages
    kind = {"message_type": "string"}
    for message in messages:
        match message["message_type"]:
            case "status":
                validate(message, "status with a remark" if "note" in message else "status", common=kind)
            case "error":
                ends = "code" in message
                validate(message, "error that ends the command" if ends else "error of a path", common=kind)
            case "item":
                validate(message, item, common=kind)
            case "summary":
                validate(
                    message,
                    summary,
                    common={**kind, "schema_version": "integer", "command": "string", "storage?": "object"},
                )
                assert message["schema_version"] == SCHEMA_VERSION
                assert message is messages[-1]
            case other:
                pytest.fail(f"message_type {other!r}")
    last = messages[-1]
    if last["message_type"] == "error":
        assert last["code"] == outcome.code, outcome
    else:
        assert last["message_type"] == "summary", outcome
        assert outcome.code in (0, 3, 4), outcome
    return messages


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A repository without encryption, with one snapshot of a source with a name that is not UTF-8."""
    program = Program(tmp_path_factory.mktemp("json"))
    source = os.fsencode(program.home / "source")
    os.makedirs(source + b"/" + ODD)
    with Path(os.fsdecode(source + b"/" + ODD + b"/file")).open("wb") as file:
        file.write(os.urandom(300_000))
    (program.home / "source" / "plain").write_text("plain")
    os.symlink(b"to \xfe", source + b"/link")
    os.mkfifo(source + b"/fifo")
    outcome = program("create", "--no-encryption", "--json")
    validate_all(outcome, summary="summary of create")
    program.backup(program.home / "source", "--tag", "one", "--tag", "two", "--host", "elsewhere")
    return program


def test_version(program: Program) -> None:
    for arguments in (("version", "--json"), ("--json", "version")):
        assert validate_all(program(*arguments), summary="summary of version")[0]["command"] == "version"


def test_create_at_a_path_that_is_not_utf8(program: Program) -> None:
    place = os.fsencode(program.home) + b"/at \xff"
    [message] = validate_all(program("at", place, "create", "--no-encryption", "--json"), summary="summary of create")
    assert base64.b64decode(message["location_b64"]) == place
    [message] = validate_all(program("at", place, "info", "--json"), summary="summary of info")
    assert message["location"] == "file://" + quote(place)
    validate_all(program("at", place + b"x", "ls", "--json", code=10))


@pytest.mark.parametrize("command", ["backup", "push"])
def test_backup(program: Program, command: str) -> None:
    source = os.fsencode(program.home / "source")
    (program.home / "source" / "plain").write_text(f"plain {command}")
    outcome = program(command, "--json", "-v", source, source + b"/" + ODD)
    messages = validate_all(outcome, "item of backup, check, restore and clone", "summary of backup")
    items = [message for message in messages if message["message_type"] == "item"]
    assert {item["status"] for item in items} <= {"new", "changed", "unmodified"}
    summary = messages[-1]
    assert summary["command"] == command
    kinds = [f"{kind}{state}" for kind in ("", "directories_") for state in ("new", "changed", "unmodified")]
    assert sum(summary[kind] for kind in kinds) == len(items)
    assert {item["short_id"] for item in items} == {summary["short_id"]}
    for queue in summary["queues"]:
        validate(queue, "queue of backup")
    summary = validate_all(program(command, "--json", source + b"/" + ODD), summary="summary of backup")[-1]
    assert base64.b64decode(*summary["paths_b64"]) == source + b"/" + ODD


def test_backup_that_stores_nothing(program: Program) -> None:
    before = program("ls", "--json").of_type("item")
    outcome = program("backup", "--dry-run", "--json", program.home / "source")
    summary = validate_all(outcome, summary="summary of backup")[-1]
    assert summary["dry_run"] is True
    assert summary["snapshot_id"] is None
    assert program("ls", "--json").of_type("item") == before


def test_what_is_counted(tmp_path: Path) -> None:
    """Files and what else is no directory; directories by themselves; and what had to be read."""
    program, source = Program(tmp_path), tmp_path / "source"
    (source / "below").mkdir(parents=True)
    for name in ("one", "two", "below/three"):
        (source / name).write_text("1234")
    (source / "link").symlink_to("one")
    time.sleep(RACY_NS / 1e9 + 0.1)  # what is younger counts as changed
    program("create", "--no-encryption")

    def counts(*options: str) -> tuple[list[int], int, int]:
        summary = program.backup(source, *options)
        of_files = [summary[state] for state in ("new", "changed", "unmodified")]
        assert sum(of_files) == summary["files"] + summary["others"]
        of_directories = [summary[f"directories_{state}"] for state in ("new", "changed", "unmodified")]
        assert sum(of_directories) == summary["directories"] == 3 + len(tmp_path.parents)
        assert bool(summary["directories_new"]) == (summary["parent_id"] is None)
        return of_files, summary["files_read"], summary["bytes_read"]

    assert counts("--dry-run") == counts() == ([4, 0, 0], 3, 12)
    (source / "two").write_text("other")
    (source / "four").write_text("four")
    assert counts() == ([1, 1, 3], 2, 9)


def test_backup_with_faults(program: Program) -> None:
    """What could not be read is told by the backup, and by the snapshot ever after."""
    gone = os.fsencode(program.home) + b"/no \xff"
    outcome = program("backup", "--json", program.home / "source", gone, code=3)
    messages = validate_all(outcome, summary="summary of backup")
    assert outcome.faults.keys() == {gone}
    assert messages[-1]["errors"] == 1
    snapshot = messages[-1]["snapshot_id"]
    listed = validate_all(program("ls", "--json", snapshot), "item of ls SNAPSHOT", "summary of ls SNAPSHOT")
    [fault] = listed[-1]["faults"]
    validate(fault, "fault of ls SNAPSHOT")
    assert (path_of(fault), fault["reason"]) == (gone, "No such file or directory")
    assert program("ls", "--json", f"{snapshot}:{program.home}/source").summary["faults"] == []
    [item] = [item for item in program("ls", "--json").of_type("item") if item["snapshot_id"] == snapshot]
    assert item["errors"] == 1


def test_status(program: Program) -> None:
    """A backup that takes longer than a second says where it is."""
    outcome = program("backup", "--json", "--stdin-command", "sh -c 'echo; sleep 2.5'", "--stdin-name", "slow")
    messages = validate_all(outcome, summary="summary of backup")
    assert 1 <= sum(message["message_type"] == "status" for message in messages) <= 4


def test_ls(program: Program) -> None:
    messages = validate_all(program("ls", "--json"), "item of ls", "summary of ls")
    first = messages[0]
    assert first["tags"] == ["one", "two"]
    assert first["host"] == "elsewhere"
    assert first["paths"] == [first["path"]] == [str(program.home / "source")]
    assert first["snapshot_id"].startswith(first["short_id"])
    assert messages[-1]["snapshots"] == len(messages) - 1


def test_ls_snapshot(program: Program) -> None:
    snapshot = program("ls", "--json").messages[0]["short_id"]
    outcome = program("ls", "--json", snapshot)
    messages = validate_all(outcome, "item of ls SNAPSHOT", "summary of ls SNAPSHOT")
    assert messages[-1]["entries"] == len(messages) - 1
    source = os.fsencode(program.home / "source")
    entries = program.listing(snapshot, source)
    assert entries[source + b"/link"]["type"] == "symlink"
    assert base64.b64decode(entries[source + b"/link"]["target_b64"]) == b"to \xfe"
    assert entries[source + b"/fifo"]["type"] == "fifo"
    assert entries[source + b"/" + ODD + b"/file"]["size_bytes"] == 300_000
    assert entries[source + b"/plain"]["mode"] == f"{(program.home / 'source' / 'plain').stat().st_mode & 0o7777:04o}"


@pytest.mark.parametrize("how", [[], ["--fast"], ["--packs"], ["latest"], ["-v"], ["-v", "latest"]])
def test_check(program: Program, how: list[str]) -> None:
    outcome = program("check", "--json", *how)
    messages = validate_all(outcome, "item of backup, check, restore and clone", "summary of check")
    assert messages[-1]["clean"] is True
    assert ("-v" in how) == bool(outcome.of_type("item"))


def test_check_of_damage(program: Program, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(program.repository, damaged)
    pack = max((damaged / "packs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    expect = program.home / "other-state"
    other = program.with_environment(XDG_STATE_HOME=str(expect), XDG_CACHE_HOME=str(expect))
    first = program("ls", "--json").messages[0]["snapshot_id"]
    for how in ([], [first], ["--packs"]):
        outcome = other("at", damaged, "check", "--json", *how, code=4)
        summary = validate_all(outcome, summary="summary of check")[-1]
        assert summary["clean"] is False
        assert summary["damaged_packs"]
        assert outcome.faults
    outcome = other("at", damaged, "restore", "--json", "--to", tmp_path / "out", first, code=3)
    assert validate_all(outcome, summary="summary of restore")[-1]["errors"] == len(outcome.faults) > 0


def test_restore(program: Program, tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/to \xff"
    snapshot = program("ls", "--json").messages[0]["snapshot_id"]
    outcome = program("restore", "--json", "-v", "-to", place, snapshot)
    messages = validate_all(outcome, "item of backup, check, restore and clone", "summary of restore")
    source = os.fsencode(program.home / "source")
    paths = {path_of(item) for item in outcome.of_type("item")}
    assert paths >= {source, source + b"/plain", source + b"/" + ODD + b"/file"}
    assert base64.b64decode(messages[-1]["target_b64"]) == place
    assert (messages[-1]["files"], messages[-1]["kept"]) == (2, 0)
    again = program("restore", "--json", "-to", place, snapshot, "--overwrite", "never")
    summary = validate_all(again, summary="summary of restore")[-1]
    assert summary["files"] == 0
    assert summary["kept"] >= 4


def test_rm(tmp_path: Path) -> None:
    program = Program(tmp_path)
    (tmp_path / "source").mkdir()
    program("create", "--no-encryption")
    ids = [program.backup(tmp_path / "source")["snapshot_id"] for _ in range(3)]
    for dry in (["--dry-run"], []):
        messages = validate_all(program("rm", "--json", *dry, *ids[:2], ids[0]), "item of ls", "summary of rm")
        assert [message["snapshot_id"] for message in messages[:-1]] == messages[-1]["snapshot_ids"] == ids[:2]
        assert (messages[-1]["removed"], messages[-1]["dry_run"]) == (2, bool(dry))
    outcome = program("rm", "--json", *ids[1:])
    assert validate_all(outcome, "item of ls", "summary of rm")[-1]["removed_before"] == [ids[1]]
    assert program("ls", "--json").summary["snapshots"] == 0


def test_prune(tmp_path: Path) -> None:
    program = Program(tmp_path)
    (tmp_path / "source").mkdir()
    program("create", "--no-encryption")
    ids = [program.backup(tmp_path / "source", "--tag", "kept")["snapshot_id"] for _ in range(3)]
    for dry in (["--dry-run"], []):
        *items, summary = program("prune", "--json", "--keep-last", "2", *dry).messages
        for item in items:
            validate(item, "item of ls", "item of prune", common={"message_type": "string"})
        assert [(item["snapshot_id"], item["keep"]) for item in items] == [
            (ids[2], True),
            (ids[1], True),
            (ids[0], False),
        ]
        assert [item["reasons"] for item in items] == [["last snapshot"], ["last snapshot"], []]
        common = {"message_type": "string", "schema_version": "integer", "command": "string", "storage": "object"}
        validate(summary, "summary of prune", common=common)
        assert (summary["snapshot_ids"], summary["kept"], summary["dry_run"]) == (ids[:1], 2, bool(dry))
    assert program("ls", "--json").summary["snapshots"] == 2


def test_maintenance(tmp_path: Path) -> None:
    program, heading = Program(tmp_path), "summary of maintenance"
    (tmp_path / "source").mkdir()
    program("create", "--no-encryption")
    for number in range(2):
        (tmp_path / "source" / "file").write_bytes(os.urandom(300_000 + number))
        program.backup(tmp_path / "source")
    first = program("ls", "--json").messages[0]["snapshot_id"]
    program("rm", first)
    summary = validate_all(program("maintenance", "--dry-run", "--json"), summary=heading)[-1]
    assert (summary["marked_packs"] > 0, summary["dry_run"], summary["sweep_in_s"]) == (True, True, None)
    marked = validate_all(program("maintenance", "--json"), summary=heading)[-1]
    assert marked["marked_packs"] == summary["marked_packs"]
    assert 23 * 3600 < marked["sweep_in_s"] <= 24 * 3600
    open_packs = validate_all(program("maintenance", "--dry-run", "--json"), summary=heading)[-1]["open_packs"]
    assert open_packs == marked["marked_packs"]
    swept = validate_all(program("maintenance", "--grace", "0", "--json"), summary=heading)[-1]
    assert (swept["swept_packs"], swept["sweep_in_s"]) == (marked["marked_packs"], None)
    assert swept["bytes_freed"] == marked["bytes_marked"]


def test_info(program: Program) -> None:
    [summary] = validate_all(program("info", "--json"), summary="summary of info")
    assert summary["encryption"] == "none"
    assert summary["chunker"].keys() == {"name", "min_bytes", "avg_bytes", "max_bytes"}


def test_passphrase(tmp_path: Path) -> None:
    program = Program(tmp_path, environment={"COFFRET_PASSPHRASE": "first", "COFFRET_NEW_PASSPHRASE": "second"})
    validate_all(program("--json", "create"), summary="summary of create")
    for arguments in (["add", "--label", "\x1b[1mbold"], ["change"]):
        validate_all(program("passphrase", *arguments, "--json"), summary="summary of passphrase add")
    program = program.with_environment(COFFRET_PASSPHRASE="second")
    outcome = program("passphrase", "list", "--json")
    *items, summary = validate_all(outcome, "item of passphrase list", "summary of passphrase list")
    assert summary["command"] == "passphrase list"
    assert sorted(item["current"] for item in items) == [False, True]
    other = next(item["slot_id"] for item in items if not item["current"])
    file = os.fsencode(tmp_path) + b"/file \xff"
    [exported] = validate_all(program("passphrase", "export", "--json", file), summary="summary of passphrase export")
    assert base64.b64decode(exported["file_b64"]) == file
    validate_all(program("passphrase", "export", "--json", file, code=1))
    validate_all(program("passphrase", "rm", "--json", other), summary="summary of passphrase add")
    (program.repository / "config").unlink()
    outcome = program("passphrase", "add", "--from", file, "--json")
    [summary] = validate_all(outcome, summary="summary of passphrase add --from")
    assert summary["config"] is True


def test_server_token(tmp_path: Path) -> None:
    program = Program(tmp_path)
    for right in ("read-only", "append-only", "full"):
        outcome = program("server", "token", "add", f"--{right}", "--label", right, "--json")
        added = validate_all(outcome, summary="summary of server token add")[-1]
        assert added["command"] == "server token add"
    outcome = program("server", "token", "list", "--json")
    *items, summary = validate_all(outcome, "item of server token list", "summary of server token list")
    assert [item["right"] for item in items] == [item["label"] for item in items]
    assert summary["tokens"] == 3
    outcome = program("server", "token", "rm", added["token_id"], "--json")
    validate_all(outcome, summary="summary of server token rm")


def test_server(tmp_path: Path) -> None:
    program = Program(tmp_path)
    running = program.start("server", "--no-auth", "--listen", "127.0.0.1:0", "--json", "-v")
    assert running.stdout is not None
    lines: list[bytes] = []
    while not lines or b'"item"' not in lines[-1]:
        lines.append(running.stdout.readline())
    listening = json.loads(lines[-1])
    client = program.with_environment(COFFRET_REPOSITORY=listening["url"])
    client("create", "--no-encryption")
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    outcome = Outcome((), running.returncode, (b"".join(lines) + out).decode(), err.decode())
    assert outcome.code == 0, outcome
    first, *requests = outcome.of_type("item")
    for heading, messages in (("item of server", [first]), ("item of a request to server", requests)):
        for message in messages:
            validate(message, heading, common={"message_type": "string"})
    others = [message for message in outcome.messages if message["message_type"] != "item"]
    quiet = Outcome((), 0, "\n".join(json.dumps(message) for message in others), "")
    assert validate_all(quiet, summary="summary of server")[-1]["requests"] == len(requests) > 5


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["sync"], 2),
        (["backup", "--no-such-option"], 2),
        (["passphrase"], 2),
        (["passphrase", "rm", "12"], 2),
        (["at", "/nowhere/at all", "ls"], 10),
        (["ls", "nosuch"], 1),
        (["ls", "latest:/no/such"], 2),
        (["restore", "--to", "/proc/nowhere", "latest"], 1),
        (["backup", "/no/such"], 1),
        (["create", "--no-encryption"], 2),
        (["passphrase", "export", "-"], 2),
        (["at", "", "ls"], 2),
        (["server"], 2),
        (["server", "token", "add"], 2),
        (["server", "token", "rm", "none"], 2),
    ],
)
def test_failure(program: Program, arguments: list[str], code: int) -> None:
    outcome = program(*arguments, "--json", code=code)
    [message] = validate_all(outcome)
    assert outcome.stderr.startswith(f"coffret: {message['message']}")
    assert len(outcome.stderr.splitlines()) == 1
