"""Misuse of a connection before and after its request, such as too large or too slow bodies."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256

import grpc.aio
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.generation_pb2_grpc import GenerationServiceServicer, GenerationServiceStub
from loraplex_router.access.keys import Keys, TenantSettings
from loraplex_router.api import sending
from loraplex_router.api.grpc import SERVER_OPTIONS, GrpcServer
from loraplex_router.api.http import connection
from loraplex_router.api.http.body_limit import MOST_BODIES, BodyLimit
from loraplex_router.api.http.connection import MAX_HEADERS, MAX_PIPELINED, TOO_MANY, Connection
from tests.chaos.proxy import Proxy

LIMIT = 1000
ENDED = asyncio.Event()  # an answer without an end has ended
ENDLESS = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def count(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def ignore(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ignored")


async def endless(request: Request) -> StreamingResponse:
    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 2**16
                await asyncio.sleep(0)
        finally:
            request.app.state.ended.set()

    return StreamingResponse(parts())


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """The address of a server that answers with the length of a body, and does not wait long."""
    for name in ("HEADER_SECONDS", "IDLE_SECONDS", "READ_SECONDS", "REST_SECONDS"):
        monkeypatch.setattr(connection, name, 0.2)
    routes = (
        Route("/", count, methods=["POST"]),
        Route("/ignored", ignore, methods=["POST"]),
        Route("/endless", endless),
    )
    app = Starlette(routes=routes)
    app.state.ended = ENDED
    ENDED.clear()
    app.add_middleware(BodyLimit, limit=LIMIT, keys=Keys({}), seconds=0.2)
    server = Server(uvicorn.Config(app, port=0, http=Connection, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def send(port: int, *parts: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    with contextlib.suppress(ConnectionError):
        answer = await reader.read()
        writer.close()
        return answer
    return b""


def post(body: bytes, *headers: bytes) -> bytes:
    head = [b"POST / HTTP/1.1", b"host: a", b"connection: close", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


async def test_a_body_within_the_limit_is_read(port: int):
    assert (await send(port, post(b"x" * LIMIT))).endswith(b"1000")


@pytest.mark.parametrize("begun", [b"", b"POST / HT", b"POST / HTTP/1.1\r\nhost: a\r\nx-a"])
async def test_a_connection_without_a_request_is_closed(port: int, begun: bytes):
    assert await send(port, begun) == b""


async def test_a_connection_without_a_second_request_is_closed(port: int):
    kept = post(b"x").replace(b"connection: close\r\n", b"")
    assert (await send(port, kept)).endswith(b"1")


def test_connections_are_kept_for_longer_than_load_balancers_keep_theirs():
    assert connection.IDLE_SECONDS > 600  # Google's, the longest of those that are common


async def test_headers_without_an_end_are_refused(port: int):
    line = b"x-more: " + b"a" * 1000 + b"\r\n"
    answer = await send(port, b"POST / HTTP/1.1\r\n", *[line] * (MAX_HEADERS // 1000), *[line] * 100)
    assert answer.startswith(b"HTTP/1.1 431") or answer == b""


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(b"x" * (LIMIT + 1)), b"413"),
        (ENDLESS + b"400\r\n" + b"x" * 0x400 + b"\r\n0\r\n\r\n", b"413"),
        (ENDLESS + b"1\r\nx\r\n", b"408"),
        (post(b"x" * 10, b"content-encoding: gzip"), b"415"),
    ],
)
async def test_bodies_that_are_too_large_too_slow_or_compressed_are_refused(port: int, request_: bytes, status: bytes):
    assert (await send(port, request_)).startswith(b"HTTP/1.1 " + status)


async def test_the_server_does_not_wait_for_a_body_that_nobody_reads(port: int):
    assert b"ignored" in await send(port, ENDLESS.replace(b"/ ", b"/ignored ", 1))


class Bodies:
    """Requests whose bodies have arrived, and which are not answered until `release` is set."""

    def __init__(self, keys: Keys) -> None:
        self.release = asyncio.Event()
        self.limited = BodyLimit(self._app, LIMIT, keys)
        self._arrived = 0
        self._running = list[asyncio.Task[None]]()

    async def hold(self, size: int, key: str = "") -> None:
        """Raises what refuses the request."""
        arrived = self._arrived
        self._running.append(asyncio.create_task(self.send(size, key)))
        while self._arrived == arrived:
            await asyncio.sleep(0)
            if self._running[-1].done():
                return await self._running.pop()

    async def send(self, size: int, key: str = "") -> None:
        async def receive():
            return {"type": "http.request", "body": b"x" * size, "more_body": False}

        await self.limited({"type": "http", "headers": [(b"authorization", f"Bearer {key}".encode())]}, receive, None)

    async def answer(self) -> None:
        self.release.set()
        await asyncio.gather(*self._running)

    async def _app(self, scope, receive, send):
        await receive()
        self._arrived += 1
        await self.release.wait()


async def test_bodies_that_are_too_large_together_are_refused():
    bodies = Bodies(Keys({}))
    for _ in range(MOST_BODIES):
        await bodies.hold(LIMIT)
    with pytest.raises(HTTPException, match="try again"):
        await bodies.send(1)
    await bodies.answer()
    await bodies.send(1)


async def test_the_bodies_of_a_tenant_leave_room_for_those_of_others_and_without_a_key_none_is_read():
    bodies = Bodies(Keys({name: TenantSettings(keys=[sha256(name.encode()).hexdigest()]) for name in ("one", "two")}))
    with pytest.raises(HTTPException, match="unknown API key"):
        await bodies.send(1, "nobody")
    for _ in range(MOST_BODIES // 2):
        await bodies.hold(LIMIT, "one")
    with pytest.raises(HTTPException, match="try again"):
        await bodies.send(1, "one")
    await bodies.hold(LIMIT, "two")
    await bodies.answer()
    await bodies.send(LIMIT, "one")


@pytest.mark.parametrize("back", [12, 13, 14, 15, 16, 17, 20, 24, 40, 50])  # where a request is cut, from its end
async def test_the_bodies_of_requests_that_offer_http_2_are_read(port: int, back: int):
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\nUpgrade: h2c\r\n"  # Java's client
    request = post(b"\nUpgrade: \n").replace(b"connection: close\r\n", offer)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        for part in (request[:-back], request[-back:]):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)  # so that it is likely to arrive alone
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n11"), 60)
        assert answer.startswith(b"HTTP/1.1 200 OK")
    writer.close()


async def test_many_requests_before_an_answer_are_refused(port: int):
    one = post(b"x").replace(b"connection: close\r\n", b"")
    answer = await send(port, one * (MAX_PIPELINED - 1) + post(b"xx"))
    assert answer.count(b"HTTP/1.1 200 OK") == MAX_PIPELINED and answer.endswith(b"2")
    answer = await send(port, one * (MAX_PIPELINED + 10))
    assert b"HTTP/1.1 400" in answer and TOO_MANY.encode() in answer


async def test_a_client_that_does_not_read_is_given_up(port: int):
    _reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
    writer.write(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
    await asyncio.wait_for(ENDED.wait(), 60)
    writer.close()


async def test_the_system_gives_up_http_clients_whose_host_is_gone(port: int, monkeypatch: pytest.MonkeyPatch):
    made, options = Connection.connection_made, list[int]()

    def look(self: Connection, transport: asyncio.Transport) -> None:
        made(self, transport)
        of = transport.get_extra_info("socket").getsockopt
        options.append(of(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        if sys.platform == "linux":
            options.append(of(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))

    monkeypatch.setattr(Connection, "connection_made", look)
    await send(port, post(b"x"))
    assert options == [1, 120_000][: len(options)] != []


async def test_a_grpc_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sending, "READ_SECONDS", 0.2)
    ended = asyncio.Event()

    class Endless(GenerationServiceServicer):
        async def GenerateStream(self, request, context):
            try:
                while True:
                    yield pb.GenerateStreamResponse(text="x" * 2**20)
            finally:
                ended.set()

    server = GrpcServer(Endless(), Keys({}), LIMIT)
    grpc_port = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        call = GenerationServiceStub(channel).GenerateStream(pb.GenerateRequest())
        assert len((await call.read()).text) == 2**20
        await asyncio.wait_for(ended.wait(), 60)
        with pytest.raises(grpc.aio.AioRpcError, match="the client has read nothing"):
            while await call.read():
                pass
    await server.stop(0)


async def test_a_grpc_client_whose_host_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch):
    soon = {"grpc.keepalive_time_ms": 100, "grpc.http2.ping_timeout_ms": 100}
    options = tuple((name, soon.get(name, value)) for name, value in SERVER_OPTIONS)
    monkeypatch.setattr("loraplex_router.api.grpc.SERVER_OPTIONS", options)
    begun, ended = asyncio.Event(), asyncio.Event()

    class Slow(GenerationServiceServicer):
        async def Generate(self, request, context):
            try:
                begun.set()
                await asyncio.sleep(600)
            finally:
                ended.set()

    server = GrpcServer(Slow(), Keys({}), LIMIT)
    proxy = await Proxy(await server.start("127.0.0.1", 0)).start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
        call = GenerationServiceStub(channel).Generate(pb.GenerateRequest())
        await asyncio.wait_for(begun.wait(), 60)
        proxy.joined.clear()
        await asyncio.wait_for(ended.wait(), 60)
        call.cancel()
    await proxy.close()
    await server.stop(0)


class Clock:
    """Takes the place of asyncio in `sending`. Its time goes on when all wait for it."""

    create_task = staticmethod(asyncio.create_task)

    def __init__(self) -> None:
        self.now = 0.0
        self._waiting: list[tuple[float, asyncio.Future[None]]] = []

    def get_running_loop(self) -> "Clock":
        return self

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self._waiting.append((self.now + seconds, asyncio.get_running_loop().create_future()))
        await self._waiting[-1][1]

    async def run(self) -> None:
        while True:
            for _ in range(10):
                await asyncio.sleep(0)
            self._waiting.sort(key=lambda each: each[0])
            self.now, came = self._waiting.pop(0)
            if not came.done():
                came.set_result(None)


@pytest.mark.parametrize(("seconds", "sent"), [(60, True), (119, True), (121, False)])
async def test_the_time_to_read_an_answer_of_grpc_begins_when_it_is_sent(
    monkeypatch: pytest.MonkeyPatch, seconds: float, sent: bool
):
    clock = Clock()
    monkeypatch.setattr(sending, "asyncio", clock)

    async def answers() -> AsyncIterator[str]:
        await clock.sleep(110)  # in the queue
        yield "first"
        yield "second"

    class Context:
        async def write(self, answer: str) -> None:
            await clock.sleep(seconds)

    running = asyncio.create_task(clock.run())
    assert await sending.Sender(answers(), Context()).send_all() is sent
    running.cancel()


async def test_a_grpc_client_that_pings_often_keeps_its_connection():
    server = GrpcServer(GenerationServiceServicer(), Keys({}), LIMIT)
    grpc_port = await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", grpc_port)
    settings, ping = bytes(3) + b"\x04" + bytes(5), b"\x00\x00\x08\x06" + bytes(5) + b"a ping.."  # frames of HTTP/2
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
    answered = 0
    while answered < 20:
        writer.write(ping)
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3]))
        kind, answers = head[3], head[4] & 1
        assert kind != 7  # GOAWAY
        answered += kind == 6 and answers
    writer.close()
    await server.stop(0)


async def test_a_draining_grpc_server_has_clients_connect_elsewhere_and_finishes_their_calls():
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(GenerationServiceServicer):
        async def Generate(self, request, context):
            begun.set()
            await go_on.wait()
            return pb.GenerateResponse()

    first, second = GrpcServer(Slow(), Keys({}), LIMIT), GrpcServer(Slow(), Keys({}), LIMIT)
    ports = [await server.start("127.0.0.1", 0) for server in (first, second)]
    addresses = ",".join(f"127.0.0.1:{each}" for each in ports)
    async with grpc.aio.insecure_channel(f"ipv4:{addresses}") as channel:
        stub = GenerationServiceStub(channel)
        running = asyncio.create_task(_status(stub.Generate(pb.GenerateRequest())))
        await begun.wait()
        await first.drain()
        begun.clear()
        another = asyncio.create_task(_ask_until_answered(stub))
        await begun.wait()  # by the second server: the first takes no more
        go_on.set()
        await another
        assert await running is grpc.StatusCode.OK
    for server in (first, second):
        await server.stop(0)


async def _status(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    return await call.code()


async def _ask_until_answered(stub: GenerationServiceStub) -> None:
    """One call may be refused because it meets the news that the server takes no more."""
    while await _status(stub.Generate(pb.GenerateRequest(), wait_for_ready=True)) is not grpc.StatusCode.OK:
        pass
