"""Who may do what: every method, for every kind of object, with every right; and what append-only tokens try."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import pytest
from tests.connectors.stores import files
from tests.server import sealed
from tests.server.serving import Raw, Serving, request

from coffret.connectors.base import APPEND_ONLY, FULL, READ_ONLY, RIGHTS
from coffret.connectors.errors import AlreadyExists, ConnectorError, NotFound, PermissionRefused
from coffret.engine import sealing
from coffret.engine.creation import RACERS, put_race
from coffret.engine.errors import CoffretError
from coffret.engine.records import FORMAT_VERSION
from coffret.engine.server.attempts import Attempts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from coffret.connectors.base import Connector

OWN, OTHER = sealed.attempt(), sealed.attempt()
# What there is of each kind: a name, and what it holds.
THERE = dict(
    [
        ("config", b"{}"),
        ("keys/" + "a" * 64, b"{}"),
        ("keys/removed-1", b"{}"),
        sealed.pack(),
        sealed.index(OTHER),
        sealed.snapshot(OTHER),
        sealed.lease(OTHER),
        ("trash/1", b"mark"),
        ("trash/1-seen", b"seen"),
        ("trash/1-done", b"done"),
        (f"removed/{OTHER}-{OTHER}", b"removed"),
        ("other/thing", b"thing"),
    ]
)
METHODS = ("GET", "HEAD", "PUT", "PUT if absent", "DELETE")


def status(server: Serving, method: str, path: str, token: str, body: bytes = b"") -> int:
    verb, _, condition = method.partition(" ")
    with Raw(server.port) as raw:
        raw.send(request(verb, path, token, body=body, If_None_Match="*" if condition else ""))
        return raw.status()


def expected(method: str, name: str, right: str, body: bytes) -> int:
    """The status that a request for an object that is there must have."""
    if method in ("GET", "HEAD"):
        return 200
    if right == FULL:
        return 412 if method == "PUT if absent" else 204
    if right == APPEND_ONLY and method != "DELETE":
        if name.startswith("packs/"):
            return 204  # the very same
        return 403  # of others, or never
    return 403


@pytest.mark.parametrize("right", RIGHTS)
def test_what_is_there(shared: Serving, right: str) -> None:
    for method, (name, body) in itertools.product(METHODS, THERE.items()):
        path = shared.path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(body)
        found = status(shared, method, f"/v1/objects/{name}", shared.token(right), body)
        assert found == expected(method, name, right, body), (method, name)
        if found != 204:
            assert path.read_bytes() == body
        elif method == "DELETE":
            assert not path.exists()


@pytest.mark.parametrize("right", RIGHTS)
def test_what_is_not_there(shared: Serving, right: str) -> None:
    names = ["keys/" + "b" * 64, "keys/removed-2", "trash/2", "removed/x", "nothing/here", sealed.pack()[0]]
    for name in names:
        path = f"/v1/objects/{name}"
        assert status(shared, "GET", path, shared.token(right)) == 404
        assert status(shared, "HEAD", path, shared.token(right)) == 404
        assert status(shared, "DELETE", path, shared.token(right)) == (204 if right == FULL else 403)
        for method in ("PUT", "PUT if absent"):
            found = status(shared, method, path, shared.token(right), b"x")
            assert found == (204 if right == FULL else 403), (method, name)
            assert (shared.path / name).exists() == (right == FULL)
            (shared.path / name).unlink(missing_ok=True)


@pytest.mark.parametrize("right", RIGHTS)
def test_everything_else(shared: Serving, right: str) -> None:
    token = shared.token(right)
    assert status(shared, "GET", "/v1/", token) == 200
    assert status(shared, "GET", "/v1/objects?prefix=", token) == 200
    assert status(shared, "GET", "/v1/objects?prefix=packs/", token) == 200
    assert status(shared, "POST", "/v1/create", token) in ((204, 409) if right == FULL else (403,))


def test_without_a_token_nothing_is_told(shared: Serving) -> None:
    path, before = "/v1/objects/config", files(shared.path)
    (shared.path / "config").write_bytes(b"{}")
    for token in ("", "wrong", "coffret_" + "A" * 43, shared.token(FULL)[:-1], shared.token(FULL) + "A"):
        for method, target in itertools.product((*METHODS, "POST", "OPTIONS"), (path, "/v1/", "/", "/v1/create")):
            assert status(shared, method, target, token, b"x" * 10) in (401, 429)
    assert files(shared.path) == before | {"config"}
    assert (shared.path / "config").read_bytes() == b"{}"


class TestAppendOnly:
    """Each with the connector that a backup uses."""

    pytestmark = pytest.mark.anyio

    async def test_an_attempt_from_its_lease_to_its_end(self, server: Serving) -> None:
        of = sealed.attempt()
        async with server.connector(APPEND_ONLY) as connector:
            name, body = sealed.lease(of)
            await connector.put(name, [body])
            refreshed = sealed.lease(of)[1]
            await connector.put(name, [refreshed])
            assert await connector.get(name) == refreshed
            with pytest.raises(AlreadyExists):
                await connector.put(name, [body], if_absent=True)
            pack, packed = sealed.pack(200_000)
            for _ in range(2):
                await connector.put(pack, [packed])
            for number in range(3):
                index, indexed = sealed.index(of, number)
                await connector.put(index, [indexed], if_absent=True)
            committed = sealed.snapshot(of)
            await connector.put(committed[0], [committed[1]], if_absent=True)
            await connector.delete(name)
            await connector.delete(name)
            with pytest.raises(NotFound):
                await connector.get(name)
            assert await connector.get(pack) == packed
            assert await connector.get(committed[0]) == committed[1]

    async def test_of_its_own_leases_too_one_of_several_puts_wins(self, server: Serving) -> None:
        """Or the storage would look to maintenance as one that lets writers take each other's names."""
        async with server.connector(APPEND_ONLY) as connector:
            name, body = sealed.lease(of := sealed.attempt())
            assert await put_race(connector, name, [sealed.lease(of)[1] for _ in range(RACERS)]) == 1
            await connector.put(name, [body])
            with pytest.raises(AlreadyExists):
                await connector.put(name, [sealed.lease(of)[1]], if_absent=True)
            assert await connector.get(name) == body

    async def test_without_a_lease_nothing_of_an_attempt(self, server: Serving) -> None:
        of = sealed.attempt()
        async with server.connector(APPEND_ONLY) as connector:
            for name, body in (sealed.index(of), sealed.snapshot(of)):
                for if_absent in (False, True):
                    with pytest.raises(PermissionRefused, match="did not begin"):
                        await connector.put(name, [body], if_absent=if_absent)
            with pytest.raises(PermissionRefused, match="did not begin"):
                await connector.delete(f"leases/{of}")
        assert files(server.path) == set()

    async def test_what_is_put_stays(self, server: Serving) -> None:
        """Not even one's own is replaced or deleted, but for the lease."""
        of = sealed.attempt()
        async with server.connector(APPEND_ONLY) as connector:
            await connector.put(sealed.lease(of)[0], [sealed.lease(of)[1]])
            for make in (sealed.index, sealed.snapshot):
                name, body = make(of)
                await connector.put(name, [body])
                for if_absent in (False, True):
                    with pytest.raises(AlreadyExists):
                        await connector.put(name, [make(of)[1]], if_absent=if_absent)
                with pytest.raises(PermissionRefused, match="takes nothing away"):
                    await connector.delete(name)
                assert (server.path / name).read_bytes() == body

    async def test_an_attempt_belongs_to_one_token(self, server: Serving) -> None:
        of, other = sealed.attempt(), server.new_token(APPEND_ONLY)[1]
        async with server.connector(APPEND_ONLY) as mine, server.connector(token=other) as theirs:
            name, body = sealed.lease(of)
            await mine.put(name, [body])
            for call in _all_of_an_attempt(theirs, of):
                with pytest.raises(PermissionRefused, match="did not begin"):
                    await call()
            await mine.delete(name)
            for call in _all_of_an_attempt(theirs, of):
                with pytest.raises(PermissionRefused, match="did not begin"):
                    await call()
            await mine.put(name, [body])
            assert (server.path / name).read_bytes() == body

    async def test_it_does_so_after_a_restart(self, server: Serving) -> None:
        of, other = sealed.attempt(), server.new_token(APPEND_ONLY)[1]
        name, body = sealed.lease(of)
        async with server.connector(APPEND_ONLY) as mine:
            await mine.put(name, [body])
        server.stop()
        (server.path / name).unlink()
        server.start()
        async with server.connector(APPEND_ONLY) as mine, server.connector(token=other) as theirs:
            with pytest.raises(PermissionRefused, match="did not begin"):
                await theirs.put(name, [body])
            await mine.put(*_call(sealed.index(of)))

    @pytest.mark.parametrize("kind", ["lease", "index", "snapshot", "tombstone"])
    async def test_an_attempt_that_others_began_past_the_server(self, server: Serving, kind: str) -> None:
        """What is bound to nobody can't be taken, whatever is left of it."""
        of = sealed.attempt()
        name, body = getattr(sealed, kind)(of)
        server.write(name, body)
        async with server.connector(APPEND_ONLY) as connector:
            for call in _all_of_an_attempt(connector, of):
                with pytest.raises(PermissionRefused, match="did not begin"):
                    await call()
        assert {name: (server.path / name).read_bytes() for name in files(server.path)} == {name: body}

    async def test_of_two_that_want_one_attempt_one_has_it(self, server: Serving) -> None:
        import anyio

        of, tokens = sealed.attempt(), [server.new_token(APPEND_ONLY)[1] for _ in range(6)]
        name, won = sealed.lease(of)[0], []

        async def take(token: str) -> None:
            async with server.connector(token=token) as connector:
                body = sealed.lease(of)[1]
                try:
                    await connector.put(name, [body])
                except ConnectorError:
                    return
                won.append(body)

        async with anyio.create_task_group() as tasks:
            for token in tokens:
                tasks.start_soon(take, token)
        assert [(server.path / name).read_bytes()] == won

    async def test_tombstones(self, server: Serving) -> None:
        """Neither of others nor of one's own attempts, in whatever header."""
        mine, victim = sealed.attempt(), sealed.attempt()
        name, body = sealed.lease(victim)
        server.write(name, body)
        async with server.connector(APPEND_ONLY) as connector:
            await connector.put(*_call(sealed.lease(mine)))
            for of, by in ((victim, mine), (victim, victim), (mine, mine)):
                with pytest.raises(PermissionRefused, match="tombstone"):
                    await connector.put(*_call(sealed.tombstone(of, by)), if_absent=True)
        assert not any(path.startswith("snapshots/") for path in files(server.path))

    async def test_names_and_headers_that_differ(self, server: Serving) -> None:
        of = sealed.attempt()
        good = {"index": sealed.index(of), "leases": sealed.lease(of), "snapshots": sealed.snapshot(of)}
        async with server.connector(APPEND_ONLY) as connector:
            await connector.put(*_call(good["leases"]))
            before = files(server.path)
            bodies: list[bytes] = [b"", b"x", good["index"][1][:63], b"COFFRET\0" + bytes(100), sealed.pack()[1]]
            other = sealed.attempt()
            for folder, (name, body) in good.items():
                wrong = [*bodies, *(found for kind, (_, found) in good.items() if kind != folder)]
                kind = {"index": sealing.INDEX, "leases": sealing.LEASE, "snapshots": sealing.SNAPSHOT}[folder]
                wrong.append(sealed.sealed(kind, name, other))
                wrong.append(body[:8] + bytes((FORMAT_VERSION + 1,)) + body[9:])  # of another version
                for each in wrong:
                    with pytest.raises(PermissionRefused):
                        await connector.put(name, [each])
            for name in (f"index/{of}", f"index/{of}-01", f"index/{of}-x", f"snapshots/{of}-0", f"leases/{of}-0"):
                with pytest.raises(PermissionRefused):
                    await connector.put(name, [good["index"][1]])
            with pytest.raises(PermissionRefused, match="more than any lease"):
                await connector.put(good["leases"][0], [good["leases"][1] + bytes(100_000)])
        assert files(server.path) == before

    async def test_packs_are_what_their_names_say(self, server: Serving) -> None:
        name, body = sealed.pack(500_000)
        async with server.connector(APPEND_ONLY) as connector:
            for wrong in (
                body[:-1],
                body + b"x",
                bytes([body[0] ^ 1]) + body[1:],
                b"",
                body[:-1] + bytes([body[-1] ^ 1]),
            ):
                with pytest.raises(PermissionRefused, match="not the hash"):
                    await connector.put(name, [wrong])
            for kind in (sealing.INDEX, sealing.END):
                odd = sealed.pack(kind=kind)
                with pytest.raises(PermissionRefused, match="as a pack does"):
                    await connector.put(*_call(odd))
            with pytest.raises(PermissionRefused):
                await connector.put(f"packs/{'00' if name[6:8] != '00' else '01'}{name[8:]}", [body])
            assert files(server.path) == set()
            await connector.put(name, [body], if_absent=True)
            await connector.put(name, [body], if_absent=True)

    async def test_a_pack_that_is_damaged_there_is_not_said_to_be_stored(self, server: Serving) -> None:
        name, body = sealed.pack()
        server.write(name, body[:-1])
        async with server.connector(APPEND_ONLY) as connector:
            with pytest.raises(AlreadyExists, match="bytes"):
                await connector.put(name, [body])
        assert (server.path / name).read_bytes() == body[:-1]


