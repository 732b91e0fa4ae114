"""Connections take file descriptors: those without a request make room for others."""

import asyncio
import resource

import pytest
import uvicorn

from loraplex_protos.generation_pb2_grpc import GenerationServiceServicer
from loraplex_router.access.keys import Keys
from loraplex_router.api.grpc import GrpcServer
from loraplex_router.api.http.connection import Connection
from loraplex_router.app import HttpServer, listen

ASK = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


class Server:
    """Answers begin at once, and end when `release` is set."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        config = uvicorn.Config(self._app, http=Connection, interface="asgi3", lifespan="off", log_config=None)
        self._server = HttpServer(config)
        self._clients = list[asyncio.StreamWriter]()
        self._listener = listen("127.0.0.1", 0, "--http-port")

    async def __aenter__(self) -> "Server":
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        self._server.should_exit = True
        await self._serving

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self._listener.getsockname())
        self._clients.append(writer)
        address = writer.get_extra_info("sockname")
        while not any(each.client == address for each in self._server.server_state.connections):
            await asyncio.sleep(0.01)
        return reader, writer

    async def _app(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        await self.release.wait()
        await send({"type": "http.response.body", "body": b"k"})


@pytest.fixture
def sixteen_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no more could be open: six connections over HTTP are not many, and eight over gRPC."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))


@pytest.mark.usefixtures("sixteen_files")
async def test_connections_without_a_request_are_closed_for_new_ones_the_oldest_first(
    caplog: pytest.LogCaptureFixture,
):
    async with Server() as server:
        (stream, ask), (kept, ask_too), *idle = [await server.connect() for _ in range(6)]
        for reader, writer in ((stream, ask), (kept, ask_too)):
            writer.write(ASK)
            assert (await reader.readuntil(b"\r\n\r\no")).startswith(b"HTTP/1.1 200")
        server.release.set()
        assert await kept.readexactly(1) == b"k" and await stream.readexactly(1) == b"k"
        server.release.clear()
        ask.write(ASK)
        await stream.readuntil(b"\r\n\r\no")
        newer = [await server.connect() for _ in range(5)]
        assert [await reader.read() for reader, _ in idle] == [b""] * 4
        assert await kept.read() == b""  # it has been without a request for less long, but is the oldest now
        newer += [await server.connect() for _ in range(5)]
        assert [await reader.read() for reader, _ in newer[:5]] == [b""] * 5
        newer[-1][1].write(ASK)
        await newer[-1][0].readuntil(b"\r\n\r\no")
        server.release.set()
        assert await stream.readexactly(1) == b"k" == await newer[-1][0].readexactly(1)
    assert caplog.text.count("those without a request are closed") == 1


@pytest.mark.usefixtures("sixteen_files")
async def test_grpc_takes_half_of_the_descriptors():
    server = GrpcServer(GenerationServiceServicer(), Keys({}), 1000)
    port = await server.start("127.0.0.1", 0)
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
    for reader, _ in opened:
        assert await reader.readexactly(9)  # the server's settings
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with pytest.raises((asyncio.IncompleteReadError, OSError)):
        await reader.readexactly(9)
    for _, each in (*opened, (reader, writer)):
        each.close()
    await server.stop(0)
