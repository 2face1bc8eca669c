"""Where passphrases come from when nobody types them: the environment, a file, a command.

A passphrase is UTF-8 as it is, with one trailing newline dropped. No error says what a value was, nor what a command
wrote: both could be the passphrase.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from coffret.engine.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "COFFRET_PASSPHRASE"
# More than anyone types or any manager makes; and /dev/zero has an end.
MAX_PASSPHRASE_BYTES = 64 << 10


def passphrase_variables(prefix: str = PREFIX) -> tuple[str, str, str]:
    """The variables that may give a passphrase: as it is, in a file, by a command."""
    return prefix, f"{prefix}_FILE", f"{prefix}_COMMAND"


def passphrase_is_set(env: Mapping[str, str], prefix: str = PREFIX) -> bool:
    """Whether one of the variables is set, to whatever value."""
    return any(name in env for name in passphrase_variables(prefix))


def passphrase_is_at_hand(env: Mapping[str, str], prefix: str = PREFIX) -> bool:
    """Whether it can be had at once: a command may ask for it on the terminal, and a pipe may be empty still."""
    plain, file, command = passphrase_variables(prefix)
    if command in env:
        return False
    # What lies in these is a pipe's or another's end, whatever it is now: it may be there only once.
    return plain in env or (file in env and os.path.isfile(env[file]) and not env[file].startswith(("/dev/", "/proc/")))


def passphrase_from_environment(env: Mapping[str, str], prefix: str = PREFIX) -> bytes | None:
    """The passphrase that `prefix`, `prefix`_FILE or `prefix`_COMMAND gives; None if none of them is set.

    Blocks while a command runs (for as long as a password manager's dialogue stands open): call it in a thread.

    :raises UsageError: if more than one is set, or what is set gives no passphrase
    """
    names = [name for name in passphrase_variables(prefix) if name in env]
    if not names:
        return None
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} are set", remedy="set only one of them")
    name = names[0]
    if name == prefix:
        data = os.fsencode(env[name])
    elif name.endswith("_FILE"):
        data = _from_file(name, env[name])
    else:
        data = _from_command(name, env[name])
    return checked_passphrase(data, name)


def checked_passphrase(data: bytes, source: str) -> bytes:
    """A passphrase as it is used, from what was read; `source` names where from, in errors.

    :raises UsageError: if it is empty, absurdly long or not UTF-8
    """
    if data.endswith(b"\n"):
        data = data[:-1].removesuffix(b"\r")
    if not data:
        raise UsageError(f"{source} gives an empty passphrase", remedy="give it a passphrase, or unset it")
    if len(data) > MAX_PASSPHRASE_BYTES:
        raise UsageError(f"{source} gives more than {MAX_PASSPHRASE_BYTES} bytes", remedy="give it a passphrase")
    if not _is_utf8(data):
        raise UsageError(f"{source} gives a passphrase that is not UTF-8", remedy="encode it, as base64 say")
    return data


def _is_utf8(data: bytes) -> bool:
    # Apart from where the error is raised: a UnicodeDecodeError in its context would carry the passphrase.
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _from_file(name: str, path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_PASSPHRASE_BYTES + 3)
    except (OSError, ValueError) as error:
        # Without the path: a passphrase put into this variable by mistake would be shown.
        reason = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise UsageError(f"{name} can't be read: {reason}", remedy="name a file that holds the passphrase") from None


def _from_command(name: str, line: str) -> bytes:
    """Standard output of a command, run without a shell; its standard input and error are this program's."""
    import shlex
    import subprocess

    from coffret.engine.processes import environment

    try:
        command = shlex.split(line)
        if not command:
            raise UsageError(f"{name} is empty", remedy="give it a command, or unset it")
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
            data = process.stdout.read(MAX_PASSPHRASE_BYTES + 3) if process.stdout else b""
            if len(data) > MAX_PASSPHRASE_BYTES + 2:
                process.kill()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no command line"
        raise UsageError(f"{name} can't be run: {reason}", remedy="give it a command; there is no shell") from None
    code = process.returncode
    if code and len(data) <= MAX_PASSPHRASE_BYTES + 2:
        how = f"ended with code {code}" if code > 0 else f"was killed by signal {-code}"
        raise UsageError(f"the command in {name} {how}", remedy="run it by itself to see why")
    return data
