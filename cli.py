"""The command line: `coffret [GLOBAL] [at|on REPO] COMMAND …`: what the words mean; `commands/` has the commands.

Global options may stand anywhere on the line, and long options may have one dash, so the line is sorted first: what is
global, which repository, which command; the rest is the command's own, parsed by click.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

from coffret import __version__

if TYPE_CHECKING:
    import click

# Command → (module in commands/, what --help says). A module is imported when its command is used.
COMMANDS = {
    "version": ("version", "Print the version."),
    "create": ("create", "Create a repository."),
    "backup": ("backup", "Back up paths (default: the current directory) as one snapshot."),
    "push": ("backup", "The same as backup."),
    "ls": ("ls", "List snapshots, or what lies in one."),
    "check": ("check", "Verify snapshots, or the whole repository."),
    "restore": ("restore", "Restore a snapshot, or a part of it, into a directory."),
    "info": ("info", "Tell what is known of a repository."),
    "passphrase": ("passphrase", "Add, change, remove, list or export passphrases."),
}
FLAGS = {
    "-q": "quiet",
    "--quiet": "quiet",
    "-v": "verbose",
    "--verbose": "verbose",
    "--json": "json",
    "--no-cache": "no_cache",
}
VALUES = {
    "--connections": "connections",
    "--workers": "workers",
    "--cache-dir": "cache_dir",
    "--expect-id": "expect_id",
    "-o": "option",
    "--option": "option",
}
USAGE = """\
Usage: coffret [GLOBAL OPTIONS] [at|on REPOSITORY] COMMAND [ARGUMENTS]

The repository defaults to $COFFRET_REPOSITORY, then to ~/.coffret.

Commands:
{commands}

Global options, anywhere on the line:
  -q, --quiet           only errors
  -v, --verbose         a line for each path
  --json                one JSON object a line on standard output (docs/json.md)
  --connections N       transfers at a time
  --workers N           processes that read, cut and hash (default 4)
  --cache-dir DIR       where to keep the local cache
  --no-cache            keep no local cache
  --expect-id ID        fail unless the repository has this id; accepts a repository that has changed
  -o KEY=VALUE          an option of the storage
  --help                this text, or a command's

`coffret COMMAND --help` tells a command's own options.
"""


class LineError(Exception):
    """The command line makes no sense."""


@dataclass(slots=True)
class Globals:
    """The global options, and the repository they go with."""

    repository: str = ""
    quiet: bool = False
    verbose: bool = False
    json: bool = False
    no_cache: bool = False
    connections: int | None = None
    workers: int | None = None
    cache_dir: str | None = None
    expect_id: str | None = None
    options: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """The program. Exits with a code of `coffret.engine.errors`: 0 only when all that was asked for was done."""
    _make_standard_files()
    # Until the event loop takes both, SIGTERM is the same as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("coffret: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code)


def _make_standard_files() -> None:
    """Started with standard files closed (`>&-`): no file that is opened later must be taken for one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def run(arguments: list[str]) -> int:
    """Run a command line; return the exit code."""
    if arguments in (["version"], ["--version"], ["-version"]):  # answered before anything else is imported
        print(f"coffret {__version__}")
        return 0
    if not arguments:
        print(usage(), end="", file=sys.stderr)
        return 2
    try:
        globals_, name, rest = sort_line(arguments)
    except LineError as error:
        from coffret.display import Display
        from coffret.engine.errors import UsageError

        as_json = not {"--json", "-json"}.isdisjoint(arguments)
        Display("coffret", quiet=False, verbose=False, as_json=as_json).error(UsageError(str(error)))
        return UsageError.exit_code
    if name == "help":
        print(usage(), end="")
        return 0
    from coffret.commands.running import invoke

    return invoke(load_command(name), name, rest, globals_)


def usage() -> str:
    """What `coffret --help` prints."""
    return USAGE.format(commands="\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()))


def load_command(name: str) -> click.Command:
    """The click command of a name in COMMANDS."""
    command: click.Command = import_module(f"coffret.commands.{COMMANDS[name][0]}").command
    return command


def sort_line(arguments: list[str]) -> tuple[Globals, str, list[str]]:
    """Split a command line into global options, the command's name, and the command's own arguments.

    The name is `help` if that is what is asked for before any command.

    :raises LineError: if there is no command, or an option lacks its value
    """
    found = Globals()
    rest = list(arguments)
    name = ""
    while rest and not name:
        if take_global(rest, found):
            continue
        word = rest.pop(0)
        if word in ("-h", "-help", "--help", "help"):
            return found, "help", rest
        if word in ("at", "on"):
            if not rest:
                raise LineError(f"{word!r} needs a repository")
            found.repository = rest.pop(0)
        elif word in COMMANDS:
            name = word
        elif word.startswith("-"):
            raise LineError(f"no global option {word}")
        else:
            raise LineError(f"no command {word!r}")
    if not name:
        raise LineError("no command")
    flags, values = own_options(load_command(name))
    own: list[str] = []
    while rest:
        word = normalised(rest[0], flags | values)
        if word == "--":
            own += rest
            break
        if word in values:
            own.append(word)
            rest.pop(0)
            if rest:
                own.append(rest.pop(0))
        elif word.partition("=")[0] in flags | values or not take_global(rest, found):
            own.append(word)
            rest.pop(0)
    found.repository = found.repository or os.environ.get("COFFRET_REPOSITORY", "") or os.path.expanduser("~/.coffret")
    return found, name, own


def take_global(rest: list[str], found: Globals) -> bool:
    """Take a global option off the front of the line, if there is one.

    :raises LineError: if it lacks its value
    """
    word, equals, value = normalised(rest[0], FLAGS.keys() | VALUES.keys()).partition("=")
    if word in FLAGS and not equals:
        setattr(found, FLAGS[word], True)
        rest.pop(0)
        return True
    if word not in VALUES:
        return False
    rest.pop(0)
    if not equals:
        if not rest:
            raise LineError(f"{word} needs a value")
        value = rest.pop(0)
    key = VALUES[word]
    if key == "option":
        option, equals, setting = value.partition("=")
        if not equals:
            raise LineError(f"{word} wants KEY=VALUE, not {value!r}")
        found.options[option] = setting
    elif key in ("connections", "workers"):
        if not value.isdecimal() or not 1 <= int(value) <= 256:
            raise LineError(f"{word} wants a number from 1 to 256, not {value!r}")
        setattr(found, key, int(value))
    else:
        setattr(found, key, value)
    return True


def normalised(word: str, known: set[str]) -> str:
    """`-to` and `--to` are the same option."""
    if len(word) > 2 and word[0] == "-" and word[1] != "-" and f"-{word.partition('=')[0]}" in known:
        return f"-{word}"
    return word


def own_options(command: click.Command) -> tuple[set[str], set[str]]:
    """(flags, options with a value) of a command and its subcommands."""
    flags: set[str] = {"-h", "--help"}
    values: set[str] = set()
    for each in (command, *getattr(command, "commands", {}).values()):
        for parameter in each.params:
            if parameter.param_type_name == "option":
                names = {*parameter.opts, *parameter.secondary_opts}
                (flags if getattr(parameter, "is_flag", False) else values).update(names)
    return flags, values
