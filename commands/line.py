"""What the words of a command line mean: what is global, which repository, which command, what is the command's own.

    coffret [GLOBAL] [at|on REPO] COMMAND …

Global options may stand anywhere, long options may have one dash, and short ones may be written together, which is
more than click knows. So the line is sorted here, and click gets a command's own words in the one form it takes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

#: The exit code of what is done, but for a part that could not be read, copied or written.
PARTLY = 3
# Command → (module in commands/, what --help says). A module is imported when its command is used.
COMMANDS = {
    "version": ("version", "Print the version."),
    "create": ("create", "Create a repository."),
    "backup": ("backup", "Back up paths (default: the current directory) as one snapshot."),
    "push": ("backup", "The same as backup."),
    "ls": ("ls", "List snapshots, or what lies in one."),
    "check": ("check", "Verify snapshots, or the whole repository."),
    "restore": ("restore", "Restore a snapshot, or a part of it, into a directory."),
    "repair": ("repair", "Rebuild the index, or what is whole of damaged snapshots."),
    "sync": ("sync", "Copy snapshots to, from or with another repository."),
    "clone": ("clone", "Make an exact copy of the repository, or bring one up to date."),
    "rm": ("rm", "Remove snapshots from the list."),
    "prune": ("prune", "Remove the snapshots that a policy does not keep."),
    "maintenance": ("maintenance", "Give back the space of what was removed."),
    "info": ("info", "Tell what is known of a repository."),
    "passphrase": ("passphrase", "Add, change, remove, list or export passphrases."),
    "server": ("server", "Serve a repository to other hosts; make tokens for them."),
}
FLAGS = {
    "-q": "quiet",
    "--quiet": "quiet",
    "-v": "verbose",
    "--verbose": "verbose",
    "--json": "json",
    "--no-cache": "no_cache",
    "--insecure": "insecure",
}
VALUES = {
    "--connections": "connections",
    "--limit-upload": "limit_upload",
    "--limit-download": "limit_download",
    "--workers": "workers",
    "--cache-dir": "cache_dir",
    "--expect-id": "expect_id",
    "--expect-state": "expect_state",
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
  --limit-upload RATE   at most so many bytes a second over all connections: 500K, 10M
  --limit-download RATE the same for what is read
  --workers N           processes that read, cut and hash (default 4), or open and write (default 3)
  --cache-dir DIR       where to keep the local cache
  --no-cache            keep no local cache
  --insecure            speak to a server on another host without TLS, or serve one so
  --expect-id ID        fail unless the repository has this id; accepts a repository that has changed
  --expect-state STATE  fail unless the snapshots are there that were when a backup told this state; newer ones may be,
                        and others that were seen here are not missed any more
  -o KEY=VALUE          an option of the storage
  --help                this text, or a command's

`coffret COMMAND --help`, or `coffret help COMMAND`, tells a command's own options.
"""
# What stands below the options of each command.
EPILOG = "Global options (-q, -v, --json, --workers N and others) may stand here too: see `coffret --help`."
_HELP = ("help", "-h", "-help", "--help")
# Name → whether it takes a value.
Options = Mapping[str, bool]
_GLOBAL: Options = {**dict.fromkeys(FLAGS, False), **dict.fromkeys(VALUES, True)}


class LineError(Exception):
    """The command line makes no sense. `command`: whose help tells more, "" if it is the program's."""

    command = ""


class Globals:
    """The global options, and the repository they go with: "" if the line names none.

    No record as others are: help and wrong lines are answered before what that takes is imported.
    """

    quiet = verbose = json = no_cache = insecure = False
    connections: int | None = None
    limit_upload: str | None = None
    limit_download: str | None = None
    workers: int | None = None
    cache_dir: str | None = None
    expect_id: str | None = None
    expect_state: str | None = None

    def __init__(self, repository: str = "", options: Mapping[str, str] | None = None) -> None:
        self.repository, self.options = repository, dict(options or {})

    @property
    def location(self) -> str:
        """The repository that is meant: on the line, or else in the environment, where it may be empty."""
        return self.repository or os.environ.get("COFFRET_REPOSITORY", os.path.expanduser("~/.coffret"))


