"""Errors as each face's clients expect them: LoRAX's {"error", "error_type"}; under /v1 OpenAI's {"error": {...}}."""

import logging
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
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
from loraplex_router.vocabulary.request import MAX_VIOLATIONS, ContextLengthError

logger = logging.getLogger(__name__)

OPENAI_PREFIX = "/v1/"
TYPES = ("str", "int", "float", "bool", "dict")  # as pydantic names them

MESSAGES = ("sampling", "stopping", "detail", "adapter", "merged_adapters")  # what the router replicas fields in

# What the faces call a field of the router's, where that is not the last part of its name.
LORAX_NAMES = {
    "prompt": "inputs",
    "chat.messages": "messages",
    "n": "best_of",
    "adapter.id": "adapter_id",
    "adapter.source": "adapter_source",
    "adapter.token": "api_token",
    "merged_adapters.adapters": "ids",
    "merged_adapters.strategy": "merge_strategy",
    "detail.top_logprobs": "return_k_alternatives",
}
OPENAI_NAMES = {
    "chat.messages": "messages",
    "adapter.id": "model",
    "adapter.source": "adapter_source",
    "adapter.token": "api_token",
    "inputs": "input",
    "detail.prompt_top_logprobs": "prompt_logprobs",
    "stopping.max_new_tokens": "max_tokens",
    "stopping.min_new_tokens": "min_tokens",
    "truncate": "truncate_prompt_tokens",
}


def internal_error() -> LoraplexError:
    """Stands for an exception that was not foreseen. To be called where that exception is handled."""
    logger.exception("a call failed")
    return LoraplexError("internal error; the server's log has the details")


def lorax_body(error: LoraplexError) -> dict[str, Any]:
    """An adapter that cannot be served is a `generation` error to LoRAX's clients; one that is not there is a 404."""
    refused = isinstance(error, AdapterError) and not isinstance(error, AdapterNotFoundError)
    message = _renamed(error, LORAX_NAMES)
    if isinstance(error, InvalidRequestError):
        message = f"Input validation error: {message}"
    return {"error": message, "error_type": "generation" if refused else error.error_type}


def openai_body(error: LoraplexError) -> dict[str, Any]:
    param = None
    if isinstance(error, InvalidRequestError):
        param = _name(error.violations[0], OPENAI_NAMES)
    elif isinstance(error, AdapterError):
        param = "model"
    code = "model_not_found" if isinstance(error, AdapterNotFoundError) else error.error_type
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else code
    kind = "invalid_request_error" if openai_status(error) < 429 else "server_error"
    kind = "rate_limit_error" if isinstance(error, OverloadedError) else kind
    return {"error": {"message": _renamed(error, OPENAI_NAMES), "type": kind, "param": param, "code": code}}


def openai_status(error: LoraplexError) -> int:
    return 400 if isinstance(error, InvalidRequestError) else error.http_status


def error_response(path: str, error: LoraplexError) -> Response:
    """The answer to a request for `path` that failed before anything was sent."""
    headers = _headers(error)
    if path.startswith(OPENAI_PREFIX):
        return JSONResponse(openai_body(error), openai_status(error), headers)
    return JSONResponse(lorax_body(error), error.http_status, headers)


def install_handlers(app: FastAPI) -> None:
    """Every error of every route goes through `error_response`."""

    @app.exception_handler(LoraplexError)
    async def known(request: Request, error: LoraplexError) -> Response:
        return error_response(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return error_response(request.url.path, _malformed(error))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's for a body that is no text at all
            unreadable = InvalidRequestError(FieldViolation("body", "is not JSON"))
            return error_response(request.url.path, unreadable)
        answer: dict[str, Any] = {"error": error.detail, "error_type": "http"}
        if request.url.path.startswith(OPENAI_PREFIX):
            kind = "invalid_request_error"
            answer = {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
        return JSONResponse(answer, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, internal_error())


def _headers(error: LoraplexError) -> dict[str, str]:
    if isinstance(error, OverloadedError):
        return {"Retry-After": str(ceil(error.retry_after))}
    if isinstance(error, GenerationError):  # it would fail again; OpenAI's clients send any other 500 three times
        return {"x-should-retry": "false"}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, UnauthenticatedError) else {}


def _renamed(error: LoraplexError, names: Mapping[str, str]) -> str:
    if not isinstance(error, InvalidRequestError):
        return error.message
    return "; ".join(f"`{_name(found, names)}` {found.description}" for found in error.violations)


def _name(found: FieldViolation, names: Mapping[str, str]) -> str:
    if found.field.partition(".")[0] in MESSAGES:
        return names.get(found.field) or found.field.rpartition(".")[2]
    return names.get(found.field, found.field)


def _malformed(error: RequestValidationError) -> InvalidRequestError:
    """The first of what pydantic found."""
    return InvalidRequestError(*_merged(map(_violation, error.errors()[:MAX_VIOLATIONS])))


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
