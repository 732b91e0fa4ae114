"""OpenAI's errors, which vLLM's clients read as well: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from pydantic import BaseModel

from loraplex_protos.errors import (
    AdapterError,
    AdapterNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
)
from loraplex_router.api.http.errors import HttpError, describe, document_errors
from loraplex_router.vocabulary.context_length import ContextLengthError


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenaiError(BaseModel):
    error: ErrorDetail


ERRORS = document_errors(OpenaiError, {400: "A field is wrong; `param` names it.", 404: "No such model."})


def write_error(error: LoraplexError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.http_status < 429 else "server_error"
    param, code = None, error.error_type
    match error:
        case InvalidRequestError():
            param = error.violations[0].field
            code = "context_length_exceeded" if isinstance(error, ContextLengthError) else code
        case AdapterError() | ForbiddenError():
            param = "model" if error.field == "adapter.id" else error.field or None
            code = "model_not_found" if isinstance(error, AdapterNotFoundError) else code
        case OverloadedError():
            kind = "rate_limit_error"
    shown = None if isinstance(error, HttpError) else code
    return {"error": {"message": describe(error), "type": kind, "param": param, "code": shown}}