def usage() -> str:
    """What `coffret --help` prints."""
    return USAGE.format(commands="\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()))


def load_command(name: str) -> click.Command:
    """The click command of a name in COMMANDS."""
    command: click.Command = import_module(f"coffret.commands.{COMMANDS[name][0]}").command
    return command


def begin_line(arguments: list[str]) -> tuple[Globals, str, list[str]]:
    """Split a command line into the global options before the command, its name, and what follows it.

    The name is `help` if that is what is asked for before any command.

    :raises LineError: if there is no command, or an option is not known, or lacks its value or has an empty one
    """
    found, rest = Globals(), list(arguments)
    while rest:
        word = rest[0]
        if word in COMMANDS:
            return found, word, rest[1:]
        if word in _HELP:
            return found, "help", rest[1:]
        if word in ("at", "on"):
            rest.pop(0)
            found.repository = _value(rest, word, "a repository")
        elif _is_option(word):
            for option, value in _take_option(rest, _GLOBAL):
                _set_global(found, option, value)
        else:
            raise LineError(f"no command {word!r}")
    raise LineError("no command")


def own_arguments(name: str, rest: list[str], found: Globals) -> list[str]:
    """The arguments of a command, in click's form; the global options among them go to `found`.

    :raises LineError: as `begin_line` does
    """
    command = load_command(name)
    own_options = _options_of(command)
    known, group = {**_GLOBAL, **own_options}, command
    path, own = [name], []
    try:
        while rest and rest[0] != "--":
            if not _is_option(rest[0]):
                word = rest.pop(0)
                own.append(word)
                if word in getattr(group, "commands", {}):
                    path.append(word)
                    group = getattr(group, "commands", {})[word]
                continue
            for option, value in _take_option(rest, known):
                if option not in own_options:
                    _set_global(found, option, value)
                else:
                    own += [option] if value is None else [option, value]
        own += rest
        if "" in own:
            raise LineError("an argument is empty")
        return own
    except LineError as error:
        error.command = " ".join(path)
        raise


def _options_of(command: click.Command) -> Options:
    """The options of a command and its subcommands, however deep."""
    options = {"-h": False, "--help": False}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            takes_value = not getattr(parameter, "is_flag", False)
            options |= dict.fromkeys((*parameter.opts, *parameter.secondary_opts), takes_value)
    for each in getattr(command, "commands", {}).values():
        options |= _options_of(each)
    return options


def _is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-"


def _take_option(rest: list[str], known: Options) -> list[tuple[str, str | None]]:
    """Take the option off the front of the line: (its name in `known`, its value or None).

    Several, if the word is some short ones written together.

    :raises LineError: if it is not known, has a value that it does not take, or lacks one
    """
    word = rest.pop(0)
    name, equals, value = word.partition("=")
    long = name if name.startswith("--") else f"-{name}"
    if long in known:
        if known[long]:
            return [(long, _value([value], name) if equals else _value(rest, name))]
        if equals:
            raise LineError(f"{name} takes no value")
        return [(long, None)]
    taken: list[tuple[str, str | None]] = []
    letters = "" if word.startswith("--") else word[1:]
    while letters and f"-{letters[0]}" in known:
        short, letters = f"-{letters[0]}", letters[1:]
        if known[short]:
            return [*taken, (short, letters or _value(rest, short))]
        taken.append((short, None))
    if taken and not letters:
        return taken
    from difflib import get_close_matches

    meant = get_close_matches(long, known, 1, 0.75)
    raise LineError(f"no option {name}" + (f"; did you mean {meant[0]}?" if meant else ""))


def _value(rest: list[str], name: str, what: str = "a value") -> str:
    """Take the value of an option, or of `at`, off the front of the line.

    An empty one is a variable that was not set, as a rule: no default must take its place.
    """
    if not rest:
        raise LineError(f"{name} needs {what}")
    if not rest[0]:
        raise LineError(f"{name} needs {what} that is not empty")
    return rest.pop(0)


def _set_global(found: Globals, option: str, value: str | None) -> None:
    """Note a global option.

    :raises LineError: if it makes no sense with this value
    """
    if value is None:
        setattr(found, FLAGS[option], True)
        return
    key = VALUES[option]
    if key == "option":
        name, equals, setting = value.partition("=")
        if not name or not equals:
            raise LineError(f"{option} wants KEY=VALUE, not {value!r}")
        found.options[name] = setting
    elif key in ("connections", "workers"):
        if not value.isdecimal() or not 1 <= int(value) <= 256:
            raise LineError(f"{option} wants a number from 1 to 256, not {value!r}")
        setattr(found, key, int(value))
    else:
        setattr(found, key, value)
