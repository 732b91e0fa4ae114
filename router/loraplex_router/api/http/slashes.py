"""Slashes that clients leave too many of when they join a base URL and a path."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

OUTER = re.compile(r"^/+(?=/)|/+$")
AFTER_VERSION = re.compile(r"^/v1/+")


class Slashes:
    """An ASGI middleware. `//v1/models`, `/v1//models` and `/v1/models/` are answered as `/v1/models`. A redirection
    would not do: it would name scheme and host as the router sees them, which behind a proxy are not the client's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if path := scope.get("path"):
            scope = {**scope, "path": AFTER_VERSION.sub("/v1/", OUTER.sub("", path)) or "/"}
        await self._app(scope, receive, send)
