"""Errors over HTTP, as far as the faces share them: their kinds, their texts, and their description in the document."""

import logging
import re
from collections.abc import Iterable, Mapping
from math import ceil
from types import UnionType
from typing import Any, TypeAlias

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from loraplex_protos.errors import (
    MAX_QUOTED,
    AdapterError,
    AdapterNotFoundError,
    FieldViolation,
    ForbiddenError,
    GenerationError,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    RequestCancelledError,
    UnauthenticatedError,
)
from loraplex_router.vocabulary.violations import MAX_VIOLATIONS

logger = logging.getLogger(__name__)

Responses: TypeAlias = dict[int | str, dict[str, Any]]  # of a route, for the OpenAPI document

NUMBER = re.compile(r"\[\d+\]")
TYPES = ("str", "int", "float", "bool", "dict")  # pydantic's names

MESSAGES = ("sampling", "stopping", "detail", "adapter", "merged_adapters")  # the router's groups of fields

STATUSES = {
    401: "No API key, or an unknown one.",
    403: "The API key, or the adapter's source, does not allow the adapter.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed.",
    424: "The adapter's files cannot be served.",
    429: "The queue is full, or a limit of the API key is reached.",
    499: "The request was cancelled.",
    500: "The generation failed.",
    502: "The adapter's source does not answer.",
    503: "The server is starting or shutting down, or has lost a shard.",
}


class HttpError(LoraplexError):
    """HTTP's own errors, before a face reads anything: an unknown path, or a body that is too large."""

    error_type = "http"

    def __init__(self, refused: HTTPException) -> None:
        super().__init__(refused.detail)
        self.http_status = refused.status_code
        self.headers = dict(refused.headers or {})


def internal_error() -> LoraplexError:
    """The error for an unexpected exception. Call this in the exception's handler."""
    logger.exception("a call failed")
    return LoraplexError("internal error; the server's log has the details")


def read_error(error: Exception) -> LoraplexError:
    """The error for whatever a route, FastAPI or a middleware raised. Call this in the exception's handler."""
    match error:
        case LoraplexError():
            return error
        case RequestValidationError():
            return InvalidRequestError(*_merged(map(_violation, error.errors()[:MAX_VIOLATIONS])))
        case ClientDisconnect():
            return RequestCancelledError("the client left before it had sent its request")
        case HTTPException(status_code=400):  # FastAPI's for a body that is not text
            return InvalidRequestError(FieldViolation("body", "is not JSON"))
        case HTTPException(status_code=401):
            return UnauthenticatedError(error.detail)
        case HTTPException(status_code=429):
            return OverloadedError(error.detail)
        case HTTPException():
            return HttpError(error)
        case _:
            return internal_error()


def error_headers(error: LoraplexError) -> dict[str, str]:
    match error:
        case HttpError():
            return error.headers
        case OverloadedError():
            return {"Retry-After": str(ceil(error.retry_after))}
        case GenerationError():  # it would fail again; OpenAI's clients retry all other 500s
            return {"x-should-retry": "false"}
        case UnauthenticatedError():
            return {"WWW-Authenticate": "Bearer"}
        case _:
            return {}


def rename_fields(error: LoraplexError, names: Mapping[str, str]) -> LoraplexError:
    """The error with a face's field names. `names` has the face's name for each of the router's fields, unless it is
    the last part of the router's name."""
    if isinstance(error, AdapterError | ForbiddenError):
        renamed = type(error)(error.message)
        renamed.field = _name(error.field, names)
        return renamed
    if not isinstance(error, InvalidRequestError):
        return error
    return type(error)(*(FieldViolation(_name(found.field, names), found.description) for found in error.violations))


def describe(error: LoraplexError) -> str:
    if not isinstance(error, InvalidRequestError):
        return error.message
    return "; ".join(f"`{found.field}` {found.description}" for found in error.violations)


class Error(BaseModel):
    error: str
    error_type: str


def write_lorax_error(error: LoraplexError) -> dict[str, Any]:
    """LoRAX's form, an `Error`, which administration shares. For LoRAX's clients, an adapter that cannot be served is a
    `generation` error, and a missing one is a 404."""
    refused = isinstance(error, AdapterError) and not isinstance(error, AdapterNotFoundError)
    prefix = "Input validation error: " if isinstance(error, InvalidRequestError) else ""
    return {"error": prefix + describe(error), "error_type": "generation" if refused else error.error_type}


def document_errors(model: type[BaseModel] | UnionType, own: Mapping[int, str]) -> Responses:
    """The error responses of a route, for the document. `own`: those that a face describes itself."""
    return {status: {"model": model, "description": text} for status, text in sorted({**STATUSES, **own}.items())}


def only(errors: Responses, *statuses: int) -> Responses:
    return {status: errors[status] for status in statuses}


LORAX_ERRORS = document_errors(Error, {404: "No such adapter.", 422: "A field is wrong; the message names it."})


def _name(field: str, names: Mapping[str, str]) -> str:
    """`names` has [] for the number of an item."""
    general = NUMBER.sub("[]", field)
    own = general.rpartition(".")[2] if general.partition(".")[0] in MESSAGES else general
    name = names.get(general, own)
    for number in NUMBER.findall(field):
        name = name.replace("[]", number, 1)
    return name


def _violation(found: Mapping[str, Any]) -> FieldViolation:
    """pydantic's violations. `body, messages, 0, role` becomes messages[0][role]; dots only occur in the router's
    names."""
    if found["type"] == "json_invalid":
        return FieldViolation("body", found["ctx"]["error"])
    where = found["loc"]
    parts = [part for part in (where[1:] if where[0] in ("body", "query") else where) if not _is_type(part)]
    if not parts and found["type"] == "model_attributes_type":
        return FieldViolation("body", "must be a JSON object, sent with Content-Type: application/json")
    first, *rest = parts or ["body"]
    field = str(first) + "".join(f"[{part}]" for part in rest)  # a part may be a name that the client chose
    return FieldViolation(field[:MAX_QUOTED], str(found["msg"]).removeprefix("Value error, ")[:MAX_QUOTED])


def _is_type(part: str | int) -> bool:
    """Whether this part of a path names one of a field's possible types, and not a field."""
    return isinstance(part, str) and (part in TYPES or not part.isidentifier() or part[0].isupper())


def _merged(violations: Iterable[FieldViolation]) -> list[FieldViolation]:
    """Merges pydantic's errors for a field that may have several types and has none of them."""
    descriptions = dict[str, list[str]]()
    for found in violations:
        descriptions.setdefault(found.field, []).append(found.description)
    return [FieldViolation(field, ", or: ".join(dict.fromkeys(texts))) for field, texts in descriptions.items()]
