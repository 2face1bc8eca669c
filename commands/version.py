"""`coffret version`."""

from __future__ import annotations

import click

from coffret import __version__


@click.command(help="Print the version.")
def command() -> int:
    """Print the version."""
    click.echo(f"coffret {__version__}")
    return 0
