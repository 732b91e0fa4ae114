"""The dependencies that routes get from FastAPI."""

import secrets
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from fastapi import Depends, Request
from starlette.types import Receive

from loraplex_router.access.keys import read_bearer
from loraplex_router.service.service import Service


@dataclass(frozen=True, slots=True)
class RouteCall:
    service: Service  # that is called
    key: str | None  # the API key; if the server has no keys, LoRAX's clients send a token for the hub instead
    session: str  # the same for all requests that the call makes
    receive: Receive  # reports the client's disconnect once the body has been read


async def _read_call(http: Request) -> RouteCall:
    key = read_bearer(http.headers.get("authorization"))
    session = http.headers.get("x-session-id") or secrets.token_hex(8)
    return RouteCall(http.app.state.service, key, session, http.receive)


Call: TypeAlias = Annotated[RouteCall, Depends(_read_call)]