@pytest.mark.anyio
async def test_a_token_that_is_removed_is_refused_at_once(server: Serving) -> None:
    """On a connection that is open, too."""
    token_id, token = server.new_token(READ_ONLY)
    async with server.connector(token=token) as connector:
        with pytest.raises(NotFound):
            await connector.stat("config")
        server.tokens.remove(token_id)
        with pytest.raises(PermissionRefused, match="does not know the token"):
            await connector.stat("config")
        assert token not in " ".join(server.notes)


def test_bindings_are_durable_and_private(server: Serving) -> None:
    attempts = Attempts(server.tokens.path.with_suffix(".attempts"))
    assert attempts.owner("a") == ""
    assert attempts.bind("a", "one") == "one"
    assert attempts.bind("a", "two") == "one"
    assert Attempts(server.tokens.path.with_suffix(".attempts")).owner("a") == "one"
    assert server.tokens.path.with_suffix(".attempts").stat().st_mode & 0o777 == 0o600


@pytest.mark.anyio
async def test_a_state_that_can_t_be_read_lets_nobody_in(server: Serving) -> None:
    server.token(FULL)
    server.tokens.path.write_bytes(b'{"location": "x", "tokens": [["a", "", "root", "", "b"]]}')
    with pytest.raises(CoffretError, match="a right that is none"):
        server.tokens.tokens()
    with Raw(server.port) as raw:
        raw.send(request("GET", "/v1/", server.token(FULL)))
        assert raw.status() == 503
    assert any("a right that is none" in note for note in server.notes)
    (server.tokens.path).unlink()
    attempts = server.tokens.path.with_suffix(".attempts")
    attempts.write_bytes(os.urandom(5000))
    server._made.clear()
    async with server.connector(APPEND_ONLY) as connector:
        with pytest.raises(ConnectorError, match="its own files"):
            await connector.put(*_call(sealed.lease(sealed.attempt())))
    assert not any((server.path / "leases").iterdir())


def _call(found: tuple[str, bytes]) -> tuple[str, Sequence[bytes]]:
    return found[0], [found[1]]


def _all_of_an_attempt(connector: Connector, of: str) -> list[Callable[[], Awaitable[None]]]:
    """Everything that can be tried with an attempt."""
    found = [sealed.lease(of), sealed.index(of), sealed.index(of, 7), sealed.snapshot(of)]
    return [
        *(lambda each=each: connector.put(*_call(each)) for each in found),
        *(lambda each=each: connector.put(*_call(each), if_absent=True) for each in found),
        lambda: connector.delete(f"leases/{of}"),
    ]
