"""Answers HEAD wherever there is a GET, because load balancers send it."""

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadAsGet:
    """An ASGI middleware. The HTTP server omits the body, because it knows that the method is HEAD."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
