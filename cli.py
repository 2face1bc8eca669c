"""The program `coffret`: what is done before any command is known, and how it ends.

What the words of the line mean is told in `commands/line.py`; `commands/` has the commands. Nothing is imported here
that takes time: until `main` is at work, a Ctrl-C ends the program with a traceback of Python's own.
"""

from __future__ import annotations

import errno
import os
import sys

from coffret import __version__

TYPE_CHECKING = False  # as type checkers know it: `typing` takes time to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

# Of `coffret.engine.errors`, which is imported only when something is to be done.
_FAILED, _USAGE, _OUT_OF_SPACE, _INTERRUPTED = 1, 2, 13, 130


def main() -> NoReturn:
    """The program. It ends the process with a code of `coffret.engine.errors`: 0 only when all was done.

    At once: all that a command has begun is done by then, and the interpreter's own end would take 10 to 40 ms more.
    What `atexit` has been given is not called.
    """
    try:
        _at_signals(_end_interrupted)
        _make_standard_files()
        code = run(sys.argv[1:])
        sys.stdout.flush()
        _at_signals(lambda: os._exit(code))
    except KeyboardInterrupt:
        _tell_interrupted()
        code = _INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone: nobody is left to tell
        _forget_output()
        code = _FAILED
    except (MemoryError, ImportError, SystemError) as error:
        # As in `engine/errors.py`, for which there may be no memory.
        signs = ("failed to map segment", "return without exception set", "without setting an exception")
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
            raise
        _write(2, "coffret: not enough memory (end other programs, or raise the limit: ulimit -v)")
        code = _FAILED
    except OSError as error:
        # All that commands do is reported by them: this was printing, a help text say.
        _forget_output()
        _write(2, f"coffret: standard output can't be written: {error.strerror} (direct it elsewhere)")
        code = _OUT_OF_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else _FAILED
    for file in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - contextlib takes time to import
            file.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run a command line; return the exit code."""
    if arguments in (["version"], ["--version"], ["-version"]):  # answered before anything else is imported
        print(f"coffret {__version__}")
        return 0
    from coffret.commands.line import LineError, begin_line, load_command, own_arguments, usage

    if not arguments:
        print(usage(), end="", file=sys.stderr)
        return _USAGE
    try:
        globals_, name, rest = begin_line(arguments)
        if name == "help":
            if rest:
                return run([*rest, "--help"])
            print(usage(), end="")
            return 0
        from coffret.commands.early import derive_early

        derivation = derive_early(name, rest, globals_)
        rest = own_arguments(name, rest, globals_)
    except LineError as error:
        from coffret.display import Display
        from coffret.engine.errors import UsageError

        see = f"see `coffret{' ' * bool(error.command)}{error.command} --help`"
        display = Display("coffret", quiet=False, verbose=False, as_json=_wants_json(arguments))
        display.error(UsageError(str(error), remedy=see))
        return _USAGE
    from coffret.commands.running import invoke

    return invoke(load_command(name), name, rest, globals_, derivation)


def _at_signals(end: Callable[[], object]) -> None:
    """Before a command is at work, and after it, a signal ends the program there and then: nothing is half done.

    Not by an exception, which is lost where Python can't pass it on: in the callbacks of an import, or of its own end.
    """
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup`, or `&` in a script, asks for that
            signal.signal(number, lambda number, frame: end())


def _end_interrupted() -> None:
    _tell_interrupted()
    os._exit(_INTERRUPTED)


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


def _wants_json(arguments: list[str]) -> bool:
    return "--json" in arguments or "-json" in arguments


def _tell_interrupted() -> None:
    if _wants_json(sys.argv):
        _write(1, f'{{"message_type": "error", "message": "interrupted", "remedy": "", "code": {_INTERRUPTED}}}')
    _write(2, "coffret: interrupted")


def _write(descriptor: int, line: str) -> None:
    """Write a line past all buffers, since this may be amid anything; whether anybody reads it does not matter."""
    try:  # noqa: SIM105 - contextlib takes time to import
        os.write(descriptor, f"{line}\n".encode())
    except OSError:
        pass


def _forget_output() -> None:
    """What is printed from now on, and what could not be, goes nowhere: else Python tries again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
