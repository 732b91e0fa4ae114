"""Servers that are gone without a word: their host has failed, or a NAT has forgotten the connection."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from loraplex import AsyncClient, Client, UnavailableError
from loraplex.connection import CHANNEL_OPTIONS
from loraplex.rpc_errors import NOT_SENT, typed_error
from tests.chaos.proxy import Proxy
from tests.client.scripted import ENDLESS, ScriptedServicer

SOON = {"grpc.keepalive_time_ms": 100, "grpc.http2.ping_timeout_ms": 100}


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    options = tuple((name, SOON.get(name, value)) for name, value in CHANNEL_OPTIONS)
    monkeypatch.setattr("loraplex.connection.CHANNEL_OPTIONS", options)


@pytest.fixture
async def proxy(address: str) -> AsyncIterator[Proxy]:
    proxy = await Proxy(int(address.rpartition(":")[2])).start()
    yield proxy
    await proxy.close()


async def test_a_stream_goes_on_at_another_server(proxy: Proxy, address: str, servicer: ScriptedServicer) -> None:
    servicer.resumable = True
    numbers = list[int]()
    async with AsyncClient(f"ipv4:127.0.0.1:{proxy.port},{address}") as client:
        stream = client.stream(ENDLESS)
        async for piece in stream:
            proxy.joined.clear()
            numbers.append(int(piece.text))
            if len(servicer.requests) > 1:
                break
        await stream.aclose()
    assert numbers == list(range(len(numbers)))


async def test_a_blocking_call_ends_with_an_error(proxy: Proxy) -> None:
    def read() -> None:
        with Client(f"127.0.0.1:{proxy.port}", max_retries=0) as client:
            for _ in client.stream(ENDLESS):
                loop.call_soon_threadsafe(proxy.joined.clear)

    loop = asyncio.get_running_loop()
    with pytest.raises(UnavailableError, match="was lost: nothing comes from there any more"):
        await asyncio.wait_for(asyncio.to_thread(read), 60)


def test_a_call_that_ends_while_its_request_is_sent_is_a_lost_connection() -> None:
    failure = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), NOT_SENT)
    error = typed_error(failure, "there:50051")
    assert isinstance(error, UnavailableError) and "to there:50051 was lost while the request" in error.message
