"""The errors that cross a process boundary, each with one gRPC status, one HTTP status and one error_type.

    LoraplexError
    ├── InvalidRequestError            a field of the request is wrong; nothing was started
    ├── UnauthenticatedError           no API key, or one that this server does not know
    ├── ForbiddenError                 the API key does not allow this
    ├── RequestNotFoundError           no such request is running
    ├── ResponseNotFoundError          no such response is kept
    ├── BatchNotFoundError             no such batch or file is kept, or none at all
    ├── AdapterError
    │   ├── AdapterNotFoundError       no source has it
    │   ├── AdapterForbiddenError      the source rejects this token
    │   ├── AdapterInvalidError        its files cannot be served: the message says which, and why
    │   ├── AdapterInUseError          sequences still need it
    │   ├── AdapterConflictError       its name is not as expected: somebody else was faster
    │   ├── AdapterPinsError           no further adapter can be pinned
    │   └── AdapterSourceError         its source did not answer
    ├── OverloadedError                the queue is full: try again later
    │   └── RateLimitedError           a limit of the API key is reached
    ├── UnavailableError               starting, draining, or a shard is lost
    ├── DeadlineError                  the caller's deadline passed
    ├── RequestCancelledError          the request was cancelled
    └── GenerationError                the model failed on this sequence

On the wire an error is a google.rpc.Status: its message, an ErrorInfo whose reason is the error_type, for
InvalidRequestError a BadRequest with the fields, and for OverloadedError a RetryInfo. It is sent in trailers, of which
clients accept 8 KiB, so long texts are truncated.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

DOMAIN = "loraplex"
MAX_QUOTED = 200  # characters of what a client sent, in any error text or log line
BEGUN = "x-loraplex-begun"  # initial metadata of Generate: generating has begun
MAX_STATUS_TEXT = 1000  # bytes of the message on the wire, and of all fields together; a byte can take three there


def quote(text: str) -> str:
    """A client's text for an error message: in quotes, on one line, truncated to MAX_QUOTED."""
    return repr(text) if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]!r}..."


@dataclass(frozen=True, slots=True)
class FieldViolation:
    field: str
    description: str


class LoraplexError(Exception):
    """Base of all errors that callers see. Unexpected failures are raised as this class itself."""

    error_type: ClassVar[str] = "internal"
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: int = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequestError(LoraplexError):
    """A field of the request is wrong. `violations` names each field and the fix."""

    error_type = "validation"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 422

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for violation in violations))
        self.violations = violations


class UnauthenticatedError(LoraplexError):
    error_type = "unauthenticated"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401


class ForbiddenError(LoraplexError):
    """`field`: what of the request is not allowed, if it is one field."""

    field = ""
    error_type = "forbidden"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403


class RequestNotFoundError(LoraplexError):
    error_type = "request_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class ResponseNotFoundError(LoraplexError):
    error_type = "response_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class BatchNotFoundError(LoraplexError):
    error_type = "batch_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class AdapterError(LoraplexError):
    """Base of all errors about an adapter. `field` is the request's that names it; `place`: which of several that are
    to be merged it is."""

    field = "adapter.id"
    place: int | None = None


class AdapterNotFoundError(AdapterError):
    error_type = "adapter_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class AdapterForbiddenError(AdapterError):
    error_type = "adapter_forbidden"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403


class AdapterInvalidError(AdapterError):
    error_type = "adapter_invalid"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 424


class AdapterInUseError(AdapterError):
    error_type = "adapter_in_use"
    grpc_status = grpc.StatusCode.ABORTED
    http_status = 409


class AdapterConflictError(AdapterError):
    error_type = "adapter_conflict"
    grpc_status = grpc.StatusCode.ABORTED
    http_status = 409


class AdapterPinsError(AdapterError):
    error_type = "adapter_pins"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class AdapterSourceError(AdapterError):
    error_type = "adapter_source"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 502


class OverloadedError(LoraplexError):
    """`retry_after` is the number of seconds after which to try again."""

    error_type = "overloaded"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimitedError(OverloadedError):
    error_type = "rate_limited"


