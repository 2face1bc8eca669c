"""The program, as a process that stops itself (SIGSTOP) before or after one of its puts.

`python -m tests.maintenance.stopping NUMBER before|after python -m coffret ARGUMENTS...`, as the prefix of a
`harness.Program`; puts are counted from 0.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING
from unittest import mock

from coffret import cli
from coffret.connectors.faults import FaultyConnector
from coffret.connectors.registry import connect
from coffret.engine import opening

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coffret.connectors.base import Connector
    from coffret.connectors.registry import Transfers
    from coffret.connectors.trace import Calls


def main() -> None:
    """Be the program."""
    number, when = int(sys.argv[1]), sys.argv[2]
    del sys.argv[1:6]
    names: list[str] = []

    async def before(method: str, name: str) -> None:
        if method == "put":
            names.append(name)
            if when == "before" and len(names) == number + 1:
                os.kill(os.getpid(), signal.SIGSTOP)

    async def after(method: str, name: str) -> None:
        if method == "put" and when == "after" and names[number : number + 1] == [name]:
            os.kill(os.getpid(), signal.SIGSTOP)

    def stopping(url: str, options: Mapping[str, str], transfers: Transfers) -> tuple[Connector, Mapping[str, Calls]]:
        connector, calls = connect(url, options, transfers)
        return FaultyConnector(connector, before=before, after=after), calls

    with mock.patch.object(opening, "connect", stopping):
        cli.main()


if __name__ == "__main__":
    main()
