"""A clone is the same, object by object, however it is interrupted, and never anything else than whole."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.copies.storages import GOLDEN, KINDS, Killed, Places, to_copy

from coffret.connectors.errors import ConnectorError, StorageFull
from coffret.engine import state
from coffret.engine.configuration import config_hash, new_config
from coffret.engine.creation import create_repository
from coffret.engine.errors import (
    CoffretError,
    Damaged,
    NoRepository,
    OutOfSpace,
    RepositoryChanged,
    UsageError,
    reported,
)
from coffret.engine.keyring import log_removal, read_keyring
from coffret.engine.keys import new_secrets

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["clear", "encrypted"])
def golden(request: pytest.FixtureRequest, places: Places) -> Path:
    """The golden repository, at `r:`: it has everything, an open mark and a removed snapshot among it."""
    folder: Path = GOLDEN / request.param
    places.load("r:", folder)
    return folder


@pytest.fixture
def anyio_backend() -> str:
    """One loop is enough for storages in memory."""
    return "asyncio"


async def test_equal(places: Places, golden: Path) -> None:
    original = places.objects("r:")
    assert {name.partition("/")[0] for name in original} == {*KINDS} - ({"keys"} if golden.name == "clear" else set())
    summary, told = await places.clone("r:", "x:")
    copy = places.objects("x:")
    assert copy == to_copy(original)
    # No other sequence of what is put leaves nothing but whole repositories behind at each step.
    order = [name.partition("/")[0] for method, name in places.opened["x:"].calls if method == "put"]
    steps = [kind for kind, _ in itertools.groupby(kind for kind in order if kind != "leases")]
    # First the ends that make index objects void, then the commits.
    kinds = ["packs", "snapshots", "index", "removed", "snapshots", "trash", "config"]
    assert [kind for kind in steps if kind != "keys"] == kinds
    assert (summary.objects, summary.size_bytes, summary.kept) == (len(copy), sum(map(len, copy.values())), 0)
    assert (told.files, told.files_total) == (len(copy), len(copy))
    assert (told.size_bytes, told.size_total) == (summary.size_bytes, summary.size_bytes)
    assert (told.faults, told.notes) == ({}, [])
    assert not [name for name in places.storages["x:"]._objects if name.startswith("leases/")]
    assert await places.snapshots("x:", fast=False) == await places.snapshots("r:")


async def test_again_copies_nothing(places: Places, golden: Path) -> None:
    await places.clone("r:", "x:")
    before = places.objects("x:")
    summary, told = await places.clone("r:", "x:")
    assert (summary.objects, summary.size_bytes, told.notes) == (0, 0, [])
    assert summary.kept == len([name for name in before if not name.startswith(("keys/", "config"))])
    changes = [name for method, name in places.opened["x:"].calls if method in ("put", "delete")]
    assert [name.partition("/")[0] for name in changes] == ["leases"] * 2  # its own, put and taken away


async def test_leases_of_one_that_was_killed(places: Places, golden: Path) -> None:
    """They lie in the copy until maintenance takes them away, and are no damage; what only looks like one is."""
    await places.clone("r:", "x:")
    for number, body in enumerate((b"probe 0", b"clone 0123456789abcdef")):
        places.set("x:", f"leases/{number:032x}", body)
    assert await places.snapshots("x:", fast=False) == await places.snapshots("r:")
    places.set("x:", f"leases/{2:032x}", b"close 0123456789abcdef")
    with pytest.raises(AssertionError, match="not an object"):
        await places.snapshots("x:", fast=False)


async def test_tops_up_what_is_new(places: Places, golden: Path) -> None:
    """Here all but the first snapshot and the packs it needs is new."""
    every = places.objects("r:")
    first = {name: data for name, data in every.items() if name.startswith(("packs/", "index/"))}
    for name in every.keys() - first.keys() - {"config"}:
        if not name.startswith("keys/"):
            places.set("r:", name, None)
    await places.clone("r:", "x:")
    for name, data in every.items():
        places.set("r:", name, data)
    summary, _ = await places.clone("r:", "x:")
    assert places.objects("x:") == to_copy(every)
    assert summary.objects == len([name for name in every if name.startswith(("snapshots/", "removed/", "trash/"))])


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_interrupted_at_every_put(places: Places, golden: Path, moment: str) -> None:
    """Until the last of them there is no repository, and each next run takes up what is there."""
    wanted = to_copy(places.objects("r:"))
    for stop in itertools.count():
        url, puts = f"x{stop}:", itertools.count()

        async def fail(method: str, name: str, stop: int = stop, puts: itertools.count[int] = puts) -> None:
            if method == "put" and next(puts) == stop:
                raise Killed

        places.faults = {url: {moment: fail}}
        try:
            await places.clone("r:", url)
        except* Killed:
            places.faults = {}
            there = places.objects(url)
            if "config" in there:
                assert await places.snapshots(url) == await places.snapshots("r:")
            else:
                with pytest.raises(NoRepository):
                    await places.snapshots(url)
            _, told = await places.clone("r:", url)
            assert told.notes == []
            assert not [name for method, name in places.opened[url].calls if method == "put" and name in there]
            assert places.objects(url) == wanted
        else:
            break
    assert stop >= len(wanted)
    assert await places.snapshots("x7:") == await places.snapshots("r:")


async def test_interrupted_while_topping_up(places: Places, golden: Path) -> None:
    """At every put the copy is a whole repository: each snapshot in it is."""
    every = places.objects("r:")
    early = {name: data for name, data in every.items() if name.startswith(("keys/", "config"))}
    for stop in itertools.count():
        url, puts = f"x{stop}:", itertools.count()
        for name, data in early.items():
            places.storages.setdefault(url, places.open(url, {}).inner)  # type: ignore[attr-defined]
            places.set(url, name, data)

        async def fail(method: str, name: str, stop: int = stop, puts: itertools.count[int] = puts) -> None:
            if method == "put" and next(puts) == stop:
                raise Killed

        places.faults = {url: {"after": fail}}
        try:
            await places.clone("r:", url)
        except* Killed:
            places.faults = {}
            await places.snapshots(url)
        else:
            break
    assert stop == len(every) - len(early) + 1  # and its lease


async def test_cancelled(places: Places, golden: Path) -> None:
    """The next run goes on; buffers are not written to any more."""

    async def stop(method: str, name: str) -> None:
        if name.startswith("index/") and method == "put":
            scope.cancel()
            await anyio.sleep_forever()

    places.faults = {"x:": {"before": stop}}
    with anyio.CancelScope() as scope:
        await places.clone("r:", "x:")
    assert scope.cancelled_caught
    assert "config" not in places.objects("x:")
    places.faults = {}
    summary, _ = await places.clone("r:", "x:")
    assert summary.kept
    assert places.objects("x:") == to_copy(places.objects("r:"))


async def test_a_full_disk(places: Places, golden: Path) -> None:
    """It is told as that, and what was stored is taken up."""

    async def fail(method: str, name: str) -> None:
        if method == "put" and name.startswith("index/"):
            raise StorageFull(f"{name}: No space left on device")

    places.faults = {"x:": {"before": fail}}
    with pytest.raises(ExceptionGroup) as raised:
        await places.clone("r:", "x:")
    assert isinstance(reported(raised.value), OutOfSpace)
    places.faults = {}
    summary, _ = await places.clone("r:", "x:")
    assert summary.kept
    assert places.objects("x:") == to_copy(places.objects("r:"))


@pytest.mark.parametrize("encrypted", [False, True])
async def test_an_empty_repository(places: Places, encrypted: bool) -> None:
    await create_repository("r:", passphrase=b"golden" if encrypted else None, options=places.options)
    await places.clone("r:", "x:")
    assert places.objects("x:") == places.objects("r:")
    assert await places.snapshots("x:") == []


class TestDamage:
    """What is damaged in the original is told, and not taken for good; the rest is copied."""

    async def test_of_each_object(self, places: Places, golden: Path) -> None:
        original = places.objects("r:")
        wanted = to_copy(original)
        for number, (name, data) in enumerate(sorted(wanted.items())):
            if name in ("config", "keys/removed-1"):
                continue
            url, last_digits = f"x{number}:", data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
            # Without a key, the clear header is what can be verified of sealed objects.
            sealed = golden.name == "encrypted" and not name.startswith(("packs/", "keys/"))
            places.set("r:", name, bytes([data[0] ^ 1]) + data[1:] if sealed else last_digits)
            summary, told = await places.clone("r:", url)
            assert list(summary.damaged) == [name]
            assert told.faults == {name.encode(): summary.damaged[name]}
            copied = places.objects(url)
            assert copied == {each: data for each, data in wanted.items() if each != name}
            # Put back, it is copied.
            places.set("r:", name, data)
            summary, _ = await places.clone("r:", url)
            assert summary.objects == 1
            assert places.objects(url) == wanted

    async def test_cut_short_or_too_large(self, places: Places, golden: Path) -> None:
        wanted = to_copy(places.objects("r:"))
        kinds = {name.partition("/")[0]: name for name in wanted if "/" in name}
        for name in kinds.values():
            places.set("r:", name, wanted[name][:70])
        places.set("r:", kinds["packs"], bytes(300 << 20))
        summary, _ = await places.clone("r:", "x:")
        assert "more than any object of its kind" in summary.damaged[kinds["packs"]]
        # A sealed object says nothing of its length in clear.
        assert {kinds["packs"], kinds["snapshots"]} <= summary.damaged.keys() <= {*kinds.values()}

    async def test_that_can_not_be_read(self, places: Places, golden: Path) -> None:
        bad = next(name for name in places.objects("r:") if name.startswith("packs/"))

        async def fail(method: str, name: str) -> None:
            if name == bad:
                raise ConnectorError(f"{name}: Input/output error")

        places.faults = {"r:": {"before": fail}}
        summary, _ = await places.clone("r:", "x:")
        assert summary.damaged == {bad: "can't be read: Input/output error"}
        assert bad not in places.objects("x:")

    async def test_of_a_pack_in_the_copy(self, places: Places, golden: Path) -> None:
        """One that is cut short there is replaced by the whole one."""
        await places.clone("r:", "x:")
        original = places.objects("r:")
        pack = next(name for name in original if name.startswith("packs/"))
        places.set("x:", pack, original[pack][:-1])
        summary, _ = await places.clone("r:", "x:")
        assert summary.objects == 1
        assert places.objects("x:") == to_copy(original)

    async def test_of_all_keys(self, places: Places) -> None:
        """A copy that nobody could open is none."""
        places.load("r:", GOLDEN / "encrypted")
        for name in places.objects("r:"):
            if name.startswith("keys/") and "removed" not in name:
                places.set("r:", name, b"{}")
        with pytest.raises(Damaged, match="none of its key slots"):
            await places.clone("r:", "x:")
        assert "config" not in places.objects("x:")

    async def test_of_the_log_of_removed_keys(self, places: Places) -> None:
        """As in the original a removed slot opens again, until the log is put back in both."""
        places.load("r:", GOLDEN / "encrypted")
        log = places.objects("r:")["keys/removed-1"]
        places.set("r:", "keys/removed-1", log.replace(b"2026", b"2025"))
        summary, _ = await places.clone("r:", "x:")
        assert [*summary.damaged] == ["keys/removed-1"]
        places.set("r:", "keys/removed-1", log)
        await places.clone("r:", "x:")
        live = [(await read_keyring(places.storages[url])).live for url in ("r:", "x:")]
        assert live[0] == live[1]
        assert len(live[0]) == 2

    async def test_a_log_of_another_repository(self, places: Places) -> None:
        """It says nothing here: neither is a slot left out for it, nor is it put into the copy."""
        places.load("r:", GOLDEN / "encrypted")
        source, wanted = places.storages["r:"], to_copy(places.objects("r:"))
        keyring = await read_keyring(source)
        assert await log_removal(source, keyring, next(iter(keyring.live)), bytes(32))
        summary, _ = await places.clone("r:", "x:")
        assert [*summary.damaged] == ["keys/removed-2"]
        assert places.objects("x:") == wanted

    async def test_of_the_config(self, places: Places, golden: Path) -> None:
        config = places.objects("r:")["config"]
        places.set("r:", "config", config.replace(b'"max_bytes"', b'"max_bites"'))
        with pytest.raises(CoffretError):
            await places.clone("r:", "x:")
        assert not places.storages.get("x:") or not places.objects("x:")


class TestOtherTargets:
    """What is at the target already is left alone, unless it is a copy of this repository."""

    async def refused(self, places: Places, kind: type[CoffretError], words: str) -> CoffretError:
        before = places.objects("x:")
        with pytest.raises(kind, match=words) as raised:
            await places.clone("r:", "x:")
        assert places.objects("x:") == before
        return raised.value

    async def test_another_repository(self, places: Places, golden: Path) -> None:
        await create_repository("x:", passphrase=None, options=places.options)
        error = await self.refused(places, UsageError, "x: is another repository")
        assert "sync to" in error.remedy

    async def test_a_config_that_is_none(self, places: Places, golden: Path) -> None:
        places.open("x:", {})
        places.set("x:", "config", b"[core]\n")
        await self.refused(places, NoRepository, "not coffret's")

    async def test_a_config_that_is_empty(self, places: Places, golden: Path) -> None:
        places.open("x:", {})
        places.set("x:", "config", b"")
        await self.refused(places, Damaged, "cut short")

    async def test_objects_of_another_repository(self, places: Places, golden: Path) -> None:
        places.open("x:", {})
        places.set("x:", "packs/00/" + 64 * "0", b"of another")
        await self.refused(places, NoRepository, "without its config")

    async def test_a_lease_is_nothing(self, places: Places, golden: Path) -> None:
        """One that a clone which was killed has left."""
        places.open("x:", {})
        places.set("x:", "leases/" + 32 * "0", b"probe 0")
        await places.clone("r:", "x:")
        assert places.objects("x:") == to_copy(places.objects("r:"))

    async def test_the_repository_itself(self, places: Places, golden: Path) -> None:
        with pytest.raises(UsageError, match="lies in the repository itself"):
            await places.clone("r:", "r:")

    @pytest.mark.parametrize("name", ["snapshots/", "trash/2", "keys/removed-1"])
    @pytest.mark.parametrize("longer", [False, True])
    async def test_a_copy_that_was_used(self, places: Places, golden: Path, name: str, longer: bool) -> None:
        """Names that both sides give: an attempt taken for dead here and not there, the next mark, a removal."""
        original = places.objects("r:")
        if name.startswith("keys") and golden.name == "clear":
            pytest.skip("there are no keys")
        name = next(each for each in original if each.startswith(name) and original[each][9:10] != b"E")
        await places.clone("r:", "x:")
        data = original[name]
        places.set("x:", name, data[:40] + bytes([data[40] ^ 1]) + data[41:] + bytes(longer))
        places.set("x:", next(each for each in original if each.startswith("packs/")), None)
        error = await self.refused(places, UsageError, f"no mere copy any more: its {name}")
        assert "sync to" in error.remedy

    async def test_a_snapshot_that_was_swept(self, places: Places, golden: Path) -> None:
        """An end that stands where the copy has the snapshot takes nothing away there."""
        await places.clone("r:", "x:")
        original = places.objects("r:")
        ends = [data for name, data in original.items() if name.startswith("snapshots/") and data[9:10] == b"E"]
        name = next(each for each in original if each.startswith("snapshots/") and original[each][9:10] == b"S")
        places.set("r:", name, ends[0])
        before = places.objects("x:")
        summary, _ = await places.clone("r:", "x:")
        assert (summary.objects, summary.damaged) == (0, {})
        assert places.objects("x:") == before

    async def test_what_only_the_copy_has_is_told(self, places: Places, golden: Path) -> None:
        await places.clone("r:", "x:")
        pack = next(name for name in places.objects("r:") if name.startswith("packs/"))
        places.set("r:", pack, None)
        summary, told = await places.clone("r:", "x:")
        [note] = told.notes
        assert "has objects that the original has not, 1: " in note
        assert summary.objects == 0
        assert pack in places.objects("x:")

    async def test_what_belongs_to_no_repository_is_left_out(self, places: Places, golden: Path) -> None:
        for name in ("packs/notes", "index/readme.txt", "snapshots/x"):
            places.set("r:", name, b"mine")
        _, told = await places.clone("r:", "x:")
        assert told.notes == ["objects that belong to no repository are left out: 3"]
        assert not any(data == b"mine" for data in places.objects("x:").values())


class TestPins:
    """Each location remembers what it had."""

    async def test_the_copy_is_remembered(self, places: Places, golden: Path) -> None:
        summary, _ = await places.clone("r:", "x:")
        other = new_config(new_secrets(encrypted=False))
        with pytest.raises(RepositoryChanged):
            state.check("memory://x:", other.repository_id, False, bytes(32), folder=places.home / "state")
        config, digest = summary.config, config_hash(places.objects("x:")["config"])
        state.check("memory://x:", config.repository_id, config.encrypted, digest, folder=places.home / "state")

    async def test_a_new_copy_in_the_place_of_another_repository(self, places: Places, golden: Path) -> None:
        """As with `create`: who makes it means it."""
        await create_repository("x:", passphrase=None, options=places.options)
        places.storages["x:"]._objects.clear()
        await places.clone("r:", "x:")
        await places.snapshots("x:")

    async def test_a_copy_that_somebody_put_there(self, places: Places, golden: Path) -> None:
        """It is not taken for what was there, unless its id is asked for."""
        await create_repository("x:", passphrase=None, options=places.options)
        places.storages["x:"]._objects.clear()
        places.load("x:", golden)
        with pytest.raises(RepositoryChanged, match="now it has another"):
            await places.clone("r:", "x:")

    async def test_the_original_is_not_swapped(self, places: Places, golden: Path) -> None:
        await create_repository("r2:", passphrase=b"x", options=places.options)
        places.storages["r2:"]._objects.clear()
        places.load("r2:", golden)
        with pytest.raises(RepositoryChanged):
            await places.clone("r2:", "x:")
        assert not places.objects("x:")
