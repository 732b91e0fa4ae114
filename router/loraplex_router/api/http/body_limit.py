"""Refuses requests whose body is too large, before all of it is in memory."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 << 20  # bytes: what the gRPC face takes


class BodyLimit:
    """An ASGI middleware. A body is counted as it arrives, whatever its length was said to be."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, f"a request must have at most {self._limit} bytes")
            return message

        await self._app(scope, counted, send)
