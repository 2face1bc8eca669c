"""What SSH and SFTP can answer, put in the tree of `errors`; every class of asyncssh has a line here."""

from __future__ import annotations

from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    NotFound,
    NotStorage,
    PermissionRefused,
    StorageFull,
    TransientError,
)


class Unsupported(ConnectorError):
    """The server does not know the operation; it never leaves the SFTP connector but for one that has no other way."""


class Refusal(Exception):
    """A request was answered by an error, of a `kind` of the tree; plain ConnectorError where the server gave no cause.

    OpenSSH answers what has no number in SFTP 3 (exists, full, not empty, another file system …) by one "Failure".
    """

    def __init__(self, kind: type[ConnectorError], reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


# By the name of the class, since asyncssh is imported when it is needed (190 ms).
KINDS: dict[str, type[ConnectorError]] = {
    # The connection. What ends one, and a new one may do better:
    "DisconnectError": ConnectionLost,
    "CompressionError": ConnectionLost,
    "ConnectionLost": ConnectionLost,
    "MACError": ConnectionLost,
    "ProtocolError": ConnectionLost,
    "ServiceNotAvailable": ConnectionLost,
    "ChannelOpenError": ConnectionLost,
    # What would be the same the next time:
    "HostKeyNotVerifiable": PermissionRefused,
    "IllegalUserName": PermissionRefused,
    "PermissionDenied": PermissionRefused,
    "KeyExchangeFailed": ConnectorError,
    "ProtocolNotSupported": ConnectorError,
    # Answers to requests, SFTP 3:
    "SFTPError": ConnectorError,
    "SFTPEOFError": ConnectorError,
    "SFTPNoSuchFile": NotFound,
    "SFTPPermissionDenied": PermissionRefused,
    "SFTPFailure": ConnectorError,
    "SFTPBadMessage": ConnectorError,
    "SFTPNoConnection": ConnectionLost,
    "SFTPConnectionLost": ConnectionLost,
    "SFTPOpUnsupported": Unsupported,
    # Later versions:
    "SFTPInvalidHandle": ConnectorError,
    "SFTPNoSuchPath": NotFound,
    "SFTPFileAlreadyExists": AlreadyExists,
    "SFTPWriteProtect": PermissionRefused,
    "SFTPNoMedia": NotFound,
    "SFTPNoSpaceOnFilesystem": StorageFull,
    "SFTPQuotaExceeded": StorageFull,
    "SFTPUnknownPrincipal": PermissionRefused,
    "SFTPLockConflict": TransientError,
    "SFTPDirNotEmpty": ConnectorError,
    "SFTPNotADirectory": NotFound,
    "SFTPInvalidFilename": ConnectorError,
    "SFTPLinkLoop": NotStorage,
    "SFTPCannotDelete": PermissionRefused,
    "SFTPInvalidParameter": ConnectorError,
    "SFTPFileIsADirectory": ConnectorError,
    "SFTPByteRangeLockConflict": TransientError,
    "SFTPByteRangeLockRefused": TransientError,
    "SFTPDeletePending": TransientError,
    "SFTPFileCorrupt": ConnectorError,
    "SFTPOwnerInvalid": PermissionRefused,
    "SFTPGroupInvalid": PermissionRefused,
    "SFTPNoMatchingByteRangeLock": ConnectorError,
}


def kind_of(error: BaseException) -> type[ConnectorError]:
    """The kind that an error of asyncssh or of the operating system is, by its class or the nearest one above it."""
    for known in type(error).__mro__:
        if known.__name__ in KINDS and known.__module__.startswith("asyncssh"):
            return KINDS[known.__name__]
    # A broken stream: OSError, IncompleteReadError. Anything else is an answer that is no SFTP.
    return ConnectionLost if isinstance(error, (OSError, EOFError)) else ConnectorError
