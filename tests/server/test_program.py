"""`coffret server` as a process: whole backups through it, how it is stopped, how it dies, what it refuses to do."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from tests.connectors.s3_server import make_certificates
from tests.connectors.servers import free_port
from tests.connectors.stores import files
from tests.harness import ROOT, Program
from tests.server import sealed
from tests.server.program import ServerProcess
from tests.server.serving import Raw, request
from tests.server.test_hostile import await_state
from tests.tree_state import describe, differences

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """One that anybody here may use."""
    server = ServerProcess(tmp_path / "host", "--no-auth")
    server.start()
    yield server
    server.kill()


def client(home: Path, url: str, token: str = "") -> Program:
    home.mkdir(exist_ok=True)
    environment = {"COFFRET_REPOSITORY": url} | ({"COFFRET_SERVER_TOKEN": token} if token else {})
    return Program(home, environment=environment)


@pytest.mark.slow
def test_backups_of_other_hosts(tmp_path: Path) -> None:
    """From nothing, over TLS, with a token of each right; and what each must not do."""
    make_certificates(tmp_path)
    certificate = ("--tls-cert", str(tmp_path / "server.pem"), "--tls-key", str(tmp_path / "server.key"))
    server = ServerProcess(tmp_path / "host", *certificate)
    full, append_only, read_only = (server.token(right) for right in ("full", "append-only", "read-only"))
    server.start()
    url = f"{server.url}?ca={tmp_path}/ca.pem"
    source = tmp_path / "source"
    source.mkdir()
    for number in range(30):
        (source / str(number)).write_bytes(os.urandom(number * 1000))
    owner, writer, reader = (
        client(tmp_path / n, url, t) for n, t in (("o", full), ("w", append_only), ("r", read_only))
    )
    assert "append-only" in writer("create", "--no-encryption", code=1).stderr
    owner("create", "--no-encryption")
    assert writer.backup(source)["files"] == 30
    (source / "more").write_bytes(os.urandom(3 * MIB))
    assert writer.backup(source)["new"] == 1
    assert len(reader("ls", "--json").of_type("item")) == 2
    reader("check")
    reader("restore", "latest", "--to", tmp_path / "restored")
    assert not differences(describe(source), describe(tmp_path / "restored"))
    assert "read-only" in reader("backup", source, code=1).stderr
    assert not list((server.root / "repository" / "leases").iterdir())
    token_id = server.program("server", "token", "list", "--json").of_type("item")[2]["token_id"]
    server.program("server", "token", "rm", token_id)
    assert "does not know the token" in reader("ls", code=1).stderr
    writer("ls")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    log = server.log.read_text()
    assert "for 3 tokens" in log
    assert "stopped after" in log
    assert not any(token in log for token in (full, append_only, read_only))
    assert "Traceback" not in log


def test_the_readme_s_commands(tmp_path: Path) -> None:
    """They run as they stand, with other places."""
    section = (
        (ROOT / "README.md").read_text().partition("## A repository served to other hosts")[2].partition("\n## ")[0]
    )
    add, serve, export, backup = re.findall(r"^(?:coffret|export) .+$", section, re.MULTILINE)
    make_certificates(tmp_path)
    port = free_port()
    places = {
        "/srv/backups": str(tmp_path / "repository"),
        "0.0.0.0:8471": f"127.0.0.1:{port}",
        "chain.pem": str(tmp_path / "server.pem"),
        "key.pem": str(tmp_path / "server.key"),
        "https://nas.example:8471/": f"https://127.0.0.1:{port}/?ca={tmp_path}/ca.pem",
        "/etc": str(tmp_path / "source"),
    }

    def words(line: str) -> list[str]:
        return [places.get(word, word) for word in shlex.split(line, comments=True)[1:]]

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "hosts").write_text("127.0.0.1 localhost\n")
    host, other = Program(tmp_path), client(tmp_path / "other", "")
    host("create", "--no-encryption")
    token = host(*words(add)).stdout.strip()
    assert token.startswith(shlex.split(export, comments=True)[1].partition("=")[2].rstrip("."))
    running = host.start(*words(serve))
    try:
        await_state(lambda: _listens(port))
        variable = shlex.split(export, comments=True)[1].partition("=")[0]
        other.with_environment(**{variable: token})(*words(backup))
    finally:
        running.terminate()
        out, err = running.communicate(timeout=60)
    assert running.returncode == 0, (out, err)
    assert len(host("ls", "--json").of_type("item")) == 1


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_what_is_under_way_is_done(self, server: ServerProcess, number: signal.Signals) -> None:
        with Raw(server.port) as create:
            create.send(request("POST", "/v1/create"))
            assert create.status() == 204
        name, body = sealed.pack(3 * MIB)
        with Raw(server.port) as idle, Raw(server.port) as busy:
            idle.send(request("GET", "/v1/"))
            assert idle.status() == 200
            busy.send(request("PUT", f"/v1/objects/{name}", Content_Length=str(len(body)), Expect="100-continue"))
            assert busy.status() == 100
            busy.send(body[:MIB])
            server.signal(number)
            while idle.receive():
                pass  # it is closed
            await_state(lambda: not _listens(server.port))
            busy.send(body[MIB:])
            assert busy.status() == 204
        assert server.wait() == 0
        assert (server.root / "repository" / name).read_bytes() == body
        assert "stopped after 3 requests" in server.log.read_text()

    def test_a_second_signal_does_not_wait(self, server: ServerProcess) -> None:
        with Raw(server.port) as stuck:
            stuck.send(request("PUT", "/v1/objects/index/x", Content_Length="100000", Expect="100-continue"))
            assert stuck.status() == 100
            server.signal(signal.SIGTERM)
            await_state(lambda: not _listens(server.port))
            server.signal(signal.SIGTERM)
            assert server.wait() == 130

    def test_killed_amid_a_put(self, server: ServerProcess) -> None:
        """There is no such object, only what was being written, and the next put goes on."""
        with Raw(server.port) as raw:
            raw.send(request("POST", "/v1/create"))
            assert raw.status() == 204
        name, body = sealed.pack(3 * MIB)
        head = request("PUT", f"/v1/objects/{name}", Content_Length=str(len(body)), Expect="100-continue")
        with Raw(server.port) as raw:
            raw.send(head)
            assert raw.status() == 100
            raw.send(body[:-1])
            server.kill()
            assert raw.receive() == b""
        assert all(left.startswith("tmp/") for left in files(server.root / "repository"))
        server.start()
        with Raw(server.port) as raw:
            raw.send(head)
            assert raw.status() == 100
            raw.send(body)
            assert raw.status() == 204
        assert {each for each in files(server.root / "repository") if not each.startswith("tmp/")} == {name}


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
    except OSError:
        return False


class TestRefusals:
    """Each in one line that says what to do."""

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            ((), "server token add"),
            (("--listen", "0.0.0.0:0"), "--tls-cert and --tls-key, or --insecure"),
            (("--listen", "0.0.0.0:0", "--no-auth", "--insecure"), "--no-auth is for"),
            (("--listen", "nonsense:port"), "HOST:PORT"),
            (("--listen", "127.0.0.1:99999"), "HOST:PORT"),
            (("--listen", "8471"), "HOST:PORT"),
            (("--listen", "no-such-host.invalid:1"), "an address of this machine"),
            (("--listen", "192.0.2.1:1", "--insecure", "--memory", "1M"), "64M at least"),
            (("--tls-cert", "/none"), "belong together"),
            (("--tls-cert", "/none", "--tls-key", "/none", "--no-auth"), "--tls-cert /none"),
            (("--no-auth", "--expect-id", "0" * 64), "no repository"),
            (("token", "add"), "--append-only"),
            (("token", "add", "--append-only", "--full"), "what may the token do?"),
            (("token", "add", "--full", "--label", "a\nb"), "label"),
            (("token", "rm", "none"), "token list"),
            (("token",), "Missing command"),
            (("token", "nothing"), "No such command"),
            (("--no-such-option",), "no option"),
        ],
    )
    def test_usage(self, tmp_path: Path, words: tuple[str, ...], text: str) -> None:
        outcome = Program(tmp_path)("server", *words, code=None)
        assert outcome.code in (2, 10), outcome
        (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("coffret:")]
        assert text in line
        assert not (tmp_path / "repository").exists()

    def test_an_address_that_is_taken(self, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", free_port()))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            outcome = Program(tmp_path)("server", "--no-auth", "--listen", address, code=1)
        assert f"can't listen on {address}: Address already in use (" in outcome.stderr
        assert "choose another address" in outcome.stderr
        Program(tmp_path)("server", "token", "add", "--full")
        outcome = Program(tmp_path)("server", "--insecure", "--listen", "192.0.2.1:1", code=1)
        assert "can't listen on 192.0.2.1:1: Cannot assign requested address (" in outcome.stderr

    def test_a_client_elsewhere_without_tls(self, tmp_path: Path) -> None:
        program = client(tmp_path / "home", "http://192.0.2.1:1/", "coffret_secret")
        outcome = program("ls", code=1)
        assert "--insecure" in outcome.stderr
        assert "secret" not in outcome.stderr

    def test_who_is_not_let_in_is_told_what_to_do_and_nothing_else(self, tmp_path: Path) -> None:
        server = ServerProcess(tmp_path / "host")
        server.token("full")
        server.start()
        try:
            for token, said in (("", "set COFFRET_SERVER_TOKEN"), ("coffret_x", "server token add")):
                told = client(tmp_path / "home", server.url, token)("ls", code=1).stderr
                assert said in told
                assert "permissions" not in told
        finally:
            server.kill()

    def test_tokens_are_for_their_owner_alone(self, tmp_path: Path) -> None:
        program = Program(tmp_path)
        added = program("server", "token", "add", "--append-only", "--label", "web 1", "--json").summary
        quiet = program("-q", "server", "token", "add", "--read-only")
        assert quiet.stdout.startswith("coffret_")
        assert quiet.stderr == ""
        kept = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}
        text = b"".join(path.read_bytes() for path in kept)
        assert added["token"].encode() not in text
        assert added["token_id"].encode() in text
        listed = program("server", "token", "list").stdout
        assert added["token_id"] in listed
        assert "web 1" in listed
        assert added["token"] not in listed
