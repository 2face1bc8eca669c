"""How a process under test dies: by a signal of the kernel's, at a call that changes the storage, or within it.

No code of the process runs any more, neither its own nor Python's: what the storage has been told by then is all it
gets. *Not done* and *done* lie around the call. What lies between depends on the storage: see `HALVES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.crash.halves import HALVES, cut_checkpoint, die, replace

from coffret.connectors import registry
from coffret.connectors.faults import FaultyConnector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from coffret.connectors.base import Connector

NOT_DONE, DONE = "not done", "done"
CHANGING = ("create", "put", "delete")


@dataclass
class Death:
    """The process dies at the call of this number, counted from 0, of those that change the storage at `url`.

    A call that `mode` does not divide is done. `note` is told each of the calls as it begins.
    """

    url: str
    number: int
    mode: str
    note: Callable[[str], None]

    def __post_init__(self) -> None:
        self._calls, self._mine = 0, ("", "")

    def install(self) -> None:
        """Wait for it, in this process."""
        open_connector = registry.open_connector

        def opened(url: str, options: Mapping[str, str]) -> Connector:
            found = open_connector(url, options)
            if url != self.url:
                return found
            self._connector = found
            return FaultyConnector(found, before=self._before, after=self._after)

        replace(registry, open_connector=opened)

    async def _before(self, method: str, name: str) -> None:
        if method not in CHANGING:
            return
        self.note(f"{method} {name}")
        number, self._calls = self._calls, self._calls + 1
        if number == self.number:
            self._mine = method, name
            if self.mode == NOT_DONE:
                die()
            elif self.mode not in (DONE, "checkpoint"):
                HALVES[kind_of(self.url)][self.mode](self._connector, method)

    async def _after(self, method: str, name: str) -> None:
        if (method, name) != self._mine:
            return
        if self.mode != "checkpoint":
            die()
        cut_checkpoint(self._connector, method)


def kind_of(url: str) -> str:
    """The kind of storage a URL is of."""
    return url.partition("://")[0].partition("+")[0] if "://" in url else "local"


def modes_of(url: str, call: str, *, last: bool = False) -> list[str]:
    """How a process may die at this call. `last`: what follows is the end of the command alone."""
    kind, (method, _, name) = kind_of(url), call.partition(" ")
    halves = [*HALVES[kind]]
    if method == "create":
        halves = {"local": ["cut", "unflushed"], "sftp": ["cut"], "s3": [], "sqlite": ["uncommitted"]}[kind]
    elif method == "delete":
        halves = {"local": ["unflushed"], "sqlite": halves}.get(kind, [])
    elif name.startswith(("leases/", "packs/")):  # these need not be absent: files are renamed, not linked
        halves = [mode for mode in halves if mode != "two names"]
    return [NOT_DONE, *halves, DONE, *(["checkpoint"] if last and kind == "sqlite" else [])]
