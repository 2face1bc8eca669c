"""`coffret passphrase add|change|rm|list|export`."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import click

from coffret.commands.line import EPILOG
from coffret.commands.running import Session, new_passphrase
from coffret.display import path_fields, printable
from coffret.engine.errors import TargetError, UsageError, WrongPassphrase
from coffret.engine.opening import bare_storage
from coffret.engine.rights import need

if TYPE_CHECKING:
    from collections.abc import Callable

    from coffret.engine.repository import Repository

NEW = "COFFRET_NEW_PASSPHRASE"


class Group(click.Group):
    """A group that lists its commands with all that their help says, not with the beginning of it."""

    def command(self, name: str, text: str) -> Callable[..., Any]:  # type: ignore[override]
        """A command of this name, with this help."""
        return super().command(name, help=text, short_help=text, epilog=EPILOG)


@click.group(
    cls=Group,
    epilog=EPILOG,
    no_args_is_help=False,
    help="Passphrases that open the repository. A new one is asked for twice on a terminal, or comes from"
    f" {NEW}, {NEW}_FILE or {NEW}_COMMAND.",
)
@click.pass_context
def command(context: click.Context) -> None:
    """Add, change, remove, list or export."""
    context.obj.display.command = f"passphrase {context.invoked_subcommand}"


@command.command("add", "Let another passphrase open the repository; or put back what a recovery file holds.")
@click.option("--label", default="", metavar="TEXT", help="What to know it by (default: this host's name).")
@click.option("--from", "source", metavar="FILE", help="Put back config and passphrases from a recovery file.")
@click.pass_obj
def add(session: Session, label: str, source: str | None) -> int:
    """Add a slot."""

    async def run() -> int:
        from coffret.engine.ops import passphrases

        async with session.repository() as repository:
            _check_changeable(repository)
            fresh = new_passphrase("new passphrase", NEW)
            slot = await passphrases.add(
                repository.connector, repository.config_data, repository.secrets, fresh, label=label or platform.node()
            )
        session.display.summary(f"passphrase: added {slot[:8]}", slot_id=slot)
        return 0

    return session.run((lambda: _recover(session, source, label)) if source else run)


def _check_changeable(repository: Repository) -> None:
    """Say it before a passphrase is asked for.

    :raises UsageError: if the repository has none
    :raises StorageError: if the storage lets this client change none
    """
    need(repository.connector, "changing passphrases")
    if not repository.config.encrypted:
        raise UsageError(
            "the repository has no encryption, and so no passphrase",
            remedy="make another one with `coffret at REPO create` if it is to have one",
        )


async def _recover(session: Session, source: str, label: str) -> int:
    import aiofiles

    from coffret.engine.ops import recovery

    if session.globals.expect_id is not None:
        raise UsageError("--expect-id does not go with --from: the recovery file says the id", remedy="leave it out")
    try:
        async with aiofiles.open(source, encoding="utf-8") as file:
            text = await file.read()
    except (OSError, ValueError) as error:  # one is for bytes that are not UTF-8, one for a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else "no recovery file"
        raise UsageError(f"{source}: {reason}", remedy="give the file that `passphrase export` wrote") from None
    async with bare_storage(session.location, session.options) as connector:
        label = label or platform.node()
        try:
            found = await recovery.recover(connector, text, None, label=label)
        except WrongPassphrase:  # the file is of a repository with encryption
            found = await recovery.recover(connector, text, session.passphrase(), label=label)
    parts = (["the config"] if found.config else []) + [f"passphrase {slot[:8]}" for slot in found.slots]
    session.display.summary(
        f"passphrase: put back {', '.join(parts) or 'nothing: all is there'}",
        repository_id=found.repository_id,
        config=found.config,
        slots=found.slots,
    )
    return 0


@command.command("change", "Put a new passphrase in the place of the one given.")
@click.option("--label", default="", metavar="TEXT", help="What to know it by (default: this host's name).")
@click.option("--exclusive", is_flag=True, help="Vouch that no other host removes one now, where storage can't tell.")
@click.pass_obj
def change(session: Session, label: str, exclusive: bool) -> int:
    """Change the passphrase that opened the repository."""

    async def run() -> int:
        from coffret.engine.ops import passphrases

        async with session.repository() as repository:
            _check_changeable(repository)
            fresh = new_passphrase("new passphrase", NEW)
            slot = await passphrases.change(
                repository.connector,
                repository.config_data,
                repository.secrets,
                repository.slot_id,
                fresh,
                label=label or platform.node(),
                exclusive=exclusive,
            )
        session.display.summary(f"passphrase: changed {repository.slot_id[:8]} to {slot[:8]}", slot_id=slot)
        return 0

    return session.run(run)


@command.command("rm", "Make the passphrase with this id (see list) open nothing any more; never the last one.")
@click.argument("slot", metavar="ID")
@click.option("--exclusive", is_flag=True, help="Vouch that no other host removes one now, where storage can't tell.")
@click.pass_obj
def rm(session: Session, slot: str, exclusive: bool) -> int:
    """Remove a slot."""

    async def run() -> int:
        from coffret.engine.configuration import config_hash
        from coffret.engine.keyring import read_keyring
        from coffret.engine.ops import passphrases

        async with session.repository() as repository:
            _check_changeable(repository)
            keyring = await read_keyring(repository.connector, config_hash(repository.config_data))
            found = passphrases.find_slot(keyring, slot)
            await passphrases.remove(
                repository.connector, repository.config_data, repository.secrets, found, exclusive=exclusive
            )
        session.display.summary(f"passphrase: removed {found[:8]}", slot_id=found)
        return 0

    return session.run(run)


@command.command("list", "List the passphrases that open the repository.")
@click.pass_obj
def list_(session: Session) -> int:
    """List the slots."""

    async def run() -> int:
        from coffret.engine.ops import passphrases

        async with session.repository() as repository:
            slots = await passphrases.list_slots(repository.connector, repository.config_data, repository.secrets)
            mine = repository.slot_id
        for info in slots:
            mark = "*" if info.slot_id == mine else " "
            fault = f"   {info.fault}" if info.fault else ""
            session.display.line(
                f"{mark} {info.slot_id[:8]}   {info.created:<20}   {printable(info.label.encode())}{fault}"
            )
            session.display.item(
                slot_id=info.slot_id,
                created=info.created,
                label=info.label,
                fault=info.fault,
                current=info.slot_id == mine,
            )
        session.display.summary("", passphrases=len(slots))
        return 0

    return session.run(run)


@command.command("export", "Write a recovery file: config and passphrase slots, protected by the passphrases.")
@click.argument("file", metavar="FILE|-")
@click.pass_obj
def export(session: Session, file: str) -> int:
    """Write the recovery file, never over another file; `-` is standard output."""

    async def run() -> int:
        from coffret.engine.ops import recovery

        if file == "-" and session.globals.json:
            raise UsageError("standard output can't take both JSON and the recovery file", remedy="give a FILE")
        async with session.repository() as repository:
            text = await recovery.export(repository.connector, repository.config_data, repository.secrets)
        if file == "-":
            session.display.line(text.rstrip("\n"))
            return 0
        _write_new(file, text)
        shown = printable(os.fsencode(file))
        session.display.summary(
            f"passphrase: exported to {shown}; keep it away from the repository",
            **path_fields(os.fsencode(file), "file"),
        )
        return 0

    return session.run(run)


def _write_new(file: str, text: str) -> None:
    """Write a file of one's own, durably, or none.

    :raises TargetError: if it can't be made, or is there
    :raises OSError: if it can't be written
    """
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TargetError(f"{file}: {error.strerror}", remedy="choose another file") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as target:
            target.write(text)
            target.flush()
            os.fsync(descriptor)
    except OSError:
        os.unlink(file)
        raise
