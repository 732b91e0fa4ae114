"""Requests with a deadline: what cannot be met is refused at once, and what passes in the queue costs nothing."""

import asyncio
import time

import grpc
import pytest

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import DeadlineError, from_rpc_error
from loraplex_protos.generation_pb2_grpc import GenerationServiceStub
from loraplex_router.access.keys import TenantSettings
from loraplex_router.access.tenant import Remaining
from loraplex_router.api.grpc import GenerationApi, GrpcServer
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import Request
from tests.router.test_engine import Setup
from tests.router.test_keys import hashed

TENANTS = {name: TenantSettings(keys=[hashed(name)], tokens_per_minute=1000) for name in ("busy", "other")}


def within(seconds: float, adapter: str | None = None) -> Request:
    reference = AdapterReference(adapter) if adapter else None
    return Request(prompt=(1,), adapter=reference, max_new_tokens=3, deadline=time.monotonic() + seconds)


async def test_a_request_is_refused_if_those_before_it_have_waited_for_longer_than_it_can() -> None:
    setup = Setup(tenants=TENANTS)  # whose engine does not run
    waiting = await setup.service.generate(within(3600), "busy")
    waiting.queued -= 60
    with pytest.raises(DeadlineError, match=r"have waited for 60.0 s, but its deadline is in (30|29)\.\d s"):
        await setup.service.generate(within(30), "busy")
    generations = [
        await setup.service.generate(within(3600), "busy"),
        await setup.service.generate(within(30), "other"),
        await setup.service.generate(within(30, "a"), "busy"),
        await setup.service.generate(Request(prompt=(1,)), "busy"),
    ]
    for generation in (waiting, *generations):
        setup.service.requests.close(generation)
    assert setup.service.requests.idle


async def test_a_sequence_that_waits_to_continue_says_nothing_about_the_wait() -> None:
    setup = Setup()
    preempted = await setup.service.generate(within(3600))
    preempted.queued -= 60
    preempted.started = preempted.queued
    for generation in (preempted, await setup.service.generate(within(30))):
        setup.service.requests.close(generation)


async def test_a_deadline_that_passes_in_the_queue_costs_nothing() -> None:
    setup = Setup(tenants=TENANTS)
    server = GrpcServer(GenerationApi(setup.service), setup.service.keys, 1 << 20)
    port = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = GenerationServiceStub(channel)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 50))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Generate(request, timeout=0.5, metadata=(("authorization", "Bearer busy"),))
        assert isinstance(from_rpc_error(refusal.value), DeadlineError)
        async with asyncio.timeout(60):
            while not setup.service.requests.idle:
                await asyncio.sleep(0.01)
    assert setup.replica.scheduler.num_waiting == 0
    tenant = setup.service.keys.tenant("busy")
    assert tenant.remaining(time.monotonic()) == [Remaining("tokens", 1000, 1000, 0.0)]
    assert (await setup.service.usage("busy"))[1] == []
    await server.stop(0)


async def test_the_tokens_of_an_answer_count_while_it_is_written_and_once() -> None:
    setup = Setup(tenants=TENANTS)
    engine = asyncio.create_task(setup.engine.run())
    tenant, before = setup.service.keys.tenant("busy"), 0
    generation = await setup.service.generate(Request(prompt=(1,), max_new_tokens=100), "busy")
    async for _ in generation.deltas():
        setup.service.requests._running.spend()
        assert tenant.spent > before
        before = generation.num_generated
    setup.service.requests.close(generation)
    assert tenant.spent == 101
    engine.cancel()
