"""Anthropic's errors: {"type": "error", "error": {"type", "message"}}."""

from typing import Any, Literal

from pydantic import BaseModel

from loraplex_protos.errors import InvalidRequestError, LoraplexError
from loraplex_router.api.http.errors import describe, document_errors

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ErrorDetail(BaseModel):
    type: str
    message: str


class MessagesError(BaseModel):
    type: Literal["error"]
    error: ErrorDetail


ERRORS = document_errors(MessagesError, {400: "A field is wrong; the message names it.", 404: "No such model."})


def write_error(error: LoraplexError) -> dict[str, Any]:
    status = error.http_status
    refused = isinstance(error, InvalidRequestError) or status < 500
    kind = KINDS.get(status, "invalid_request_error" if refused else "api_error")
    return {"type": "error", "error": {"type": kind, "message": describe(error)}}
