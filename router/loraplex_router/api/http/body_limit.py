"""Limits request bodies: the size of each, before it is in memory, the time it takes, and the size of all together.
Nothing is read of callers without a key, where one is needed."""

import asyncio
from collections.abc import Collection
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_protos.errors import UnauthenticatedError
from loraplex_router.access.keys import Keys
from loraplex_router.access.room import FULL, Holding, Room
from loraplex_router.access.tenant import Tenant
from loraplex_router.api.http.call import key_of

BODY_SECONDS = 60.0  # from a request's headers to the end of its body
MOST_BODIES = 8  # bodies of the largest size that may be in memory together, or more smaller ones
MOST_DISCARDED = 8  # times the largest size is read of a refused body, because many clients send all of it first


class BodyLimit:
    """An ASGI middleware. Counts a body as it arrives, whatever its Content-Length, until its request is answered. A
    body is refused if there is no room for it."""

    def __init__(
        self, app: ASGIApp, limit: int, keys: Keys, seconds: float = BODY_SECONDS, without: Collection[str] = ()
    ) -> None:
        """`without`: the paths of routes that limit their bodies themselves."""
        self._app = app
        self._limit = limit  # bytes
        self._keys = keys
        self._seconds = seconds
        self._room = Room(limit * MOST_BODIES, keys)
        self._without = frozenset(without)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") in self._without:
            await self._app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self._seconds
        holding: Holding | None = None
        complete = False

        async def read() -> tuple[Message, int]:
            """A part of the body, and its length."""
            nonlocal complete
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                complete = True
                late = f"the body was not complete after {self._seconds:g} seconds"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            complete = not message.get("more_body", False)
            return message, len(message.get("body", b""))

        async def counted() -> Message:
            nonlocal holding
            if complete:
                return await receive()
            holding = holding or stack.enter_context(self._room.holding(self._tenant(scope)))
            message, size = await read()
            fits = holding.take(size)
            if refusal := self._refusal(scope, holding.taken, fits):
                discarded = size
                while not complete and discarded < self._limit * MOST_DISCARDED:
                    discarded += (await read())[1]
                raise refusal
            return message

        with ExitStack() as stack:
            await self._app(scope, counted, send)

    def _tenant(self, scope: Scope) -> Tenant:
        try:
            return self._keys.tenant(key_of(Headers(scope=scope)))
        except UnauthenticatedError as error:
            raise HTTPException(401, error.message) from None

    def _refusal(self, scope: Scope, received: int, fits: bool) -> HTTPException | None:
        encodings = {value.lower() for name, value in scope["headers"] if name == b"content-encoding"}
        if encodings - {b"", b"identity"}:
            return HTTPException(415, "compressed bodies are not read: send it without Content-Encoding")
        if received > self._limit:
            return HTTPException(413, f"a request must have at most {self._limit} bytes", {"Connection": "close"})
        if not fits:
            return HTTPException(429, FULL, {"Retry-After": "1"})
        return None
