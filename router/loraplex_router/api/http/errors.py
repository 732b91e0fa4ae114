"""Errors over HTTP, as far as faces share them: which there are, what they say, and how the document describes them."""

import logging
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any, TypeAlias

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from loraplex_protos.errors import (
    MAX_QUOTED,
    AdapterError,
    AdapterNotFoundError,
    FieldViolation,
    GenerationError,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    UnauthenticatedError,
)
from loraplex_router.vocabulary.violations import MAX_VIOLATIONS

logger = logging.getLogger(__name__)

Responses: TypeAlias = dict[int | str, dict[str, Any]]  # of a route, for the OpenAPI document

TYPES = ("str", "int", "float", "bool", "dict")  # as pydantic names them

MESSAGES = ("sampling", "stopping", "detail", "adapter", "merged_adapters")  # what the router groups fields in

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
    """What HTTP itself refuses, before a face reads anything: there is no such path, or the body is too large."""

    error_type = "http"

    def __init__(self, refused: HTTPException) -> None:
        super().__init__(refused.detail)
        self.http_status = refused.status_code
        self.headers = dict(refused.headers or {})


def internal_error() -> LoraplexError:
    """Stands for an exception that was not foreseen. To be called where that exception is handled."""
    logger.exception("a call failed")
    return LoraplexError("internal error; the server's log has the details")


def read_error(error: Exception) -> LoraplexError:
    """What a route, FastAPI or a middleware raised. To be called where that is handled."""
    match error:
        case LoraplexError():
            return error
        case RequestValidationError():
            return InvalidRequestError(*_merged(map(_violation, error.errors()[:MAX_VIOLATIONS])))
        case HTTPException(status_code=400):  # FastAPI's for a body that is not text
            return InvalidRequestError(FieldViolation("body", "is not JSON"))
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
        case GenerationError():  # it would fail again; OpenAI's clients send any other 500 three times
            return {"x-should-retry": "false"}
        case UnauthenticatedError():
            return {"WWW-Authenticate": "Bearer"}
        case _:
            return {}


def rename_fields(error: LoraplexError, names: Mapping[str, str]) -> LoraplexError:
    """The error in a face's words. `names`: what the face calls a field of the router's, where that is not the last
    part of its name."""
    if not isinstance(error, InvalidRequestError):
        return error
    return type(error)(*(FieldViolation(_name(found, names), found.description) for found in error.violations))


def describe(error: LoraplexError) -> str:
    if not isinstance(error, InvalidRequestError):
        return error.message
    return "; ".join(f"`{found.field}` {found.description}" for found in error.violations)


class Error(BaseModel):
    error: str
    error_type: str


def write_lorax_error(error: LoraplexError) -> dict[str, Any]:
    """LoRAX's form, an `Error`, which administration shares. An adapter that cannot be served is a `generation` error
    to LoRAX's clients; one that is not there is a 404."""
    refused = isinstance(error, AdapterError) and not isinstance(error, AdapterNotFoundError)
    prefix = "Input validation error: " if isinstance(error, InvalidRequestError) else ""
    return {"error": prefix + describe(error), "error_type": "generation" if refused else error.error_type}


def document_errors(model: type[BaseModel], own: Mapping[int, str]) -> Responses:
    """Of a route that fails. `own`: what a face says in its own words."""
    return {status: {"model": model, "description": text} for status, text in sorted({**STATUSES, **own}.items())}


def only(errors: Responses, *statuses: int) -> Responses:
    return {status: errors[status] for status in statuses}


LORAX_ERRORS = document_errors(Error, {404: "No such adapter.", 422: "A field is wrong; the message names it."})


def _name(found: FieldViolation, names: Mapping[str, str]) -> str:
    if found.field.partition(".")[0] in MESSAGES:
        return names.get(found.field) or found.field.rpartition(".")[2]
    return names.get(found.field, found.field)


def _violation(found: Mapping[str, Any]) -> FieldViolation:
    """What pydantic found. `body, messages, 0, role` becomes messages[0][role]: dots are the router's own."""
    if found["type"] == "json_invalid":
        return FieldViolation("body", found["ctx"]["error"])
    if found["loc"] == ("body",) and found["type"] == "model_attributes_type":
        return FieldViolation("body", "must be a JSON object, sent with Content-Type: application/json")
    first, *rest = [part for part in found["loc"] if part != "body" and not _is_type(part)] or ["body"]
    field = str(first) + "".join(f"[{part}]" for part in rest)  # a part can be a name that the client chose
    return FieldViolation(field[:MAX_QUOTED], str(found["msg"])[:MAX_QUOTED])


def _is_type(part: str | int) -> bool:
    """Whether this part of a place names one of the types that a field may have, and no field."""
    return isinstance(part, str) and (part in TYPES or not part.isidentifier() or part[0].isupper())


def _merged(violations: Iterable[FieldViolation]) -> list[FieldViolation]:
    """One for each field: one of several types was wanted, and it has none of them."""
    descriptions = dict[str, list[str]]()
    for found in violations:
        descriptions.setdefault(found.field, []).append(found.description)
    return [FieldViolation(field, ", or: ".join(dict.fromkeys(texts))) for field, texts in descriptions.items()]
