"""Sends calls: retries, set in the channel's options, and typed errors."""

import json
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from loraplex_protos.errors import DeadlineError, LoraplexError, UnavailableError, from_rpc_error
from loraplex_protos.generation_pb2_grpc import GenerationServiceStub

Q = TypeVar("Q", contravariant=True)
R = TypeVar("R", covariant=True)

_SERVICE = "loraplex.v1.GenerationService"

# Calls that change nothing on the server.
_REPEATABLE = ("Generate", "GenerateStream", "Embed", "Tokenize", "ListAdapters", "GetModelInfo")

# gRPC retries by itself, within the call's deadline, until the server has sent anything: initial metadata or a message
# (gRFC A6). The backoff doubles, with a jitter of a fifth.
_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

_SERVICE_CONFIG = {
    "methodConfig": [
        {"name": [{"service": _SERVICE, "method": method} for method in _REPEATABLE], "retryPolicy": _RETRY},
    ]
}

CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # Answers with alternatives for every token can exceed gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", -1),
)


class Method(Protocol[Q, R]):
    """A method of the stub that is answered with one message."""

    def __call__(
        self, request: Q, /, *, timeout: float | None, metadata: tuple[tuple[str, str], ...]
    ) -> Awaitable[R]: ...


class Connection:
    """What sends the calls of `AsyncClient` and, over a channel that blocks, those of `Client`."""

    def __init__(self, server: str, channel: grpc.aio.Channel, api_key: str | None) -> None:
        self._server = server
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._stub = GenerationServiceStub(channel)

    async def close(self) -> None:
        """Closes the connection, which ends the calls in progress."""
        await self._channel.close()

    async def _send(self, method: Method[Q, R], request: Q, timeout: float | None) -> R:
        with typed_errors(self._server):
            return await method(request, timeout=timeout, metadata=self._metadata)


def check_address(server: str) -> str:
    """Raises ValueError if this is not the address of a gRPC port."""
    if not server or server.startswith(("http://", "https://")):
        raise ValueError(f"{server!r} is not HOST:PORT, the address of a server's gRPC port, such as localhost:50051")
    return server


@contextmanager
def typed_errors(server: str) -> Iterator[None]:
    """Converts the errors of a gRPC call to `server` into LoraplexErrors."""
    try:
        yield
    except grpc.RpcError as error:
        typed = from_rpc_error(error)
        raise _explained(typed, server) from None


def _explained(error: LoraplexError, server: str) -> LoraplexError:
    """Replaces gRPC's own error messages by clearer ones."""
    message = error.message
    if isinstance(error, DeadlineError) and message == "Deadline Exceeded":
        return DeadlineError("the server did not answer within the timeout")
    if isinstance(error, UnavailableError):
        if message.startswith(("failed to connect", "errors resolving")):
            return UnavailableError(_why_not_connected(message, server))
        if "Socket closed" in message or "Connection reset" in message:
            return UnavailableError(f"the connection to {server} was lost: the server stopped, or a proxy closed it")
    return error


def _why_not_connected(message: str, server: str) -> str:
    if "http1.x server" in message or "parsing HTTP/2" in message:
        return f"{server} answers HTTP, not gRPC: give the address of the server's gRPC port, such as localhost:50051"
    if message.startswith("errors resolving"):
        return f"{server} cannot be resolved: write HOST:PORT"
    if "Connection refused" in message:
        port = "" if ":" in server else " (port 443, the default)"
        return f"no server answers at {server}{port}"
    return f"no server answers at {server}: {message.rpartition('last error: ')[2]}"
