"""`create --like`: the same content has the same chunk ids in both, and neither opens what the other has sealed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from tests import terminal
from tests.fault_harness import Here, cheap_passphrases, make_source
from tests.harness import Program

from coffret.connectors.local import LocalConnector
from coffret.engine import keys, sealing
from coffret.engine.configuration import config_bytes, config_hash, new_config, parse_config
from coffret.engine.errors import Damaged
from coffret.engine.keyring import put_slot
from coffret.engine.opening import open_repository
from coffret.engine.records import ChunkerConfig, Config, iter_refs
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coffret.engine.sealing import Secrets

PEERS, OWN = "one of the peer's", "one of its own"
# Other than what a new repository has by itself.
CHUNKER, PACK_BYTES = ChunkerConfig(min_bytes=16 << 10, avg_bytes=32 << 10, max_bytes=128 << 10), 8 << 20


@pytest.fixture(autouse=True)
def _cheap() -> Iterator[None]:
    with cheap_passphrases():
        yield


def make_peer(home: Path, passphrase: str | None) -> Config:
    """A repository at `peer` whose chunks and packs are smaller than by default."""
    secrets = keys.new_secrets(encrypted=passphrase is not None)
    config = new_config(secrets, chunker=CHUNKER, pack_bytes=PACK_BYTES)
    data = config_bytes(config)

    async def put() -> None:
        async with LocalConnector(home / "peer") as connector:
            await connector.create()
            if passphrase is not None:
                await put_slot(connector, *keys.wrap(secrets, passphrase.encode(), config_hash(data), label="peer"))
            await connector.put("config", [data])

    anyio.run(put)
    return config


def look_into(home: Path, name: str, passphrase: str | None) -> tuple[Secrets, set[bytes]]:
    """The keys of a repository, and the chunk ids in its last snapshot's files. It opens nothing of the other."""

    found = [*home.glob("peer/index/*"), *home.glob("new/index/*")]

    async def look() -> tuple[Secrets, set[bytes]]:
        options = OpenOptions(cache_dir=home / "cache", state_dir=home / "state" / "coffret")
        ids: set[bytes] = set()
        async with open_repository(
            str(home / name), passphrase=lambda: (passphrase or "").encode(), options=options
        ) as opened:
            async for _, entries in opened.entries(await opened.find_snapshot("latest"), b"", recursive=True):
                ids.update(chunk_id for entry in entries for chunk_id, _ in iter_refs(entry.content))
            for path in found:
                index, data = f"index/{path.name}", path.read_bytes()
                if path.parent.parent.name == name:
                    opened.sealer.open(sealing.INDEX, index, data)
                else:
                    with pytest.raises(Damaged):
                        opened.sealer.open(sealing.INDEX, index, data)
            return opened.secrets, ids

    return anyio.run(look)


@pytest.mark.parametrize("own", [OWN, None], ids=["encrypted", "clear"])
@pytest.mark.parametrize("peers", [PEERS, None], ids=["like-encrypted", "like-clear"])
def test_same_chunks_other_keys(tmp_path: Path, own: str | None, peers: str | None) -> None:
    peer = make_peer(tmp_path, peers)
    place, flags = tmp_path / "new", ["--like", str(tmp_path / "peer"), *([] if own else ["--no-encryption"])]
    environment = {
        name: value for name, value in (("COFFRET_PASSPHRASE", own), ("COFFRET_PEER_PASSPHRASE", peers)) if value
    }
    here = Here(tmp_path, environment)
    if peers and not own:
        error = here("at", place, "create", *flags, codes=(2,)).stderr
        assert "would show its keys in clear" in error
        assert not place.exists()
        return
    summary = here("at", place, "create", *flags, "--json").summary
    config = parse_config((place / "config").read_bytes())
    assert (config.chunker, config.pack_bytes, config.encrypted) == (CHUNKER, PACK_BYTES, own is not None)
    assert (summary["repository_id"], summary["like"]) == (config.repository_id, peer.repository_id)
    assert config.repository_id[:32] != peer.repository_id[:32]

    source = make_source(tmp_path / "source", large_bytes=1 << 20)
    here("at", place, "backup", source)
    Here(tmp_path, {"COFFRET_PASSPHRASE": peers} if peers else {})("at", tmp_path / "peer", "backup", source)
    (mine, ids), (theirs, peers_ids) = look_into(tmp_path, "new", own), look_into(tmp_path, "peer", peers)
    assert ids == peers_ids
    assert len(ids) > 20
    assert (mine.id_key, mine.chunker_key) == (theirs.id_key, theirs.chunker_key)
    assert (bool(mine.data_key), bool(theirs.data_key)) == (own is not None, peers is not None)
    assert mine.data_key != theirs.data_key or not own


def test_without_it_chunks_have_other_ids(tmp_path: Path) -> None:
    here, source = Here(tmp_path), make_source(tmp_path / "source", large_bytes=1 << 20)
    found = []
    for name in ("peer", "new"):
        assert here("at", tmp_path / name, "create", "--no-encryption", "--json").summary["like"] is None
        here("at", tmp_path / name, "backup", source)
        found.append(look_into(tmp_path, name, None)[1])
    assert not found[0] & found[1]


def test_the_peer_is_opened_first(tmp_path: Path) -> None:
    """Nothing is made where it is not there, is not the one that was there, or can't be opened."""
    make_peer(tmp_path, PEERS)
    here, place = Here(tmp_path, {"COFFRET_PASSPHRASE": OWN}), tmp_path / "new"
    for peer, environment, code, said in (
        ("none", {}, 10, "no repository"),
        ("peer", {}, 12, "the peer repository is encrypted and no passphrase was given"),
        ("peer", {"COFFRET_PEER_PASSPHRASE": OWN}, 12, "COFFRET_PEER_PASSPHRASE gives another"),
    ):
        outcome = here("at", place, "create", "--like", tmp_path / peer, environment=environment, codes=(code,))
        assert said in outcome.stderr
        assert not place.exists()
    assert not here("at", tmp_path / "peer", "create", "--like", tmp_path / "peer", codes=(12,)).stdout


def test_what_is_asked_on_a_terminal(tmp_path: Path) -> None:
    """The peer's passphrase once, then that of the new repository twice."""
    make_peer(tmp_path, PEERS)
    create = terminal.start(Program(tmp_path), "create", "--like", tmp_path / "peer")
    for prompt, typed in (
        ("peer repository passphrase: ", PEERS),
        ("repository passphrase: ", OWN),
        ("repository passphrase (confirm): ", OWN),
    ):
        create.expect(prompt)
        create.type(typed)
    assert create.end() == 0
    assert PEERS not in create.text
    assert Program(tmp_path, environment={"COFFRET_PASSPHRASE": OWN})("ls").stdout == ""
