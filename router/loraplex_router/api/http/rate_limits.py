"""Tells callers how much of their key's rates is left, in OpenAI's headers."""

import time
from math import ceil

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_protos.errors import UnauthenticatedError
from loraplex_router.access.keys import Keys
from loraplex_router.access.tenant import Tenant
from loraplex_router.api.http.call import key_of


class RateLimits:
    """An ASGI middleware. Answers, refusals too, have x-ratelimit-limit-requests, -remaining-requests and
    -reset-requests, and the same for tokens, as far as the key has such rates."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = self._tenant(scope) if scope["type"] == "http" else None
        if tenant is None:
            return await self._app(scope, receive, send)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for rate in tenant.remaining(time.monotonic()):
                    headers[f"x-ratelimit-limit-{rate.kind}"] = str(rate.limit)
                    headers[f"x-ratelimit-remaining-{rate.kind}"] = str(rate.count)
                    headers[f"x-ratelimit-reset-{rate.kind}"] = duration(rate.seconds)
            await send(message)

        await self._app(scope, receive, send_with_limits)

    def _tenant(self, scope: Scope) -> Tenant | None:
        try:
            return self._keys.tenant(key_of(Headers(scope=scope)))
        except UnauthenticatedError:
            return None


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1s, 6m0s. Rounded up, so that it is not too early to try again then."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    minutes, rest = divmod(ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
