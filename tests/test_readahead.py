"""What is read ahead while a repository is opened: in the readers' order, used once, and no more than a head start."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import msgspec
import pytest
from anyio import to_thread
from tests.attempts.storage import ONE_WORKER
from tests.fault_harness import cheap_passphrases, contents, make_source

from coffret.connectors.errors import ConnectorError, PermissionRefused
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.memory import MemoryConnector
from coffret.engine import kdf, state
from coffret.engine.creation import create_repository
from coffret.engine.errors import NoRepository, UsageError, WrongPassphrase, reported
from coffret.engine.opening import open_repository
from coffret.engine.readahead import ReadAhead
from coffret.engine.repository import OpenOptions

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

pytestmark = pytest.mark.anyio
URL = "memory://elsewhere"


async def all_of(names: Sequence[str]) -> Collection[str]:
    return names


async def none_of(names: Sequence[str]) -> Collection[str]:
    return ()


async def filled() -> MemoryConnector:
    memory = MemoryConnector()
    for name in ("snapshots/a", "snapshots/b", "index/a-0", "removed/x"):
        await memory.put(name, [name.encode()])
    return memory


async def names(ahead: ReadAhead, prefix: str) -> list[str]:
    return [info.name async for info in ahead.list(prefix)]


async def test_it_lists_in_the_readers_order() -> None:
    """The index is listed when the list of snapshots has come."""
    order: list[str] = []

    async def before(method: str, name: str) -> None:
        await anyio.sleep(0.01)  # one begun at the same time would be told of first
        order.append(f"{method} {name}")

    async def after(method: str, name: str) -> None:
        order.append(f"{method} {name} done")

    ahead = ReadAhead(FaultyConnector(await filled(), before=before, after=after))
    await ahead.fetch_lists()
    assert order.index("list snapshots/ done") < order.index("list index/")


async def test_what_was_fetched_is_handed_out_once() -> None:
    storage = FaultyConnector(await filled())
    ahead = ReadAhead(storage)
    await ahead.fetch_lists()
    await ahead.fetch_objects(all_of, none_of)
    asked = len(storage.calls)
    await storage.put("snapshots/c", [b"later"])
    assert await names(ahead, "snapshots/") == ["snapshots/a", "snapshots/b"]
    assert await ahead.get("snapshots/a", length=11) == b"snapshots/a"
    assert len(storage.calls) == asked + 1
    # Once, and only as it was listed; the rest is the storage's.
    assert await names(ahead, "snapshots/") == ["snapshots/a", "snapshots/b", "snapshots/c"]
    assert await ahead.get("snapshots/a", length=11) == b"snapshots/a"
    assert await ahead.get("snapshots/b", offset=1, length=4) == b"naps"
    assert await ahead.get("index/a-0", length=9) == b"index/a-0"
    assert [method for method, _ in storage.calls[asked + 1 :]] == ["list", "get", "get", "get"]


@pytest.mark.parametrize("at", ["list snapshots/", "list index/", "get snapshots/a"])
async def test_what_fails_is_asked_for_anew(at: str) -> None:
    failed: list[str] = []

    async def fail(method: str, name: str) -> None:
        if f"{method} {name}" == at and not failed:
            failed.append(name)
            raise PermissionRefused("not today")

    ahead = ReadAhead(FaultyConnector(await filled(), before=fail))
    await ahead.fetch_lists()
    await ahead.fetch_objects(all_of, all_of)
    assert failed
    assert await names(ahead, "snapshots/") == ["snapshots/a", "snapshots/b"]
    assert await names(ahead, "index/") == ["index/a-0"]
    assert await ahead.get("snapshots/a", length=11) == b"snapshots/a"


async def test_little_is_held() -> None:
    memory = MemoryConnector()
    for number in range(40):
        await memory.put(f"index/{number:02}", [b"x" * (number + 1)])
    await memory.put("snapshots/large", [bytes(17 << 20)])
    storage = FaultyConnector(memory)
    ahead = ReadAhead(storage)
    await ahead.fetch_lists()
    await ahead.fetch_objects(all_of, all_of)
    assert sum(method == "get" for method, _ in storage.calls) == 16


@pytest.fixture
async def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyConnector:
    """An encrypted repository in memory, taken for one elsewhere."""
    storage = FaultyConnector(MemoryConnector("elsewhere"))
    monkeypatch.setattr("coffret.engine.opening.connect", lambda *_: (storage, {}))
    with cheap_passphrases():
        await create_repository(URL, passphrase=b"right", options=options(tmp_path))
    return storage


def options(home: Path) -> OpenOptions:
    return OpenOptions(cache_dir=home / "cache", state_dir=home / "state")


async def test_a_reader_asks_for_nothing_more_in_a_row(elsewhere: FaultyConnector, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", files=20, large_bytes=1 << 20)
    async with open_repository(URL, passphrase=lambda: b"right", options=options(tmp_path), writing=True) as opened:
        await opened.backup([bytes(source)], ONE_WORKER)
    fresh = msgspec.structs.replace(options(tmp_path), cache_dir=tmp_path / "another cache")
    for knows in (False, True):
        elsewhere.calls.clear()
        async with open_repository(URL, passphrase=lambda: b"right", options=fresh, listing=True) as opened:
            asked = len(elsewhere.calls)
            fetched = {name.partition("/")[0] for method, name in elsewhere.calls if method == "get"}
            assert fetched == (set() if knows else {"snapshots", "index"})
            snapshot = await opened.find_snapshot("latest")
            assert elsewhere.calls[asked:] == []
            target = tmp_path / f"target {knows}"
            assert not (await opened.restore(snapshot, bytes(target))).errors
            assert contents(target) == contents(source)
            assert {method for method, _ in elsewhere.calls[asked:]} <= {"get", "get_into"}


async def test_the_slot_that_opened_it_is_asked_for_beside_the_list(elsewhere: FaultyConnector, tmp_path: Path) -> None:
    """A hint that helps, and that does no harm where it is wrong."""
    order: list[str] = []

    async def before(method: str, name: str) -> None:
        if name.startswith("keys/"):
            order.append(method)

    async def after(method: str, name: str) -> None:
        if name == "keys/":
            await anyio.lowlevel.checkpoint()
            order.append("listed")

    async with open_repository(URL, passphrase=lambda: b"right", options=options(tmp_path)) as opened:
        slot = opened.slot_id
    elsewhere.before, elsewhere.after = before, after
    for hint, expected in ((slot, ["list", "peek", "listed"]), ("0" * 64, ["list", "peek", "listed", "get"]),
                           ("../config", ["list", "listed", "get"])):  # fmt: skip
        order.clear()
        state.remember_slot(elsewhere.location, state.SlotHint(hint), tmp_path / "state")
        async with open_repository(URL, passphrase=lambda: b"right", options=options(tmp_path)) as opened:
            assert opened.slot_id == slot
        assert order == expected
        assert state.likely_slot(elsewhere.location, tmp_path / "state").slot == slot


async def test_the_key_is_derived_while_the_storage_is_reached(
    elsewhere: FaultyConnector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is known of the slot that opened it last, if nobody has to be asked for the passphrase."""
    derived: list[kdf.KdfParameters] = []
    given: list[bytes] = []
    derive, begun = kdf.derive, threading.Event()

    def passphrase() -> bytes:
        given.append(b"right")
        return b"right"

    def counted(parameters: kdf.KdfParameters, passphrase: bytes) -> kdf.DerivedKeys:
        derived.append(parameters)
        begun.set()
        return derive(parameters, passphrase)

    async def before(method: str, name: str) -> None:
        if ahead and name == "config":
            assert await to_thread.run_sync(begun.wait, 60)
        elif name == "config":
            assert not derived

    monkeypatch.setattr(kdf, "derive", counted)
    elsewhere.before = before

    async def opened_with(opening: OpenOptions) -> None:
        for each in (derived, given):
            each.clear()
        begun.clear()
        async with open_repository(URL, passphrase=passphrase, options=opening):
            assert given == [b"right"]  # it may come from a pipe

    at_hand = msgspec.structs.replace(options(tmp_path), passphrase_at_hand=True)
    ahead = False
    shutil.rmtree(tmp_path / "state")
    await opened_with(at_hand)  # nothing is known
    assert len(derived) == 1
    await opened_with(options(tmp_path))
    assert len(derived) == 1
    ahead = True
    await opened_with(at_hand)
    assert len(derived) == 1
    hint = state.likely_slot(elsewhere.location, tmp_path / "state")
    assert hint.salt == derived[0].salt
    # The slot itself decides. What is remembered is not trusted: the second costs no derivation at all.
    for wrong in (
        msgspec.structs.replace(hint, salt=bytes(16)),
        msgspec.structs.replace(hint, salt=b""),
        msgspec.structs.replace(hint, memory_kib=1 << 40),
    ):
        path = state.file_of(elsewhere.location, "pins", tmp_path / "state")
        path.write_bytes(path.read_bytes().replace(msgspec.json.encode(hint), msgspec.json.encode(wrong)))
        await opened_with(at_hand)
        assert len(derived) == 2
        assert state.likely_slot(elsewhere.location, tmp_path / "state") == hint


