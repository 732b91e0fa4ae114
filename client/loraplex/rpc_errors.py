"""What went wrong with a gRPC call, in the SDK's own errors."""

import os

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

NOT_SENT = "Internal error from Core"  # what asyncio's client says if a call ends while it sends, whatever ended it
PROXIES = "grpc_proxy", "https_proxy", "http_proxy"  # the variables that gRPC reads, in its order
LOCAL = "localhost", "127.0.0.1", "[::1]"


def is_local(address: str) -> bool:
    return (address.rpartition(":")[0] or address) in LOCAL


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
    if message == NOT_SENT:
        return UnavailableError(f"the connection to {server} was lost while the request was sent")
    return error


def _why_not_connected(message: str, server: str) -> str:
    if "http1.x server" in message or "parsing HTTP/2" in message:
        return f"{server} answers HTTP, not gRPC: give the address of the server's gRPC port, such as localhost:50051"
    if "WRONG_VERSION_NUMBER" in message:
        return f"{server} does not speak TLS: leave out https:// and credentials"
    if "CERTIFICATE_VERIFY_FAILED" in message:
        fix = "give its CA's as credentials=grpc.ssl_channel_credentials(root_certificates)"
        return f"the certificate of {server} is not trusted: {fix}"
    if "Hostname Verification" in message:
        return f"the certificate of {server} is for another name: give the server's name as its address"
    if message.startswith("errors resolving"):
        return f"{server} cannot be resolved: write HOST:PORT"
    if "Socket closed" in message:
        why = "connections are closed at once; if it speaks TLS, write https://HOST:PORT or give credentials"
        return f"no server answers at {server}: {why}"
    proxy = next((name for name in PROXIES if os.environ.get(name)), None)
    hint = f"; connections go through the proxy in {proxy}, unless no_proxy names the server"
    by_proxy = hint if proxy and not is_local(server.removeprefix("https://")) else ""
    if "Connection refused" in message:
        port = "" if ":" in server else " (port 443, the default)"
        return f"no server answers at {server}{port}{by_proxy}"
    return f"no server answers at {server}: {message.rpartition('last error: ')[2]}{by_proxy}"
