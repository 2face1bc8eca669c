"""What an S3 server and its client libraries raise, put into the connectors' tree.

Classes of botocore and aiohttp are known by name, so that nothing of them is imported before S3 is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coffret.connectors import neterrors
from coffret.connectors.errors import (
    AccessDenied,
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    InvalidLocation,
    InvalidRange,
    NotFound,
    NotStorage,
    PermissionRefused,
    StorageFull,
    TransientError,
)
from coffret.connectors.neterrors import chain_of, reason_of, unreached

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class NoBucket(NotFound):
    """There is no such bucket."""


class NoUpload(TransientError):
    """There is no such upload in parts: somebody cleaned up. All of it is to be put again."""


FORM = "s3://host[:port]/bucket[/prefix]"
_USER, _PASSWORD = "S3_REPOSITORY_USER", "S3_REPOSITORY_PASSWORD"
_KEY_UNKNOWN = f"the server does not know the access key ({_USER}, else that of the AWS profile or environment)"
_SESSION_OVER = "the session of these credentials is over: log in anew"

# Codes in the body of an answer: AWS's list of them, and what MinIO, Ceph and versitygw add. A text is put before that
# of the server.
_CODES: dict[str, tuple[type[ConnectorError], str]] = {
    **dict.fromkeys(("NoSuchKey", "NotFound"), (NotFound, "")),
    "NoSuchBucket": (NoBucket, "there is no such bucket"),
    "PreconditionFailed": (AlreadyExists, "exists already"),
    "InvalidRange": (InvalidRange, ""),
    **dict.fromkeys(
        ("InsufficientStorage", "QuotaExceeded", "InsufficientCapacity", "XMinioStorageFull"), (StorageFull, "")
    ),
    "XMinioAdminBucketQuotaExceeded": (StorageFull, ""),
    **dict.fromkeys(("InvalidAccessKeyId", "XAdminUserNotFound"), (AccessDenied, _KEY_UNKNOWN)),
    "SignatureDoesNotMatch": (
        AccessDenied,
        f"the secret key is wrong ({_PASSWORD}, else that of the AWS profile or environment)",
    ),
    **dict.fromkeys(
        ("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"),
        (AccessDenied, "the clocks of this machine and of the server differ too much: set them"),
    ),
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "TokenRefreshRequired"), (AccessDenied, _SESSION_OVER)),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled"), (PermissionRefused, "the access key may not do this")),
    **dict.fromkeys(
        ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"),
        (AccessDenied, "the bucket is in another region: name it with -o region="),
    ),
    **dict.fromkeys(
        (
            *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "OperationAborted", "BadDigest"),
            *("ConditionalRequestConflict", "XAmzContentSHA256Mismatch", "IncompleteBody", "Throttling", "Busy"),
            *("ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests"),
            *("SlowDownRead", "SlowDownWrite", "RequestThrottled", "XMinioServerNotInitialized"),
        ),
        (TransientError, ""),
    ),
    "NoSuchUpload": (NoUpload, ""),
    "NotImplemented": (ConnectorError, "the server can't do what a repository needs (put-if-absent, for one)"),
    "InvalidStorageClass": (InvalidLocation, "the server does not know this -o storage-class"),
    "InvalidBucketName": (InvalidLocation, f"not the name of a bucket; the form is {FORM}"),
    "BucketAlreadyOwnedByYou": (AlreadyExists, ""),
    "BucketAlreadyExists": (NotStorage, "the bucket belongs to somebody else"),
}
_STATUSES: dict[int, type[ConnectorError]] = {
    404: NotFound,
    412: AlreadyExists,
    416: InvalidRange,
    507: StorageFull,
    **dict.fromkeys((401, 403), PermissionRefused),
    **dict.fromkeys((408, 425, 429, 500, 502, 503, 504), TransientError),
}

# By name of a class or of one it derives from, the nearest first.
KINDS: dict[str, type[ConnectorError]] = {
    # botocore
    **dict.fromkeys(
        ("ConnectionError", "ConnectionClosedError", "ReadTimeoutError", "ResponseStreamingError"), ConnectionLost
    ),
    **dict.fromkeys(("IncompleteReadError", "ChecksumError", "FlexibleChecksumError"), TransientError),
    **dict.fromkeys(
        (
            *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "UnknownCredentialError"),
            *("NoAuthTokenError", "TokenRetrievalError", "UnknownTokenProviderError", "SSOError", "LoginError"),
            *("RefreshWithMFAUnsupportedError", "MetadataRetrievalError"),
        ),
        AccessDenied,
    ),
    **dict.fromkeys(
        (
            *("ProfileNotFound", "ConfigParseError", "ConfigNotFound", "InvalidConfigError", "InvalidDNSNameError"),
            *("InvalidIMDSEndpointError", "InvalidIMDSEndpointModeError", "UnknownRegionError", "InvalidRegionError"),
            *("BaseEndpointResolverError", "EndpointProviderError", "InvalidEndpointConfigurationError"),
            *("InvalidHostLabelError", "InvalidProxiesConfigError", "InvalidRetryConfigurationError"),
            *("InvalidS3AddressingStyleError", "InvalidS3UsEast1RegionalEndpointConfigError", "InvalidDefaultsMode"),
            *("InvalidSTSRegionalEndpointsConfigError", "InvalidEndpointDiscoveryConfigurationError"),
            *("UnsupportedS3ConfigurationError", "UnsupportedS3ArnError", "InvalidChecksumConfigError"),
            *("UnsupportedS3AccesspointConfigurationError", "ServiceNotInRegionError", "CapacityNotAvailableError"),
        ),
        InvalidLocation,
    ),
    **dict.fromkeys(("ResponseParserError", "UndefinedModelAttributeError"), NotStorage),
    "BotoCoreError": ConnectorError,
    # aiohttp
    **dict.fromkeys(("ClientConnectionError", "ClientPayloadError", "UploadAbortedError"), ConnectionLost),
    **dict.fromkeys(("InvalidURL", "NonHttpUrlClientError", "RedirectClientError"), InvalidLocation),
    **dict.fromkeys(("ClientResponseError", "HttpProcessingError"), NotStorage),
    "ClientHttpProxyError": TransientError,
    "ServerFingerprintMismatch": AccessDenied,
    "ClientError": ConnectorError,
    # Python
    **dict.fromkeys(("OSError", "EOFError"), ConnectionLost),
}


def kind_of(error_class: type[BaseException]) -> type[ConnectorError] | None:
    """What errors of a class become; None for what comes from no storage."""
    return next((KINDS[base.__name__] for base in error_class.__mro__ if base.__name__ in KINDS), None)


def mapped(where: str, *, reached: bool = True) -> AbstractContextManager[None]:
    """Turn any error of a request into the ConnectorError that fits, naming what was asked for and the reason.

    `reached`: the host answered before, so that its name is right even if nobody knows it for a while.
    """
    return neterrors.mapped(lambda error: _translated(error, where, reached))


def _translated(error: Exception, where: str, reached: bool) -> ConnectorError | None:
    response: dict[str, Any] | None = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        return _answered(response, where)
    chain = list(chain_of(error))
    if unreachable := unreached(chain, where, reached=reached, form=FORM, clear="s3+http://"):
        return unreachable
    found = kind_of(type(error))
    if found is ConnectorError:
        # The library wraps what it does not know itself: the cause says more.
        found = next((kind for cause in chain if (kind := kind_of(type(cause))) not in (None, ConnectorError)), found)
    if found is AccessDenied:  # no credentials were found, or none that hold
        return AccessDenied(f"{where}: {reason_of(chain)}: set {_USER} and {_PASSWORD}, or see to the AWS profile")
    return None if found is None else found(f"{where}: {reason_of(chain)}")


def _answered(response: dict[str, Any], where: str) -> ConnectorError:
    """The error for an answer of the server that says no."""
    error, status = response["Error"], response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code, message = error.get("Code", ""), error.get("Message", "")
    kind, text = _CODES.get(code, (_STATUSES.get(status, ConnectorError), ""))
    details = f"{code}: {message}" if message and message != code else code
    return kind(f"{where}: {text} ({details})" if text else f"{where}: {details}")
