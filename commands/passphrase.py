"""`coffret passphrase add|change|rm|list|export`."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import click
from anyio import to_thread

from coffret.commands.running import Session, new_passphrase
from coffret.display import path_fields, printable
from coffret.engine.errors import TargetError, UsageError, WrongPassphrase
from coffret.engine.repository import bare_storage

NEW = "COFFRET_NEW_PASSPHRASE"


@click.group(
    no_args_is_help=False,
    help="Passphrases that open the repository. A new one is asked for twice on a terminal, or comes from"
    f" {NEW}, {NEW}_FILE or {NEW}_COMMAND.",
)
@click.pass_context
def command(context: click.Context) -> None:
    """Add, change, remove, list or export."""
    context.obj.display.command = f"passphrase {context.invoked_subcommand}"


@command.command("add", help="Let another passphrase open the repository; or put back what a recovery file holds.")
@click.option("--label", default="", metavar="TEXT", help="What to know it by (default: this host's name).")
@click.option("--from", "source", metavar="FILE", help="Put back config and passphrases from a recovery file.")
@click.pass_obj
def add(session: Session, label: str, source: str | None) -> int:
    """Add a slot."""

    async def run() -> int:
        from coffret.engine.ops import passphrases

        async with session.repository() as repository:
            fresh = new_passphrase("new passphrase", NEW)
            slot = await passphrases.add(
                repository.connector, repository.config_data, repository.secrets, fresh, label=label or platform.node()
            )
        session.display.summary(f"passphrase: added {slot[:8]}", slot_id=slot)
        return 0

    return session.run((lambda: _recover(session, source, label)) if source else run)


async def _recover(session: Session, source: str, label: str) -> int:
    from coffret.engine.ops import recovery

    try:
        text = await to_thread.run_sync(lambda: Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: {error}", remedy="give the file that `passphrase export` wrote") from None
    async with bare_storage(session.globals.repository, session.options) as connector:
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


@command.command("change", help="Put a new passphrase in the place of the one given.")
@click.option("--label", default="", metavar="TEXT", help="What to know it by (default: this host's name).")
@click.option("--exclusive", is_flag=True, help="Vouch that no other host removes one now, where storage can't tell.")
@click.pass_obj
def change(session: Session, label: str, exclusive: bool) -> int:
    """Change the passphrase that opened the repository."""

    async def run() -> int:
        from coffret.engine.ops import passphrases

        async with session.repository() as repository:
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


@command.command("rm", help="Make the passphrase with this id (see list) open nothing any more; never the last one.")
@click.argument("slot", metavar="ID")
@click.option("--exclusive", is_flag=True, help="Vouch that no other host removes one now, where storage can't tell.")
@click.pass_obj
def rm(session: Session, slot: str, exclusive: bool) -> int:
    """Remove a slot."""

    async def run() -> int:
        from coffret.engine.keyring import read_keyring
        from coffret.engine.ops import passphrases

        async with session.repository() as repository:
            found = passphrases.find_slot(await read_keyring(repository.connector), slot)
            await passphrases.remove(
                repository.connector, repository.config_data, repository.secrets, found, exclusive=exclusive
            )
        session.display.summary(f"passphrase: removed {found[:8]}", slot_id=found)
        return 0

    return session.run(run)


@command.command("list", help="List the passphrases that open the repository.")
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


@command.command("export", help="Write a recovery file: config and passphrase slots, protected by the passphrases.")
@click.argument("file", metavar="FILE")
@click.pass_obj
def export(session: Session, file: str) -> int:
    """Write the recovery file, never over another file."""

    async def run() -> int:
        from coffret.engine.ops import recovery

        async with session.repository() as repository:
            text = await recovery.export(repository.connector, repository.config_data, repository.secrets)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as target:
                target.write(text)
                target.flush()
                os.fsync(descriptor)
        except OSError as error:
            raise TargetError(f"{file}: {error.strerror}", remedy="choose another file") from None
        shown = printable(os.fsencode(file))
        session.display.summary(
            f"passphrase: exported to {shown}; keep it away from the repository",
            **path_fields(os.fsencode(file), "file"),
        )
        return 0

    return session.run(run)
