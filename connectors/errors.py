"""What can go wrong with a storage. Every library's error is mapped onto this tree.

ConnectorError
├── NotFound            no such object
├── AlreadyExists       put-if-absent found the name taken
├── InvalidRange        a range outside the object
├── InvalidName         a name the contract does not allow
├── InvalidLocation     a location or option no connector understands
├── StorageFull         no space left
├── PermissionRefused   the storage says no
│   ├── RightMissing    the token is for less than this
│   └── AccessDenied    it does not let us in; the message says what to do
├── NotStorage          the place is something else (a file, a folder with other content)
└── TransientError      worth trying again
    └── ConnectionLost  the answer never came
"""


class ConnectorError(Exception):
    """An operation on a storage failed; the message names the object and the reason."""

    retryable = False


class NotFound(ConnectorError):
    """No object has this name."""


class AlreadyExists(ConnectorError):
    """The name was taken when it was to be put only if absent."""


class InvalidRange(ConnectorError):
    """The range asked for does not lie within the object."""


class InvalidName(ConnectorError):
    """The name is not of the form the contract allows."""


class InvalidLocation(ConnectorError):
    """The location has no form that a connector knows, or an option it does not know."""


class StorageFull(ConnectorError):
    """No space is left on the storage."""


class PermissionRefused(ConnectorError):
    """The storage refuses the operation to this user."""


class RightMissing(PermissionRefused):
    """The token that was shown gives the right to less than this."""


class AccessDenied(PermissionRefused):
    """The storage does not let us in with what we have, or we do not trust it; the message says what to do."""


class NotStorage(ConnectorError):
    """What stands at this location can't hold a repository."""


class TransientError(ConnectorError):
    """A failure that may pass; the operation had no effect or can be repeated."""

    retryable = True


class ConnectionLost(TransientError):
    """The connection broke; whether the operation took effect is unknown."""
