"""What every command shares: repository, passphrase, display, signals, and errors turned into exit codes."""

from __future__ import annotations

import gc
import getpass
import math
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import click
import msgspec

from coffret.connectors.registry import Transfers
from coffret.display import Display, ReaderGone, terminal
from coffret.engine.errors import CoffretError, Damaged, OutOfSpace, UsageError, WrongPassphrase, reported
from coffret.engine.opening import open_repository
from coffret.engine.passphrase import (
    PREFIX,
    passphrase_from_environment,
    passphrase_is_at_hand,
    passphrase_is_set,
    passphrase_variables,
)
from coffret.engine.processes import STOPPING
from coffret.engine.repository import OpenOptions
from coffret.engine.units import parse_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from coffret.commands.line import Globals
    from coffret.connectors.errors import ConnectorError
    from coffret.engine.derivation import Derivation
    from coffret.engine.repository import Repository

INTERRUPTED = 130
# What `check` says of damage, also where it is so bad that nothing more can be checked.
DAMAGE_FOUND = 4
# The variables that give the passphrase of the other repository of a command begin so.
PEER_PREFIX = "COFFRET_PEER_PASSPHRASE"
# Commands that, interrupted, go on where they were when they are run again.
_TAKEN_UP = ("backup", "push", "clone", "sync")
_SWITCH_S = 0.0005
_TOLD_EVERY_S = 1.0
_GC_THRESHOLD = 50_000


