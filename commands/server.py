"""`coffret server`, and `coffret server token add|rm|list`."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import click
import msgspec

from coffret.commands.line import EPILOG
from coffret.display import OutputLost, ReaderGone, counted, printable
from coffret.engine.errors import UsageError
from coffret.engine.opening import bare_storage
from coffret.engine.units import format_duration, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coffret.commands.running import Session
    from coffret.connectors.base import Connector
    from coffret.engine.server.app import Exchange
    from coffret.engine.server.run import Address
    from coffret.engine.server.tokens import Token, TokenFile

_LISTEN = "127.0.0.1:8471"
_LEAST_MEMORY = "64M"


class _Group(click.Group):
    """A group that lists its commands with all that their help says, not with the beginning of it."""

    def command(self, name: str, text: str) -> Callable[..., Any]:  # type: ignore[override]
        """A command of this name, with this help."""
        return super().command(name, help=text, short_help=text, epilog=EPILOG)


@click.group(
    epilog=EPILOG,
    invoke_without_command=True,
    no_args_is_help=False,
    help="Serve the repository to other hosts, where it is http://HOST:PORT/ or https://HOST:PORT/, until SIGTERM or"
    " Ctrl-C. Who comes needs a token. Neither a passphrase nor a key is ever needed here.",
)
@click.option("--listen", default=_LISTEN, metavar="HOST:PORT", help=f"Where to listen (default: {_LISTEN}).")
@click.option("--tls-cert", metavar="FILE", help="The server's certificate, and what signed it: PEM.")
@click.option("--tls-key", metavar="FILE", help="The certificate's key: PEM, without a passphrase.")
@click.option("--memory", default="256M", metavar="SIZE", help="For what is under way, in all (default: 256M).")
@click.option("--no-auth", is_flag=True, help="Let every program on this machine do everything, without a token.")
@click.pass_context
def command(context: click.Context, /, listen: str, memory: str, no_auth: bool, **tls: str | None) -> int:
    """Serve, unless it is about tokens."""
    session: Session = context.obj
    if context.invoked_subcommand is not None:
        return 0
    stop = asyncio.Event()

    async def serve() -> int:
        from coffret.engine.server.run import parse_address

        address = parse_address(listen)
        certificate = _certificate(session, address, tls["tls_cert"], tls["tls_key"])
        if no_auth and not address.is_loopback:
            raise UsageError(
                "--no-auth is for a server that only this machine reaches",
                remedy="leave it out and make tokens, or listen on 127.0.0.1",
            )
        # What limits there are hold for what clients send and get: a put that waited for the storage would never end.
        unlimited = msgspec.structs.replace(session.options.transfers, upload=None, download=None)
        async with bare_storage(
            session.location, msgspec.structs.replace(session.options, transfers=unlimited)
        ) as connector:
            return await _serve(session, connector, address, certificate, memory, no_auth, stop)

    return session.run(serve, on_stop=stop.set)


def _certificate(
    session: Session, address: Address, certificate: str | None, key: str | None
) -> tuple[str, str] | None:
    """
    :raises UsageError: if only one of the two is given, or none where others could read along
    """
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key belong together", remedy="give both, or neither")
    if certificate is not None and key is not None:
        return certificate, key
    if not address.is_loopback and not session.globals.insecure:
        raise UsageError(
            f"other hosts reach {address.host}, and without TLS anyone on the way could read their tokens and use them",
            remedy="give --tls-cert and --tls-key, or --insecure if something else encrypts (a proxy, a tunnel)",
        )
    return None


async def _serve(
    session: Session,
    connector: Connector,
    address: Address,
    certificate: tuple[str, str] | None,
    memory: str,
    no_auth: bool,
    stop: asyncio.Event,
) -> int:
    from coffret.connectors.limit import Pace
    from coffret.engine.server.attempts import Attempts
    from coffret.engine.server.limits import Limits
    from coffret.engine.server.run import Settings, serve
    from coffret.engine.server.tokens import TokenFile

    memory_bytes = parse_size(memory)
    if memory_bytes < parse_size(_LEAST_MEMORY):
        remedy = f"give {_LEAST_MEMORY} at least: packs are moved whole"
        raise UsageError(f"--memory {memory} is too little", remedy=remedy)
    tokens = TokenFile(connector.location, session.options.state_dir)
    count = len(tokens.tokens())
    if not count and not no_auth:
        raise UsageError(
            f"nobody has a token for {connector.location}",
            remedy="make one with `coffret at REPO server token add --append-only`, or another right",
        )
    await _look(session, connector)
    display = session.display
    display.storage_calls = session.options.calls[connector.location]

    def ready(urls: Sequence[str]) -> None:
        for url in urls:
            who = "for this machine, without tokens" if no_auth else f"for {counted(count, 'token')}"
            if not display.quiet:
                display.line(f"server: serving {printable(os.fsencode(connector.location))} at {url} {who}")
            display.item(url=url, location=connector.location, tokens=None if no_auth else count)

    settings = Settings(
        address,
        None if no_auth else tokens,
        Attempts(tokens.path.with_suffix(".attempts")),
        stop,
        on_ready=ready,
        on_note=display.note,
        on_exchange=_teller(session) if display.verbose else None,
        certificate=certificate,
        limits=msgspec.structs.replace(Limits(), memory_bytes=memory_bytes),
        pace=Pace(session.options.transfers.upload, session.options.transfers.download),
    )
    requests = await serve(connector, settings)
    display.summary(f"server: stopped after {counted(requests, 'request')}", requests=requests)
    return 0


async def _look(session: Session, connector: Connector) -> None:
    """Say it if there is no repository: the location may be mistyped.

    :raises NoRepository: if there is not the one expected
    """
    from coffret.connectors.errors import NotFound
    from coffret.engine import configuration, state
    from coffret.engine.configuration import CONFIG_NAME
    from coffret.engine.errors import NoRepository

    expected = session.globals.expect_id
    try:
        data = await connector.peek(CONFIG_NAME, configuration.MAX_CONFIG_BYTES + 1)
    except NotFound:
        if expected is not None:
            raise NoRepository(f"no repository at {session.location}") from None
        session.display.note(f"there is no repository at {connector.location} yet; who has a full token can create one")
        return
    state.check_expected(connector.location, configuration.parse_config(data).repository_id, expected)


def _teller(session: Session) -> Callable[[Exchange], None]:
    """What is told of each request with -v."""
    display = session.display

    is_heard = True

    def tell(done: Exchange) -> None:
        nonlocal is_heard
        if is_heard:
            try:
                show(done)
            except (ReaderGone, OutputLost):
                is_heard = False
                display.note("nobody reads the lines about requests any more")

    def show(done: Exchange) -> None:
        moved = done.received_bytes + done.sent_bytes
        text = (
            f"{done.address} {done.token_id or '-'} {done.method} {done.path} {done.status or 'cut off'}"
            f" {format_size(moved)} {format_duration(done.duration_s)}"
        )
        display.line(printable(os.fsencode(text)))
        display.item(
            address=done.address,
            token_id=done.token_id,
            method=done.method,
            request=done.path,
            http_status=done.status,
            bytes_received=done.received_bytes,
            bytes_sent=done.sent_bytes,
            duration_s=round(done.duration_s, 6),
        )

    return tell


@command.group("token", cls=_Group, no_args_is_help=False, help="Tokens: who may do what. See also `server --help`.")
@click.pass_context
def token(context: click.Context) -> None:
    """Add, remove or list."""
    context.obj.display.command = f"server token {context.invoked_subcommand}"


@token.command("add", "Make a token, and print it once: what is kept of it can't be turned back.")
@click.option("--read-only", is_flag=True, help="It may read: list, check, restore, copy from here.")
@click.option("--append-only", is_flag=True, help="It may read, and add backups; change nothing.")
@click.option("--full", is_flag=True, help="It may do everything: create, remove, maintain.")
@click.option("--label", default="", metavar="TEXT", help="What to know it by: whose it is.")
@click.pass_obj
def add(session: Session, /, label: str, **rights: bool) -> int:
    """Make a token."""
    given = [name.replace("_", "-") for name, is_given in rights.items() if is_given]
    if len(given) != 1:
        raise UsageError(
            "what may the token do?", remedy="say --read-only, --append-only (for backups of another host) or --full"
        )
    [right] = given

    async def run() -> int:
        made, text = (await _tokens(session)).add(right, label)
        session.display.line(text)
        session.display.note(f"token {made.token_id} is {right}; it is shown this once: COFFRET_SERVER_TOKEN takes it")
        session.display.summary("", **_fields(made), token=text)
        return 0

    return session.run(run)


@token.command("rm", "Remove the token with this id (see list); a running server refuses it at once.")
@click.argument("token_id", metavar="ID")
@click.pass_obj
def rm(session: Session, token_id: str) -> int:
    """Remove a token."""

    async def run() -> int:
        removed = (await _tokens(session)).remove(token_id)
        session.display.summary(f"server: removed token {removed.token_id}", **_fields(removed))
        return 0

    return session.run(run)


@token.command("list", "List the tokens: id, right, when it was made, label.")
@click.pass_obj
def list_(session: Session) -> int:
    """List the tokens."""

    async def run() -> int:
        tokens = (await _tokens(session)).tokens()
        for each in tokens:
            label = printable(os.fsencode(each.label))
            session.display.line(f"{each.token_id}   {each.right:<11}   {each.created}   {label}".rstrip())
            session.display.item(**_fields(each))
        session.display.summary("", tokens=len(tokens))
        return 0

    return session.run(run)


async def _tokens(session: Session) -> TokenFile:
    """The tokens of the repository that is meant; it is not opened, and need not even be there."""
    from coffret.engine.server.tokens import TokenFile

    async with bare_storage(session.location, session.options) as connector:
        return TokenFile(connector.location, session.options.state_dir)


def _fields(made: Token) -> dict[str, str]:
    return {"token_id": made.token_id, "right": made.right, "created": made.created, "label": made.label}