class UnavailableError(LoraplexError):
    error_type = "unavailable"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503


class DeadlineError(LoraplexError):
    error_type = "deadline"
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


class RequestCancelledError(LoraplexError):
    error_type = "cancelled"
    grpc_status = grpc.StatusCode.CANCELLED
    http_status = 499


class GenerationError(LoraplexError):
    error_type = "generation"
    grpc_status = grpc.StatusCode.INTERNAL
    http_status = 500


ERROR_TYPES: dict[str, type[LoraplexError]] = {
    error.error_type: error
    for error in (
        LoraplexError,
        InvalidRequestError,
        UnauthenticatedError,
        ForbiddenError,
        RequestNotFoundError,
        ResponseNotFoundError,
        BatchNotFoundError,
        AdapterNotFoundError,
        AdapterForbiddenError,
        AdapterInvalidError,
        AdapterInUseError,
        AdapterConflictError,
        AdapterPinsError,
        AdapterSourceError,
        OverloadedError,
        RateLimitedError,
        UnavailableError,
        DeadlineError,
        RequestCancelledError,
        GenerationError,
    )
}

# The meaning of statuses without our details, from gRPC itself or a proxy.
_BY_STATUS: dict[grpc.StatusCode, type[LoraplexError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
}


def to_status(error: LoraplexError) -> grpc.Status:
    """The error as a gRPC status with its details, for `context.abort_with_status`."""
    details = [_pack(ErrorInfo(reason=error.error_type, domain=DOMAIN))]
    if isinstance(error, InvalidRequestError):
        details.append(_pack(BadRequest(field_violations=_to_protos(error.violations))))
    if isinstance(error, OverloadedError):
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(_pack(retry))
    code: int = error.grpc_status.value[0]
    status: grpc.Status = rpc_status.to_status(
        Status(code=code, message=_cut(error.message, MAX_STATUS_TEXT), details=details)
    )
    return status


def from_rpc_error(rpc_error: grpc.RpcError) -> LoraplexError:
    """The error that the other side raised, from the gRPC error raised here.

    `rpc_error` is also a grpc.Call (sync) or a grpc.aio.AioRpcError.
    """
    code: grpc.StatusCode = rpc_error.code()
    message = rpc_error.details() or code.name
    trailers = cast(Iterable[tuple[str, str | bytes]], rpc_error.trailing_metadata() or ())
    for key, value in trailers:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return _from_details(Status.FromString(value), message, code)
    if code is grpc.StatusCode.CANCELLED and message == code.name:  # gRPC ends so what a server did not begin
        return UnavailableError("the server is stopping")
    return _BY_STATUS.get(code, LoraplexError)(message)


def _from_details(status: Status, message: str, code: grpc.StatusCode) -> LoraplexError:
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad_request)
        detail.Unpack(retry)
    error = ERROR_TYPES.get(info.reason) or _BY_STATUS.get(code, LoraplexError)
    if error is InvalidRequestError:
        violations = bad_request.field_violations
        return InvalidRequestError(*(FieldViolation(v.field, v.description) for v in violations))
    if issubclass(error, OverloadedError):
        return error(message, retry.retry_delay.ToMilliseconds() / 1000)
    return error(message)


def _pack(message: ErrorInfo | BadRequest | RetryInfo) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed


def _to_protos(violations: Iterable[FieldViolation]) -> list[BadRequest.FieldViolation]:
    """As many violations as fit, at least one."""
    written, room = list[BadRequest.FieldViolation](), MAX_STATUS_TEXT
    for violation in violations:
        field = _cut(violation.field, MAX_QUOTED)
        description = _cut(violation.description, MAX_STATUS_TEXT - MAX_QUOTED)
        room -= len(field.encode()) + len(description.encode())
        if written and room < 0:
            break
        written.append(BadRequest.FieldViolation(field=field, description=description))
    return written


def _cut(text: str, max_bytes: int) -> str:
    """The text, truncated to at most `max_bytes` bytes of UTF-8."""
    encoded = text.encode()
    return text if len(encoded) <= max_bytes else encoded[: max_bytes - 3].decode(errors="ignore") + "..."