class Session:
    """One run of a command: its global options, its display."""

    def __init__(self, name: str, globals_: Globals, derivation: Derivation | None = None) -> None:
        self.name, self.globals, self._derivation = name, globals_, derivation
        self.display = Display(name, quiet=globals_.quiet, verbose=globals_.verbose, as_json=globals_.json)
        # What is to be done if the passphrase that was given is wrong.
        self._check_passphrase = ""
        # What is imported while the key is derived.
        self._ahead: Sequence[str] = ()
        # When it was last told that something is tried again.
        self._retry_told_s = -math.inf

    @property
    def location(self) -> str:
        """The repository that is meant, as it was given: on the line, or else in the environment.

        :raises UsageError: if the environment's is empty
        """
        if not self.globals.location:
            raise UsageError("COFFRET_REPOSITORY is empty", remedy="give it a repository, or unset it")
        return self.globals.location

    @cached_property
    def options(self) -> OpenOptions:
        """What the engine is told of this machine and the storage."""
        found = self.globals
        return OpenOptions(
            connector=found.options,
            transfers=Transfers(
                connections=found.connections,
                upload=_rate(found.limit_upload),
                download=_rate(found.limit_download),
                insecure=found.insecure,
                on_retry=self._retrying,
            ),
            cache_dir=Path(found.cache_dir) if found.cache_dir else None,
            use_cache=not found.no_cache,
            expect_id=found.expect_id,
            expect_state=found.expect_state,
            encrypted_only=passphrase_is_set(os.environ),
            passphrase_at_hand=passphrase_is_at_hand(os.environ),
            derivation=self._derivation,
        )

    @cached_property
    def peer_options(self) -> OpenOptions:
        """The same for the other repository of a command: what is asked of R's storage or id is not asked of this one.

        What its connector is to know stands in the query of its URL.
        """
        return msgspec.structs.replace(
            self.options,
            connector={},
            expect_id=None,
            expect_state=None,
            encrypted_only=passphrase_is_set(os.environ, PEER_PREFIX),
            passphrase_at_hand=passphrase_is_at_hand(os.environ, PEER_PREFIX),
            derivation=None,
        )

    def _retrying(self, what: str, error: ConnectorError) -> None:
        """Tell of it, once a second at most: many transfers fail together."""
        now_s = time.monotonic()
        if now_s - self._retry_told_s >= _TOLD_EVERY_S:
            self._retry_told_s = now_s
            self.display.note(f"{what} is tried again: {error}")

    @asynccontextmanager
    async def repository(
        self, *ahead: str, writing: bool = False, listing: bool = False, transfers: bool = False
    ) -> AsyncIterator[Repository]:
        """The repository of the command line, opened. `ahead`: modules that will be needed.

        `writing`, for a backup, `listing`, for what reads snapshots, and `transfers`: see `open_repository`.
        """
        self._ahead = ("coffret.engine.mirror", *ahead)
        if self._derivation is not None:
            self._import_ahead()
        async with open_repository(
            self.location,
            passphrase=self.passphrase,
            options=self.options,
            writing=writing,
            listing=listing,
            transfers=transfers,
        ) as opened:
            self._check_passphrase = ""  # it is right
            self.display.storage_calls = self.options.calls[opened.connector.location]
            self.display.begin()
            try:
                yield opened
            finally:
                for note in opened.notes:
                    self.display.note(note)

    @asynccontextmanager
    async def peer(self, location: str, *ahead: str, writing: bool = False) -> AsyncIterator[Repository]:
        """The other repository of a command, opened with a passphrase of its own; for the rest as `repository`.

        Of the two, one is opened after the other.
        """
        self._ahead = ("coffret.engine.mirror", *ahead)
        async with open_repository(
            location, passphrase=self._peer_passphrase, options=self.peer_options, writing=writing
        ) as opened:
            self._check_passphrase = ""
            self.display.begin()
            try:
                yield opened
            finally:
                for note in opened.notes:
                    self.display.note(f"peer: {note}")

    def passphrase(self) -> bytes:
        """The passphrase of an existing repository, from the environment, or asked for once on a terminal.

        :raises WrongPassphrase: if there is none
        """
        return self._existing_passphrase(PREFIX, "repository")

    def _peer_passphrase(self) -> bytes:
        return self._existing_passphrase(PEER_PREFIX, "peer repository")

    def _existing_passphrase(self, prefix: str, which: str) -> bytes:
        found = passphrase_from_environment(os.environ, prefix)
        variables = passphrase_variables(prefix)
        if found is not None:
            [variable] = (name for name in variables if name in os.environ)
            self._check_passphrase = f"{variable} gives another than any of this {which}'s"
        elif not terminal():
            remedy = f"set {variables[0]}, {variables[1]} or {variables[2]}, or run on a terminal"
            raise WrongPassphrase(f"the {which} is encrypted and no passphrase was given", remedy=remedy)
        else:
            self._check_passphrase = "type it again: upper case, lower case and the keyboard's layout matter"
            found = ask(f"{which} passphrase: ")
        self._import_ahead()
        return found

    def _import_ahead(self) -> None:
        """While the key is derived, which takes 0.14 s of one core without the interpreter, use the other."""
        modules, self._ahead = self._ahead, ()
        if modules:
            with suppress(RuntimeError):  # no further thread can be started
                threading.Thread(target=_import_all, args=(modules,), name="imports").start()

    def run(
        self,
        operation: Callable[[], Awaitable[int]],
        *,
        progress: bool = False,
        on_stop: Callable[[], object] | None = None,
    ) -> int:
        """Run an operation in the event loop, with the display beside it if `progress`; return the exit code.

        Ctrl-C, SIGTERM and SIGHUP cancel it, and it ends cleanly; a second Ctrl-C or SIGTERM kills it. What goes on
        until it is told to end is given `on_stop`, which the first signal calls: its end is no interruption then.
        """
        asked, interrupted = False, False

        async def watch(signals: AsyncIterator[signal.Signals], scope: anyio.CancelScope) -> None:
            nonlocal asked, interrupted
            async for number in signals:
                if asked and number == signal.SIGHUP:
                    continue
                if on_stop is not None and not asked:
                    asked = True
                    self.display.note(f"{number.name}: stopping when what is under way is done")
                    on_stop()
                    continue
                asked = True
                if interrupted:
                    self.display.close()
                    os.kill(os.getpid(), signal.SIGKILL)
                interrupted = True
                self.display.note(f"{number.name}: stopping")
                scope.cancel()

        async def guarded() -> int:
            # Who ignores one from the start, by `nohup` say, goes on doing so.
            with anyio.open_signal_receiver(*(s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN)) as signals:
                return await supervised(signals)

        async def supervised(signals: AsyncIterator[signal.Signals]) -> int:
            code = INTERRUPTED
            async with anyio.create_task_group() as group:
                group.start_soon(watch, signals, group.cancel_scope)
                if progress:
                    group.start_soon(self.display.run)
                code = await operation()
                group.cancel_scope.cancel()
            return code

        # A loop that shares the interpreter with scanning and sealing threads must get it back quickly: with the
        # default of 5 ms each wake-up waits that long while a thread runs.
        sys.setswitchinterval(_SWITCH_S)
        # What is imported by now stays; of what a run makes little is cyclic, and looking for it took 3 % of a backup.
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD, 20, 20)
        try:
            code = anyio.run(guarded)
        except BaseException as error:
            if interrupted:
                code = INTERRUPTED
            else:
                return self._report(error)
        if interrupted and code == INTERRUPTED:  # not if all was done by then
            kept = "; what was stored is kept and will be taken up" if self.name in _TAKEN_UP else ""
            self.display.error(Interrupted(f"interrupted{kept}"))
            return INTERRUPTED
        return code

    def _report(self, error: BaseException) -> int:
        known = reported(error)
        if isinstance(first_of(error), ReaderGone):  # the reader of our output is gone: nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        if known is None:
            inner = first_of(error)
            if not isinstance(inner, Exception):
                raise inner from None
            if os.environ.get("COFFRET_TRACEBACK"):
                traceback.print_exception(error)
            known = CoffretError(
                f"unexpected {type(inner).__name__}: {inner}",
                remedy="this is a bug; COFFRET_TRACEBACK=1 tells where, please report it",
            )
        self._advise(known)
        self.display.error(known)
        return known.exit_code

    def _advise(self, error: CoffretError) -> None:
        """Let an error say what helps this command."""
        if isinstance(error, WrongPassphrase) and error.remedy == WrongPassphrase.remedy:
            error.remedy = self._check_passphrase or error.remedy
        elif isinstance(error, OutOfSpace) and self.name in _TAKEN_UP:
            error.remedy += "; what was stored is kept"
        elif isinstance(error, Damaged) and self.name == "check":
            error.exit_code = DAMAGE_FOUND
            if error.remedy == Damaged.remedy:
                error.remedy = "nothing more can be checked without it; put it back from a copy of the repository"


