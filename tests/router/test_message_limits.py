"""gRPC messages in memory: nobody can fill it with theirs, neither with large ones nor with ones that do not end."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.generation_pb2_grpc import GenerationServiceServicer
from loraplex_router.access.keys import Keys, TenantSettings
from loraplex_router.api import grpc as grpc_face
from loraplex_router.api import message_limits
from loraplex_router.api.grpc import SERVICE, GrpcServer
from loraplex_router.api.message_limits import MOST_MESSAGES
from tests.router.test_keys import hashed

LIMIT = 1000  # bytes of a message
KEYS = Keys({name: TenantSettings(keys=[hashed(name)]) for name in ("one", "two")})


class Held(GenerationServiceServicer):
    """Answers no request until `release` is set."""

    def __init__(self) -> None:
        self.arrived = 0
        self.release = asyncio.Event()

    async def Generate(self, request: pb.GenerateRequest, context: object) -> pb.GenerateResponse:
        self.arrived += 1
        await self.release.wait()
        return pb.GenerateResponse()


Call = grpc.aio.StreamUnaryCall


class World:
    """A server, and calls of the method Generate, whose messages tests send themselves, or not."""

    def __init__(self, api: Held, channel: grpc.aio.Channel) -> None:
        self.api = api
        self.channel = channel
        self._call = channel.stream_unary(f"/{SERVICE}/Generate")

    def begin(self, key: str) -> Call:
        return self._call(metadata=(("authorization", f"Bearer {key}"),))

    async def ask(self, key: str) -> Call:
        """Sends a request, and waits until it is answered or held."""
        call, arrived = self.begin(key), self.api.arrived
        await call.write(pb.GenerateRequest(text="x" * (LIMIT - 10)).SerializeToString())
        await call.done_writing()
        while self.api.arrived == arrived and not call.done():
            await asyncio.sleep(0.01)
        return call


@asynccontextmanager
async def serve(keys: Keys) -> AsyncIterator[World]:
    api = Held()
    server = GrpcServer(api, keys, LIMIT)
    port = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield World(api, channel)
    await server.stop(0)


async def test_nothing_is_read_of_callers_without_a_key():
    async with serve(KEYS) as world:
        call = world.begin("nobody")  # has sent nothing
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await call.details() == "unknown API key"


async def test_the_messages_of_a_tenant_leave_room_for_those_of_others():
    async with serve(KEYS) as world:
        held = [await world.ask("one") for _ in range(MOST_MESSAGES // 2)]
        refused = await world.ask("one")
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "requests are large" in await refused.details()
        held.append(await world.ask("two"))
        world.api.release.set()
        assert {await each.code() for each in held} == {grpc.StatusCode.OK}
        assert await (await world.ask("one")).code() is grpc.StatusCode.OK


@pytest.mark.parametrize("keys", [KEYS, Keys({})], ids=["with keys", "without keys"])
async def test_messages_that_are_long_in_coming_do_not_shut_out_others(keys: Keys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(message_limits, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(message_limits, "MESSAGE_SECONDS", 1.0)
    most = MOST_MESSAGES // 2 if keys.required else MOST_MESSAGES
    async with serve(keys) as world:
        world.api.release.set()
        slow = [world.begin("one") for _ in range(most + 2)]
        assert await (await world.ask("one")).code() is grpc.StatusCode.OK
        codes = [await each.code() for each in slow]
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 2
        assert codes.count(grpc.StatusCode.DEADLINE_EXCEEDED) == most


async def test_a_call_without_a_message_is_refused():
    async with serve(Keys({})) as world:
        call = world.begin("")
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "request: is missing"


def is_of_a_closed_loop(record: logging.LogRecord) -> bool:
    """Whether gRPC, which has one queue for all event loops of a process, had an event for that of an earlier test."""
    return bool(record.exc_info) and str(record.exc_info[1]) == "Event loop is closed"


async def test_a_call_that_is_cancelled_before_its_message_is_forgotten(caplog: pytest.LogCaptureFixture):
    async with serve(Keys({})) as world:
        for _ in range(20):
            call = world.begin("")
            await asyncio.sleep(0.01)
            call.cancel()
        world.api.release.set()
        assert await (await world.ask("")).code() is grpc.StatusCode.OK
    assert not [record for record in caplog.records if not is_of_a_closed_loop(record)]


async def test_health_checks_and_reflection_are_read_likewise_and_have_a_room_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(message_limits, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(message_limits, "MESSAGE_SECONDS", 1.0)
    async with serve(Keys({})) as world:
        held = [await world.ask("") for _ in range(MOST_MESSAGES)]
        assert await (await world.ask("")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for method in ("grpc.health.v1.Health/Check", "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            slow = [world.channel.stream_unary(f"/{method}")() for _ in range(MOST_MESSAGES + 2)]
            health = HealthStub(world.channel)
            assert (await health.Check(HealthCheckRequest())).status == HealthCheckResponse.NOT_SERVING
            assert (await health.Watch(HealthCheckRequest()).read()).status == HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                await health.Check(HealthCheckRequest(service="another"))
            asked = ServerReflectionStub(world.channel).ServerReflectionInfo()
            await asked.write(ServerReflectionRequest(list_services=""))
            assert SERVICE in str(await asked.read())
            await asked.done_writing()
            assert await asked.code() is grpc.StatusCode.OK
            codes = [await each.code() for each in slow]
            assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 2
            assert codes.count(grpc.StatusCode.DEADLINE_EXCEEDED) == MOST_MESSAGES
        world.api.release.set()
        assert {await each.code() for each in held} == {grpc.StatusCode.OK}


async def test_health_is_watched_by_as_many_as_may_at_a_time_and_checked_by_anyone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grpc_face, "MAX_WATCHES", 3)
    async with serve(Keys({})) as world:
        health = HealthStub(world.channel)
        watches = [health.Watch(HealthCheckRequest()) for _ in range(3)]
        assert {(await each.read()).status for each in watches} == {HealthCheckResponse.NOT_SERVING}
        refused = health.Watch(HealthCheckRequest())
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "at most 3" in await refused.details()
        assert (await health.Check(HealthCheckRequest())).status == HealthCheckResponse.NOT_SERVING
        watches.pop().cancel()
        answered = None
        async with asyncio.timeout(10):
            while not answered:
                with suppress(grpc.aio.AioRpcError):  # not yet
                    answered = await health.Watch(HealthCheckRequest()).read()
