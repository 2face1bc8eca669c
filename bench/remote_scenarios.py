"""What is asked of each contender over the network, in which order.

As on a local disk, in each round every scenario goes through all contenders before the next begins, each round starts
with another one, and ratios are taken round by round. Where latency is asked about, both sides go through a proxy, with
and without delay.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.bars import CONNECTOR, CONNECTOR_UNDELAYED, LOCAL, OURS, RESTORE_MS, TRANSFER_MS, UNDELAYED
from bench.contenders import Place, available
from bench.measure import Command, CommandFailed, run, stored_bytes, warm
from bench.remote_ledger import Ledger, calls_of
from bench.remote_proxy import DelayingProxy
from bench.remote_storages import make_place
from bench.restored import RestoredTrees

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.contenders import Arguments, Contender
    from bench.datasets import Dataset
    from bench.remote_storages import RemoteStorage
    from bench.results import Run

T = TypeVar("T")
# In the order in which they are run.
PARTS = ("speed", "latency", "unchanged", "loops")
CONNECTIONS = 8
_OTHERS = ["restic"] if shutil.which("restic") else []
_LOOPS = {
    CONNECTOR: ("--connector",),
    f"{CONNECTOR}, uvloop": ("--connector", "--uvloop"),
    "bare": (),
    "bare, uvloop": ("--uvloop",),
}
_ROOT = Path(__file__).parents[1]


class RemoteBench(Ledger):
    """One run over some storages. `round` adds to `measurements`, which can be read at any time."""

    def __init__(
        self,
        run_: Run,
        datasets: dict[str, Dataset],
        storages: Sequence[RemoteStorage],
        folder: Path,
        parts: Sequence[str],
        tell: Callable[[str], None] = print,
        *,
        each_way: bool = False,
    ) -> None:
        """`each_way`: latencies are those of each direction, and their scenarios are named so."""
        self._at = "at {} ms each way" if each_way else "at {} ms"
        self._delayed_share = 1.0 if each_way else 0.5
        super().__init__(run_, folder, tell)
        self._datasets, self._storages, self._parts = datasets, storages, frozenset(parts)
        self._big = datasets["big"]
        self._restored = RestoredTrees(folder / "restored", room_bytes=self._big.tree_bytes)
        # A repository on this disk, whose packs the bare loops move.
        self._packs = Place(folder / "packs")
        [self._local] = available([OURS])

    def prepare(self) -> None:
        """Make the packs that the bare loops move, if any will.

        :raises CommandFailed: if they can't be made
        """
        if not self._parts & {"speed", "loops"}:
            return
        self._local.make(self._packs)
        run(self._command(self._local, self._local.backup, self._packs), self.folder / "packs.log", sample=False)

    def memory(self) -> None:
        """Find the peaks of memory of Coffret's first backups and restores, local and remote."""
        self.sampled = True
        if "speed" in self._parts:
            for storage in self._storages:
                scenario = f"{storage.name}: first"
                self._first_local(scenario)
                ours = self._contender(storage, OURS)
                if self._first(scenario, OURS, ours, storage, "memory"):
                    self._restore(f"{storage.name}: restore", OURS, ours, storage, "memory")
                storage.remove("memory")
        self.sampled = False

    def round(self, number: int) -> None:
        """Take every storage through the scenarios, once."""
        for storage in self._storages:
            if "speed" in self._parts:
                self._speed(storage, number)
            if "latency" in self._parts:
                self._latency(storage, number)
            if "unchanged" in self._parts:
                self._unchanged(storage, number)
            if "loops" in self._parts:
                self._loops(storage, number)

    def _speed(self, storage: RemoteStorage, number: int) -> None:
        """First backups, and restores of what they stored."""
        scenario = f"{storage.name}: first"
        names = _rotated([OURS, *_OTHERS, LOCAL, storage.library], number)
        stored = []
        for name in names:
            if name == LOCAL:
                self._first_local(scenario)
            elif name == storage.library:
                self._loop(scenario, name, storage, "put", (), storage.server.port, connections=4)
                storage.remove("loop")
            elif self._first(scenario, name, self._contender(storage, name), storage, name):
                stored.append(name)
        for name in stored:
            self._restore(f"{storage.name}: restore", name, self._contender(storage, name), storage, name)
        for name in stored:
            storage.remove(name)

    def _latency(self, storage: RemoteStorage, number: int) -> None:
        """The same through a line with latency and through one without: with many connections, and as it is."""
        with ExitStack() as stack:
            ports = {
                delay_ms: stack.enter_context(self._proxy(storage, delay_ms)).port
                for delay_ms in (0, TRANSFER_MS, RESTORE_MS)
            }
            for delay_ms in _rotated([TRANSFER_MS, 0], number):
                scenario = f"{storage.name}: first {self._at.format(TRANSFER_MS)}"
                ours = storage.coffret(ports[delay_ms], connections=CONNECTIONS)
                self._first(scenario, OURS if delay_ms else UNDELAYED, ours, storage, f"first-{delay_ms}")
            for delay_ms in _rotated([RESTORE_MS, 0], number):
                scenario = f"{storage.name}: restore {self._at.format(RESTORE_MS)}"
                ours = storage.coffret(ports[delay_ms])
                self._restore(scenario, OURS if delay_ms else UNDELAYED, ours, storage, "first-0")
            for delay_ms in (0, TRANSFER_MS):
                storage.remove(f"first-{delay_ms}")

    def _unchanged(self, storage: RemoteStorage, number: int) -> None:
        """A backup of *small* in which nothing has changed, far from the server."""
        small, scenario = self._datasets["small"], f"{storage.name}: unchanged {self._at.format(RESTORE_MS)}"
        place = Place(self.folder / "unchanged")
        with self._proxy(storage, RESTORE_MS) as proxy:
            ours = storage.coffret(proxy.port)
            make_place(storage, place)
            for template in (*ours.create, ours.backup, ours.backup):
                command = self._command(ours, template, place, "unchanged", source=small.path)
                try:
                    run(command, place.folder / "prepare.log", sample=False)
                except CommandFailed as error:
                    self.fail(small, scenario, OURS, ours, error)
                    return
            warm(small.path, contents=False)
            before = storage.requests()
            command = self._command(ours, ours.backup, place, "unchanged", source=small.path)
            usage = self.measure(small, scenario, OURS, ours, command)
            if usage is not None:
                line = self.line(small, scenario, OURS, ours)
                after = storage.requests()
                counted = after - before if after is not None and before is not None else calls_of(line)
                line.requests = [*line.requests, counted]
                self.tell(f"    {counted} requests")
        storage.remove("unchanged")

    def _loops(self, storage: RemoteStorage, number: int) -> None:
        """The packs alone, by the connector and by its library, on either event loop; and through the slow line."""
        for what in ("put", "get"):
            for name in _rotated(list(_LOOPS), number):
                shown = name.replace("bare", storage.library)
                self._loop(f"{storage.name}: {what}", shown, storage, what, _LOOPS[name], storage.server.port)
            with ExitStack() as stack:
                for delay_ms in _rotated([TRANSFER_MS, 0], number):
                    proxy = stack.enter_context(self._proxy(storage, delay_ms))
                    name = CONNECTOR if delay_ms else CONNECTOR_UNDELAYED
                    scenario = f"{storage.name}: {what} {self._at.format(TRANSFER_MS)}"
                    self._loop(scenario, name, storage, what, _LOOPS[CONNECTOR], proxy.port)
        storage.remove("loop")

    def _first_local(self, scenario: str) -> None:
        place = Place(self.folder / "local")
        self._local.make(place)
        warm(self._big.path)
        self.measure(self._big, scenario, LOCAL, self._local, self._command(self._local, self._local.backup, place))
        place.remove()

    def _first(self, scenario: str, name: str, contender: Contender, storage: RemoteStorage, repository: str) -> bool:
        """A first backup into a new repository; whether that worked."""
        place = Place(self.folder / "client")
        make_place(storage, place)
        storage.remove(repository)
        try:
            for template in contender.create:
                run(self._command(contender, template, place, repository), place.folder / "create.log", sample=False)
        except CommandFailed as error:
            self.fail(self._big, scenario, name, contender, error)
            return False
        warm(self._big.path)
        command = self._command(contender, contender.backup, place, repository)
        usage = self.measure(self._big, scenario, name, contender, command)
        if usage is not None:
            line = self.line(self._big, scenario, name, contender)
            line.repository_bytes = stored_bytes(storage.folder(repository))
        return usage is not None

    def _restore(self, scenario: str, name: str, contender: Contender, storage: RemoteStorage, repository: str) -> None:
        """A restore on a machine that has never seen the repository."""
        place, target = Place(self.folder / "client"), self._restored.make_target()
        make_place(storage, place)
        warm(storage.folder(repository))
        command = self._command(contender, contender.restore, place, repository, target=target)
        self.measure(self._big, scenario, name, contender, command, sync_on=target)

    def _loop(
        self,
        scenario: str,
        name: str,
        storage: RemoteStorage,
        what: str,
        more: Arguments,
        port: int,
        *,
        connections: int = CONNECTIONS,
    ) -> None:
        """Move the packs, and nothing else."""
        place = Place(self.folder / "client")
        make_place(storage, place)
        storage.prepare("loop")
        arguments = ("-m", "bench.remote_loops", what, "--url", storage.url("loop", port), "--folder",
                     str(self._packs.repository), "--connections", str(connections), *more)  # fmt: skip
        environment = {**self._command(self._local, (), place).environment, **storage.environment}
        if what == "put":
            warm(self._packs.repository)
        else:
            warm(storage.folder("loop"))
        command = Command((sys.executable, *arguments), environment, _ROOT)
        self.measure(self._big, scenario, name, self._local, command)

    def _proxy(self, storage: RemoteStorage, latency_ms: float) -> DelayingProxy:
        return DelayingProxy(storage.server.port, latency_ms * self._delayed_share)

    def _contender(self, storage: RemoteStorage, name: str) -> Contender:
        port = storage.server.port
        return storage.restic(port) if name == "restic" else storage.coffret(port)

    def _command(
        self, contender: Contender, template: Arguments, place: Place, repository: str = "", **values: object
    ) -> Command:
        known: dict[str, Any] = {"repository": repository or place.repository, "source": self._big.path, "serial": 0}
        return contender.command(template, place, **(known | values))


def _rotated(items: list[T], number: int) -> list[T]:
    start = number % len(items)
    return [*items[start:], *items[:start]]
