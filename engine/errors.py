"""What can go wrong, by what the user can do about it. Each class has its exit code and a remedy.

CoffretError                1
├── UsageError              2   the command line or the environment asks for something that makes no sense
├── NoRepository           10   nothing there, or something else
├── WrongPassphrase        12
├── RepositoryChanged       1   not the repository that was here before
├── UnsupportedVersion      1   made by a newer Coffret
├── Damaged                 1   stored bytes are not what was written (4 from `check`)
│   └── ChunkMissing        1   no usable copy of a chunk
├── StorageError            1   a connector failed
│   └── OutOfSpace         13
├── LeaseLost              11   another process ended this attempt
├── InTheWay               11   another process has to end first
├── SourceError             1   the source can't be read at all
├── TargetError             1   the restore target can't be used
└── WorkerDied              1   a process of the pool ended unexpectedly
"""

import errno
import os

from coffret.connectors import errors as connector_errors

# What helps where the operating system refuses, whoever asked it.
_REMEDIES = {
    errno.ENOMEM: "end other programs, use fewer --workers, or raise the limit (ulimit -v)",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use a file system that takes larger files",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or use fewer --workers",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
#: What helps where a token of `coffret server` is for less than what was asked.
OTHER_TOKEN = "use a token that gives the right to it, or run the command where the server runs"
# How a RuntimeError of `threading` and an ImportError of the dynamic loader say it.
_NO_MEMORY = ("can't start new thread", "failed to map segment")
# How an import says it: the interpreter reads and makes code in places that fail without raising a MemoryError.
_NOTHING_SAID = ("return without exception set", "without setting an exception")


class CoffretError(Exception):
    """Base of all errors that are reported in one line: what happened, and what to do next."""

    exit_code = 1
    remedy = ""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy


class UsageError(CoffretError):
    """The call makes no sense as given."""

    exit_code = 2
    remedy = "see `coffret --help`"


class NoRepository(CoffretError):
    """No repository at the location."""

    exit_code = 10
    remedy = "check the location, or make one with `coffret at REPO create`"


class WrongPassphrase(CoffretError):
    """No key slot opens with this passphrase, or one is needed and none was given."""

    exit_code = 12
    remedy = "set COFFRET_PASSPHRASE, COFFRET_PASSPHRASE_FILE or COFFRET_PASSPHRASE_COMMAND, or run on a terminal"


class RepositoryChanged(CoffretError):
    """The location holds another repository, or another configuration, than when it was last used."""

    remedy = "if that is intended, accept it with --expect-id ID; otherwise do not trust this storage"


class UnsupportedVersion(CoffretError):
    """The repository has a format that this program does not know: a newer one, as a rule."""

    remedy = "use a newer version of coffret"


class Damaged(CoffretError):
    """Stored bytes are not what was written."""

    remedy = "run `coffret at REPO check` to see what else is damaged"


class ChunkMissing(Damaged):
    """A chunk that is needed has no usable copy; `pack`: the id of the pack that should hold it, if one should."""

    def __init__(self, message: str, *, pack: bytes | None = None) -> None:
        super().__init__(message)
        self.pack = pack


class StorageError(CoffretError):
    """The storage failed."""


class OutOfSpace(StorageError):
    """No space left where something was to be written."""

    exit_code = 13
    remedy = "free some space and run the command again"


class LeaseLost(CoffretError):
    """Maintenance or another process ended this attempt, repeatedly."""

    exit_code = 11
    remedy = "run the command again"


class InTheWay(CoffretError):
    """Another process is at work, and has to end before this can be done."""

    exit_code = 11
    remedy = "run the command again when it has ended"


class SourceError(CoffretError):
    """The source can't be read at all."""


class TargetError(CoffretError):
    """The restore target can't be used."""


class WorkerDied(CoffretError):
    """A process of the pool ended unexpectedly."""

    remedy = "run the command again; if it was killed for lack of memory, use fewer --workers"


def reported(error: BaseException) -> CoffretError | None:
    """The error to report for what an operation raised: out of groups, and in the engine's terms; None if unknown.

    Of several, one that is not the mere consequence of another is preferred: a full disk before a dead worker.
    """
    found = [known for known in map(_translated, _leaves(error)) if known is not None]
    return min(found, key=lambda known: isinstance(known, WorkerDied), default=None)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def _translated(error: BaseException) -> CoffretError | None:
    if isinstance(error, CoffretError):
        return error
    if isinstance(error, connector_errors.StorageFull):
        return OutOfSpace(str(error))
    if isinstance(error, connector_errors.InvalidLocation | connector_errors.InvalidName):
        return UsageError(str(error))
    if isinstance(error, connector_errors.NotStorage):
        return NoRepository(str(error))
    if isinstance(error, connector_errors.RightMissing):
        return StorageError(str(error), remedy=OTHER_TOKEN)
    if isinstance(error, connector_errors.AccessDenied):
        return StorageError(str(error))
    if isinstance(error, connector_errors.PermissionRefused):
        return StorageError(str(error), remedy="check the permissions of the storage")
    if isinstance(error, connector_errors.ConnectorError):
        number = getattr(error.__cause__, "errno", 0)
        return StorageError(str(error), remedy=_REMEDIES.get(number, "check the storage and run the command again"))
    if _lacks_memory(error):
        return CoffretError("not enough memory", remedy=_REMEDIES[errno.ENOMEM])
    known = _refused(error) if isinstance(error, OSError) else None
    if known is None and error.__cause__ is not None:
        return _translated(error.__cause__)
    return known


def _lacks_memory(error: BaseException) -> bool:
    """Whether an error says, in whatever way, that there is not enough memory."""
    signs = _NOTHING_SAID if isinstance(error, SystemError) else _NO_MEMORY
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _refused(error: OSError) -> CoffretError | None:
    """What to report if the operating system had too little of something; None if it refused for another reason."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    if error.errno in _FULL:
        return OutOfSpace(f"{where}{error.strerror}")
    if error.errno in _REMEDIES:
        return CoffretError(f"{where}{error.strerror}", remedy=_REMEDIES[error.errno])
    return None
