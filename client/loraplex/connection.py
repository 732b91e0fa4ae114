"""What both clients do around a call: retries, as the channel's options, and typed errors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from loraplex_protos.errors import from_rpc_error

_SERVICE = "loraplex.v1.GenerationService"

# Calls that leave nothing behind on the server.
_REPEATABLE = ("Generate", "GenerateStream", "Embed", "Tokenize", "ListAdapters", "GetModelInfo")

# gRPC tries again on its own, within the call's deadline, as long as the server has answered nothing: neither
# initial metadata nor a message (gRFC A6). The backoff doubles, with a jitter of a fifth.
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
    # An answer is as large as what was asked for: with alternatives for every token it can pass gRPC's 4 MiB.
    ("grpc.max_receive_message_length", -1),
)


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What tells the server the API key."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turns what a gRPC call raises into the LoraplexError that the server, or the connection, meant by it."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
