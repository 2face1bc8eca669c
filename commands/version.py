"""`coffret version`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coffret import __version__
from coffret.commands.line import EPILOG

if TYPE_CHECKING:
    from coffret.commands.running import Session


@click.command(epilog=EPILOG, help="Print the version.")
@click.pass_obj
def command(session: Session) -> int:
    """Print the version."""
    session.display.line(f"coffret {__version__}")
    session.display.summary("", version=__version__)
    return 0
