"""What becomes of the errors of S3 servers and of the library."""

from __future__ import annotations

import errno
import inspect

import aiohttp.client_exceptions
import botocore.exceptions
import botocore.parsers
import pytest
from botocore.exceptions import ClientError

from coffret.connectors import s3errors
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectionLost,
    ConnectorError,
    InvalidLocation,
    InvalidRange,
    NotFound,
    PermissionRefused,
    StorageFull,
    TransientError,
)

pytestmark = pytest.mark.anyio


def answered(code: str, status: int = 400) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": "so it is"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


def translated(error: Exception) -> ConnectorError:
    with pytest.raises(ConnectorError) as raised, s3errors.mapped("s3://h/b/config"):
        raise error
    assert "s3://h/b/config" in str(raised.value)
    return raised.value


# What does not depend on server, network or user, but on us alone. Whoever adds to this has looked at it.
OURS = {
    *("BotoCoreError", "ClientError", "DataNotFoundError", "UnknownServiceError", "ApiVersionNotFoundError"),
    *("HTTPClientError", "UnknownSignatureVersionError", "MissingParametersError", "ValidationError"),
    *("UnknownKeyError", "RangeError", "UnknownParameterError", "AliasConflictParameterError", "ParamValidationError"),
    *("UnknownServiceStyle", "PaginationError", "OperationNotPageableError", "UnseekableStreamError", "WaiterError"),
    *("InvalidExpressionError", "WaiterConfigError", "UnknownClientMethodError", "AwsChunkedWrapperError"),
    *("UnsupportedSignatureVersionError", "UnsupportedS3ControlArnError", "UnsupportedOutpostResourceError"),
    *("UnsupportedS3ControlConfigurationError", "StubResponseError", "StubAssertionError", "UnStubbedResponseError"),
    *("MD5UnavailableError", "MissingDependencyException", "UnsupportedServiceProtocolsError", "EventStreamError"),
}


def library_errors() -> list[type[Exception]]:
    """The classes of errors of the libraries below us, of the versions that are installed."""
    modules = (botocore.exceptions, botocore.parsers, aiohttp.client_exceptions, aiohttp.http_exceptions)
    classes = {
        value
        for module in modules
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, Exception) and not issubclass(value, Warning)
        if value.__module__.partition(".")[0] in ("botocore", "aiohttp")
    }
    return sorted(classes, key=lambda each: each.__name__)


class TestErrors:
    @pytest.mark.parametrize("error_class", library_errors(), ids=lambda each: each.__name__)
    def test_every_class_is_mapped(self, error_class: type[Exception]) -> None:
        if error_class.__name__ in ("WSMessageTypeError", "NoInitialResponseError"):
            pytest.skip("there are no web sockets here")
        kind = s3errors.kind_of(error_class)
        if error_class in (ClientError, botocore.exceptions.EventStreamError):
            return  # by its code: below
        assert kind is not None, "add it to s3errors.KINDS"
        if error_class.__module__.startswith("botocore"):
            assert (kind is ConnectorError) == (error_class.__name__ in OURS), "add it to s3errors.KINDS"

    def test_no_kind_is_for_nothing(self) -> None:
        names = {base.__name__ for each in library_errors() for base in each.__mro__} | {"OSError", "EOFError"}
        assert set(s3errors.KINDS) - names <= {"UploadAbortedError"}  # of newer versions

    @pytest.mark.parametrize(
        ("code", "status", "kind", "text"),
        [
            ("NoSuchKey", 404, NotFound, ""),
            ("NoSuchBucket", 404, NotFound, "no such bucket"),
            ("404", 404, NotFound, ""),
            ("PreconditionFailed", 412, AlreadyExists, ""),
            ("InvalidRange", 416, InvalidRange, ""),
            ("ConditionalRequestConflict", 409, TransientError, ""),
            ("InsufficientStorage", 507, StorageFull, ""),
            ("507", 507, StorageFull, ""),
            ("QuotaExceeded", 403, StorageFull, ""),
            ("XMinioStorageFull", 507, StorageFull, ""),
            ("InvalidAccessKeyId", 403, PermissionRefused, "does not know the access key"),
            ("XAdminUserNotFound", 404, PermissionRefused, "does not know the access key"),
            ("SignatureDoesNotMatch", 403, PermissionRefused, "secret key is wrong"),
            ("RequestTimeTooSkewed", 403, PermissionRefused, "clocks"),
            ("ExpiredToken", 400, PermissionRefused, "log in"),
            ("AccessDenied", 403, PermissionRefused, "may not"),
            ("SomethingNew", 403, PermissionRefused, "SomethingNew"),
            ("SlowDown", 503, TransientError, ""),
            ("SlowDown", 429, TransientError, ""),
            ("InternalError", 200, TransientError, ""),
            ("InternalError", 500, TransientError, ""),
            ("502", 502, TransientError, ""),
            ("504", 504, TransientError, ""),
            ("RequestTimeout", 400, TransientError, ""),
            ("NotImplemented", 501, ConnectorError, "put-if-absent"),
            ("InvalidStorageClass", 400, InvalidLocation, "storage-class"),
            ("SomethingElse", 400, ConnectorError, "SomethingElse: so it is"),
        ],
    )
    def test_answers(self, code: str, status: int, kind: type[ConnectorError], text: str) -> None:
        error = translated(answered(code, status))
        assert isinstance(error, kind)
        assert error.retryable == issubclass(kind, TransientError)
        assert text in str(error)

    def test_wrapped_errors(self) -> None:
        def wrapped(error: Exception) -> ConnectorError:
            return translated(botocore.exceptions.HTTPClientError(error=error))

        assert isinstance(wrapped(OSError(errno.ECONNRESET, "Connection reset by peer")), ConnectionLost)
        assert isinstance(wrapped(aiohttp.ClientPayloadError("short")), ConnectionLost)
        assert isinstance(wrapped(TimeoutError()), ConnectionLost)
        assert not wrapped(ValueError("a bug")).retryable

    def test_bugs_stay_bugs(self) -> None:
        with pytest.raises(KeyError), s3errors.mapped("here"):
            raise KeyError("x")