async def test_a_passphrase_that_can_not_be_had_is_told_of_once_it_is_needed(
    elsewhere: FaultyConnector, tmp_path: Path
) -> None:
    async with open_repository(URL, passphrase=lambda: b"right", options=options(tmp_path)):
        pass
    at_hand = msgspec.structs.replace(options(tmp_path), passphrase_at_hand=True)

    def empty() -> bytes:
        raise UsageError("an empty passphrase")

    with pytest.raises(UsageError, match="empty"):
        async with open_repository(URL, passphrase=empty, options=at_hand):
            pass
    await elsewhere.delete("config")
    with pytest.raises(NoRepository):
        async with open_repository(URL, passphrase=empty, options=at_hand):
            pass


async def test_the_first_answer_alone_may_be_old(elsewhere: FaultyConnector, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", files=5, large_bytes=1000)
    async with open_repository(URL, passphrase=lambda: b"right", options=options(tmp_path), listing=True) as opened:
        assert not (await opened.commits()).snapshots
        await opened.backup([bytes(source)], ONE_WORKER)
        assert len((await opened.commits()).snapshots) == 1


async def test_who_has_not_the_passphrase_is_told_so(elsewhere: FaultyConnector, tmp_path: Path) -> None:
    """Whatever goes wrong with what is read ahead."""

    async def fail(method: str, name: str) -> None:
        if name.startswith(("snapshots/", "index/")):
            raise ConnectorError("no")

    elsewhere.before = fail
    with pytest.raises(Exception) as raised:
        async with open_repository(URL, passphrase=lambda: b"wrong", options=options(tmp_path), listing=True):
            pass
    assert type(raised.value) is WrongPassphrase
    with pytest.raises(Exception) as raised:
        async with open_repository(URL, passphrase=lambda: b"right", options=options(tmp_path), listing=True) as opened:
            await opened.commits()
    assert "no" in str(reported(raised.value))
