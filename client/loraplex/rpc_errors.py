"""What went wrong with a gRPC call, in the SDK's own errors."""

import grpc

from loraplex_protos.errors import (
    DeadlineError,
    FieldViolation,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    UnavailableError,
    from_rpc_error,
)


def typed_error(failure: grpc.RpcError, server: str) -> LoraplexError:
    """The error that a call to `server` raises. gRPC's own messages are replaced by clearer ones."""
    error = from_rpc_error(failure)
    message = error.message
    if isinstance(error, OverloadedError) and "larger than max" in message:
        return InvalidRequestError(FieldViolation("request", "is larger than the server reads at once"))
    if isinstance(error, DeadlineError) and message == "Deadline Exceeded":
        return DeadlineError("the server did not answer within the timeout")
    if isinstance(error, UnavailableError):
        if message.startswith(("failed to connect", "errors resolving")):
            return UnavailableError(_why_not_connected(message, server))
        if "Socket closed" in message or "Connection reset" in message:
            return UnavailableError(f"the connection to {server} was lost: the server stopped, or a proxy closed it")
        if message == "ping timeout" or "Connection timed out" in message:
            return UnavailableError(f"the connection to {server} was lost: nothing comes from there any more")
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
