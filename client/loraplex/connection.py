"""Sends calls, and tries again what can be tried again."""

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import grpc
import grpc.aio

from loraplex.retries import Attempts
from loraplex.rpc_errors import is_local
from loraplex_protos import generation_pb2 as pb
from loraplex_protos.generation_pb2_grpc import GenerationServiceStub

Q = TypeVar("Q", contravariant=True)
R = TypeVar("R", covariant=True)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_retries", 0),  # see retries.py
    ("grpc.initial_reconnect_backoff_ms", 100),  # both less than the pauses between attempts
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_receive_message_length", -1),  # alternatives for every token can exceed gRPC's default of 4 MiB
    # While a call waits, silence is questioned: the server's host may be gone, or a NAT may have forgotten the
    # connection. One that rests is closed before load balancers and NATs forget it, after four minutes (Azure) or more.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: a client that waits sends nothing else
    ("grpc.client_idle_timeout_ms", 120_000),
)

HTTPS = "https://"

Metadata = tuple[tuple[str, str], ...]


class Server(NamedTuple):
    """What a channel is opened with."""

    address: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, int], ...]


def read_server(server: str, credentials: grpc.ChannelCredentials | None) -> Server:
    """HOST:PORT, and the credentials for it: an address that begins with https:// is one of a server with TLS. Raises
    ValueError for other URLs."""
    if not server or server.startswith("http://"):
        raise ValueError(f"{server!r} is not HOST:PORT, the address of a server's gRPC port, such as localhost:50051")
    address = server
    if server.startswith(HTTPS):
        address, credentials = server.removeprefix(HTTPS).rstrip("/"), credentials or grpc.ssl_channel_credentials()
    own = (("grpc.enable_http_proxy", 0),) if is_local(address) else ()  # no proxy of the environment leads there
    return Server(address, credentials, CHANNEL_OPTIONS + own)


class Method(Protocol[Q, R]):
    """A method of the stub that is answered with one message."""

    def __call__(self, request: Q, /, *, timeout: float | None, metadata: Metadata) -> Awaitable[R]: ...


class Call(AsyncIterable[R], Protocol[R]):
    """A call in progress that is answered with a stream of messages."""

    def cancel(self) -> bool: ...


class StreamMethod(Protocol[Q, R]):
    """A method of the stub that is answered with a stream of messages."""

    def __call__(self, request: Q, /, *, timeout: float | None, metadata: Metadata) -> Call[R]: ...


class Waiting(Protocol):
    """How coroutines wait: with an event loop, or by blocking the thread."""

    async def sleep(self, seconds: float, /) -> None: ...

    async def all_of(self, calls: Sequence[Callable[[], object]], /) -> list[object]:
        """What each call returns, or the Exception that it raises. Several run at the same time."""
        ...


class Connection:
    """What sends the calls of `AsyncClient` and, over a channel that blocks, those of `Client`."""

    def __init__(
        self,
        server: str,
        channel: grpc.aio.Channel,
        api_key: str | None,
        max_retries: int,
        waiting: Waiting,
    ) -> None:
        """Raises ValueError for a wrong number."""
        if not isinstance(max_retries, int) or max_retries < 0:
            raise ValueError("max_retries must be a whole number, at least 0")
        self._server = server
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._stub = GenerationServiceStub(channel)
        self._max_retries = max_retries
        self._waiting = waiting

    async def close(self) -> None:
        """Closes the connection, which ends the calls in progress."""
        await self._channel.close()

    async def _send(self, method: Method[Q, R], request: Q, timeout: float | None) -> R:
        """For calls that change nothing on the server."""
        return await self._attempt(method, request, Attempts(self._server, self._max_retries, timeout))

    async def _send_once(self, method: Method[Q, R], request: Q, timeout: float | None) -> R:
        """For calls that may have had an effect although they failed."""
        return await self._attempt(method, request, Attempts(self._server, 0, timeout))

    async def _attempt(self, method: Method[Q, R], request: Q, attempts: Attempts) -> R:
        while True:
            try:
                return await method(request, timeout=attempts.timeout, metadata=self._metadata)
            except grpc.RpcError as failure:
                pause = attempts.pause(failure)
            await self._waiting.sleep(pause)

    async def _stream(
        self,
        method: StreamMethod[pb.GenerateRequest, pb.GenerateStreamResponse],
        request: pb.GenerateRequest,
        timeout: float | None,
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Once something has arrived, it is not tried again but resumed, if the server can do that."""
        attempts = Attempts(self._server, self._max_retries, timeout)
        while True:
            call, begun = method(request, timeout=attempts.timeout, metadata=self._metadata), False
            try:
                async for response in call:
                    begun = True
                    request.resume_token = response.resume_token  # not a former one, which would repeat this response
                    if response.resume_token:
                        attempts.renew()
                    yield response
                return
            except grpc.RpcError as failure:
                pause = attempts.pause(failure, begun and not request.resume_token)
            finally:
                call.cancel()
            await self._waiting.sleep(pause)
