"""The client for ordinary code; `loraplex.aio` has the one for asyncio."""

from types import TracebackType
from typing import Self, cast

import grpc
import grpc.aio

from loraplex.blocking import Blocking, BlockingChannel, CallingThread, blocking, blocking_stream
from loraplex.calls import Calls
from loraplex.connection import read_server


class Client(Blocking[Calls]):
    """A connection to a loraplex server; safe to share between threads.

        with Client("localhost:50051") as client:
            print(client.generate("The capital of France is", max_new_tokens=8).text)
            for piece in client.stream([{"role": "user", "content": "Hi"}], adapter="sql"):
                print(piece.text, end="")

    All calls take `timeout`, in seconds, and raise `LoraplexError`s: `UnavailableError` if no server answers,
    `DeadlineError` after the timeout, `InvalidRequestError` for an invalid request. If the server is unavailable or has
    too much to do, calls that change nothing on it are tried again, within their timeout, unless the answer has begun.
    Streams that have begun are resumed, if the server is run with `--store`.
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
            channel = grpc.insecure_channel(address, options=options)
        else:
            channel = grpc.secure_channel(address, credentials, options=options)
        awaitable = cast(grpc.aio.Channel, BlockingChannel(channel))
        super().__init__(Calls(server, awaitable, api_key, max_retries, CallingThread()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    close = blocking(Calls.close)

    generate = blocking(Calls.generate)
    stream = blocking_stream(Calls.stream)
    parse = blocking(Calls.parse)
    stream_parsed = blocking_stream(Calls.stream_parsed)
    cancel = blocking(Calls.cancel)
    embed = blocking(Calls.embed)
    classify = blocking(Calls.classify)
    tokenize = blocking(Calls.tokenize)
    info = blocking(Calls.info)

    adapters = blocking(Calls.adapters)
    load_adapter = blocking(Calls.load_adapter)
    upload_adapter = blocking(Calls.upload_adapter)
    register_adapter = blocking(Calls.register_adapter)
    set_alias = blocking(Calls.set_alias)
    remove_adapter = blocking(Calls.remove_adapter)
    unload_adapter = blocking(Calls.unload_adapter)
    pin_adapter = blocking(Calls.pin_adapter)
    unpin_adapter = blocking(Calls.unpin_adapter)
