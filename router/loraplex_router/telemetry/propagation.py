"""Activates the caller's trace context: W3C traceparent, in HTTP headers or gRPC metadata.

Imported only if tracing is on.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from opentelemetry.context import attach, detach
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_protos.tracing import W3C

if TYPE_CHECKING:  # generic only in its stubs
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any] | None

NAMES = frozenset(W3C.fields)


class HttpTraceContext:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope.get("headers", ()))
        token = attach(W3C.extract(_pick(headers)))
        try:
            await self._app(scope, receive, send)
        finally:
            detach(token)


class GrpcTraceContext(grpc.aio.ServerInterceptor):
    """Each call runs in its own task, whose context ends with it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler":
        metadata = handler_call_details.invocation_metadata or ()
        attach(W3C.extract(_pick((name, value) for name, value in metadata if isinstance(value, str))))
        return await continuation(handler_call_details)


def _pick(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name in NAMES}
