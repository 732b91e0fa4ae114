"""The addresses that a router listens on and connects to, for IPv4 and IPv6."""

import asyncio
import socket
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from bench.stand_in_shard import StandInServer, StandInShard, Timing
from loraplex_router.app import Router
from loraplex_router.settings import RouterSettings
from loraplex_router.telemetry.opening import open_telemetry

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "reached"), [("::", ["127.0.0.1", "::1"]), ("::1", ["::1"]), ("0.0.0.0", ["127.0.0.1"])]
)
async def test_a_router_is_reached_where_it_listens(host: str, reached: list[str]):
    async with StandInServer(StandInShard(Timing()), "[::1]:0") as shard:
        settings = RouterSettings(host=host, shards=(f"[::1]:{shard.port}",), http_port=0, grpc_port=0)
        with open_telemetry(settings) as telemetry:
            ports: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
            router = Router(settings, None, telemetry)
            running = asyncio.create_task(router.run(lambda http, grpc, *_: ports.set_result((http, grpc))))
            try:
                http_port, grpc_port = await asyncio.wait_for(ports, 60)
                for address in reached:
                    assert await status(address, http_port) == 200
                    shown = f"[{address}]" if ":" in address else address
                    async with grpc.aio.insecure_channel(f"{shown}:{grpc_port}") as channel:
                        answer = await HealthStub(channel).Check(HealthCheckRequest())
                    assert answer.status == HealthCheckResponse.SERVING
            finally:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running


async def status(address: str, port: int) -> int:
    reader, writer = await asyncio.open_connection(address, port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
    answer = await reader.readline()
    writer.close()
    return int(answer.split()[1])
