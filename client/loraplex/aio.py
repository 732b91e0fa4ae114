"""The client for asyncio."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from loraplex.calls import Calls
from loraplex.connection import read_server


class EventLoop:
    """Waits without blocking the event loop."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def all_of(self, calls: Sequence[Callable[[], object]]) -> list[object]:
        """Ordinary functions run in threads; what coroutine functions return is awaited."""
        return await asyncio.gather(*map(self._result, calls))

    async def _result(self, call: Callable[[], object]) -> object:
        try:
            result = await asyncio.to_thread(call)
            return await result if inspect.isawaitable(result) else result
        except Exception as error:
            return error


class AsyncClient(Calls):
    """`Client` for asyncio: the same methods, but awaitable.

        async with AsyncClient("localhost:50051") as client:
            print((await client.generate("The capital of France is", max_new_tokens=8)).text)
            async for piece in client.stream([{"role": "user", "content": "Hi"}], adapter="sql"):
                print(piece.text, end="")

    Cancelling the task that waits for a call cancels the call on the server.
    """

    def __init__(
        self,
        server: str = "localhost:50051",
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        max_retries: int = 2,
    ) -> None:
        """`server` is host:port, or https://host:port for a server with TLS; `api_key` is for a server with keys;
        `credentials`, such as `grpc.ssl_channel_credentials(root_certificates)`, also turn TLS on; `max_retries` is how
        often a call is tried again. Raises ValueError if `server` is another URL."""
        address, credentials, options = read_server(server, credentials)
        if credentials is None:
            channel = grpc.aio.insecure_channel(address, options=options)
        else:
            channel = grpc.aio.secure_channel(address, credentials, options=options)
        super().__init__(server, channel, api_key, max_retries, EventLoop())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