class Interrupted(CoffretError):
    """Ctrl-C."""

    exit_code = INTERRUPTED


def first_of(error: BaseException) -> BaseException:
    """The first error inside groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def invoke(
    command: click.Command, name: str, arguments: list[str], globals_: Globals, derivation: Derivation | None = None
) -> int:
    """Parse a command's own arguments and run it; return the exit code. `derivation`: of the repository's keys."""
    session = Session(name, globals_, derivation)
    try:
        names = ["-h", "--help"]
        with command.make_context(f"coffret {name}", arguments, obj=session, help_option_names=names) as context:
            code = command.invoke(context)
        sys.stdout.flush()
        return int(code or 0)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else f"coffret {name}"
        session.display.error(UsageError(error.format_message(), remedy=f"see `{path} --help`"))
        return UsageError.exit_code
    except CoffretError as error:
        session.display.error(error)
        return error.exit_code


def ask(prompt: str) -> bytes:
    """A passphrase from the terminal, as UTF-8. A signal ends the program here, not when Enter is pressed.

    :raises Interrupted: if one comes
    :raises WrongPassphrase: if the terminal is at its end
    """
    # The event loop stands still meanwhile: the signals can't wait for it.
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOPPING}
    try:
        return getpass.getpass(prompt).encode("utf-8", "surrogateescape")
    except EOFError:
        print(file=sys.stderr)
        raise WrongPassphrase("no passphrase was typed", remedy="run the command again and type it") from None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise Interrupted("interrupted") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def new_passphrase(
    prompt: str = "repository passphrase", prefix: str = PREFIX, *, if_empty: str = "choose one"
) -> bytes:
    """A passphrase for something new: from the environment, or asked for twice on a terminal.

    `if_empty`: what to do when an empty one is typed.

    :raises WrongPassphrase: if there is none
    :raises UsageError: if it is empty, or the two differ
    """
    found = passphrase_from_environment(os.environ, prefix)
    if found is not None:
        return found
    if not terminal():
        value, file, command = passphrase_variables(prefix)
        remedy = f"set {value}, {file} or {command}, or run on a terminal"
        raise WrongPassphrase("a new passphrase is needed and none was given", remedy=remedy)
    first = ask(f"{prompt}: ")
    if not first:
        raise UsageError("the passphrase is empty", remedy=if_empty)
    if ask(f"{prompt} (confirm): ") != first:
        raise UsageError("the passphrases differ", remedy="run the command again and type the same one twice")
    return first


def split_target(text: str) -> tuple[str, bytes | None]:
    """SNAPSHOT[:PATH] as (snapshot, absolute path or None)."""
    snapshot, colon, path = text.partition(":")
    if not colon:
        return snapshot, None
    return snapshot, os.path.normpath(b"/" + os.fsencode(path).lstrip(b"/"))


def common_path(roots: Sequence[bytes]) -> bytes:
    """The path a snapshot's roots are shown under."""
    return roots[0] if len(roots) == 1 else os.path.commonpath(roots)


def _import_all(modules: Sequence[str]) -> None:
    """Import modules; where that fails whoever needs them will say so."""
    with suppress(ImportError, MemoryError):
        for module in modules:
            import_module(module)


def _rate(text: str | None) -> float | None:
    """Bytes a second, of a `--limit-…`; None for no limit.

    :raises UsageError: if it is no size, or so low that nothing would ever end
    """
    if text is None:
        return None
    rate = parse_size(text)
    if rate < 1024:
        raise UsageError(f"{text} bytes a second are too few", remedy="give a rate such as 500K or 10M")
    return float(rate)
