"""The dependencies that routes get from FastAPI."""

import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, TypeAlias, TypeVar

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import Receive

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.access.keys import read_bearer
from loraplex_router.journal.stream import Stream
from loraplex_router.service.requests import new_session
from loraplex_router.service.service import Service
from loraplex_router.vocabulary.checks import REQUEST_ID
from loraplex_router.vocabulary.request import ClassifyRequest, EmbedRequest
from loraplex_router.vocabulary.request import Request as GenerateRequest

LAST_EVENT_ID = "Last-Event-ID"
R = TypeVar("R", GenerateRequest, EmbedRequest, ClassifyRequest)
BACKGROUND = re.compile(r"(^|,)\s*u=7\s*($|[,;])")  # in the header Priority: RFC 9218 reserves this urgency for it


@dataclass(frozen=True, slots=True)
class RouteCall:
    service: Service  # that is called
    key: str | None  # the API key; if the server has no keys, LoRAX's clients send a token for the hub instead
    session: str  # the same for all requests that the call makes
    receive: Receive  # reports the client's disconnect once the body has been read
    request_id: str  # the caller's X-Request-Id if it can be the request's id, else a new one
    last_event_id: str  # of a stream of which the caller wants the rest
    background: bool  # the caller can wait for what it computes

    def complete(self, request: R) -> R:
        """The request with what is said outside of its body."""
        return replace(request, session=self.session, background=request.background or self.background)

    def stream(self, streams: bool | None) -> Stream | None:
        """What an answer is generated with that streams, or not. Raises InvalidRequestError if it cannot be resumed."""
        if streams:
            return self.service.requests.stream(LAST_EVENT_ID, self.last_event_id)
        if self.last_event_id:
            reason = "is of a stream: send the request with `stream: true`"
            raise InvalidRequestError(FieldViolation(LAST_EVENT_ID, reason))
        return None


def key_of(headers: Headers) -> str | None:
    """The API key that the caller sent, in UTF-8 or Latin-1; Anthropic's clients send it as x-api-key."""
    key = read_bearer(headers.get("authorization")) or headers.get("x-api-key")
    with suppress(UnicodeDecodeError):
        return key and key.encode("latin-1").decode()  # headers are read as Latin-1
    return key


async def _read_call(http: Request) -> RouteCall:
    service: Service = http.app.state.service
    request_id, key = http.headers.get("x-request-id", ""), key_of(http.headers)
    usable = REQUEST_ID.fullmatch(request_id) is not None and not service.is_running(request_id, key)
    session = http.headers.get("x-session-id") or new_session()
    last_event_id = http.headers.get(LAST_EVENT_ID, "")
    background = BACKGROUND.search(http.headers.get("priority", "")) is not None
    request_id = request_id if usable else secrets.token_hex(8)
    return RouteCall(service, key, session, http.receive, request_id, last_event_id, background)


Call: TypeAlias = Annotated[RouteCall, Depends(_read_call)]
