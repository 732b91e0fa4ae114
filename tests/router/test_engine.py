"""The engine's loop over shards without a model: pipelining, failures, adapters that load at the same time."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import pytest
from fastapi import FastAPI

from loraplex_protos import generation_pb2 as pb
from loraplex_protos import shard_pb2
from loraplex_protos.errors import (
    AdapterInvalidError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from loraplex_router.access.keys import Keys, TenantSettings
from loraplex_router.adapters.registry import Registry
from loraplex_router.adapters.registry_file import RegistryFile
from loraplex_router.adapters.resolutions import Resolutions
from loraplex_router.api.http.app import create_app
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.engine import QUIET_SECONDS
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Limits
from loraplex_router.journal.journal import Journal
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.declarations import Declarations
from loraplex_router.replicas.prefetching import Prefetching
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.replicas.uploads import Uploads
from loraplex_router.service.service import Service
from loraplex_router.telemetry.request_log import RequestLog
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.text.detokenizer import Detokenizer
from loraplex_router.text.model import Model
from loraplex_router.text.renderer import Renderer
from loraplex_router.vocabulary.adapter import BASE_NAME
from loraplex_router.vocabulary.chat import ChatTemplates
from loraplex_router.vocabulary.grammar import Grammar, GrammarKind
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sequence import Detail, FinishReason, Plan
from tests.router.fake_shards import VOCABULARY, FakeShards
from tests.router.test_text import TOKENIZER

MODEL = Model(
    pb.GetModelInfoResponse(
        model_id="base", vocab_size=VOCABULARY, max_model_len=200, version="1", adapter_sources=["local", "hub"]
    ),
    TOKENIZER,
    tokenizer_digest="",
    end_token_ids=(999,),
    chat_templates=ChatTemplates(),
    renderer=Renderer(ChatTemplates()),
)


class Setup:
    """A service over fake shards, with its engine running."""

    def __init__(
        self,
        slots: int = 2,
        max_queue: int = 100,
        model: Model = MODEL,
        move_seconds: float = 0.5,
        tenants: Mapping[str, TenantSettings] | None = None,
        registry_file: Path | None = None,
        journal: Journal | None = None,
        device_bytes: int = 0,
    ) -> None:
        self.telemetry = Telemetry(adapters=10, log=RequestLog(prompts=False))
        self.resolutions = Resolutions()
        self.replicas = Replicas(self.telemetry, move_seconds)
        self.registry = Registry(self.replicas.changes.notify)
        self.prefetching = Prefetching(self.registry, self.replicas, most_bytes=1000)
        self.administration = Administration(self.resolutions, self.replicas, self.registry, self.prefetching)
        retire = self.administration.retire
        file = RegistryFile(registry_file, self.registry, retire, 100_000) if registry_file else None
        self.registry_file = file
        declarations = Declarations(self.administration, file)
        self.uploads = Uploads(self.administration, declarations, self.replicas, most_bytes=1000)
        self.service = Service(
            self.replicas,
            self.administration,
            self.uploads,
            declarations,
            Keys(tenants or {}),
            max_queue,
            self.telemetry,
            journal=journal,
        )
        self.service.serve(model)
        self.replica = self.add_replica("0", slots, device_bytes)
        self.shards, self.pool, self.blocks, self.engine = (
            self.replica.shards,
            self.replica.pool,
            self.replica.blocks,
            self.replica.engine,
        )

    @cached_property
    def app(self) -> FastAPI:
        """The HTTP application."""
        return create_app(self.service)

    def add_replica(self, name: str, slots: int = 2, device_bytes: int = 0) -> Replica:
        limits = Limits(max_batch_tokens=32, max_sequences=8, block_size=4)
        pool = AdapterPool(slots, host_bytes=1 << 30, device_bytes=device_bytes)
        replica = Replica(
            name, FakeShards(), limits, 64, pool, self.resolutions, self.telemetry.replica(name), self.replicas.changes
        )
        self.replicas.add(replica)
        return replica

    async def answer(self, first: int, tokens: int = 5, adapter: str | None = None, **options: object) -> list[int]:
        reference = AdapterReference(adapter) if adapter else None
        request = Request(prompt=(first,), adapter=reference, max_new_tokens=tokens, **options)
        generation = await self.service.generate(request)
        try:
            return [sample.token async for _, delta in generation.deltas() for sample in delta.samples]
        finally:
            self.service.requests.close(generation)


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup()
    task = asyncio.create_task(made.engine.run())
    yield made
    task.cancel()
    with suppress(asyncio.CancelledError, UnavailableError):
        await task
    assert made.blocks.used == 0


async def test_plan_n_plus_one_leaves_before_the_result_of_plan_n_is_read(setup: Setup):
    assert await setup.answer(10, tokens=20) == list(range(11, 31))
    log = [entry for entry in setup.shards.log if entry.startswith(("plan", "result"))]
    for step in range(18):
        assert log.index(f"plan {step + 1}") < log.index(f"result {step}")


async def test_only_those_who_ask_get_logprobs_although_a_step_has_everyones(setup: Setup):
    async def logprobs(detail: Detail) -> set[float | None]:
        generation = await setup.service.generate(Request(prompt=(1,), max_new_tokens=20, detail=detail))
        return {sample.logprob async for _, delta in generation.deltas() for sample in delta.samples}

    assert await asyncio.gather(logprobs(Detail(logprobs=True)), logprobs(Detail())) == [{-1.0}, {None}]


async def test_a_request_that_arrives_while_a_plan_runs_is_in_the_next_one(setup: Setup):
    setup.shards.step_seconds = 0.2
    running = asyncio.create_task(setup.answer(10, tokens=6))
    while "result 1" not in setup.shards.log:
        await asyncio.sleep(0.01)
    assert "plan 3" not in setup.shards.log  # plan 2 runs
    newcomer = asyncio.create_task(setup.answer(500, tokens=1))
    while "plan 3" not in setup.shards.log:
        await asyncio.sleep(0.01)
    assert "result 2" not in setup.shards.log
    assert [500, 501] in setup.shards.known.values()
    assert await newcomer == [501] and await running == list(range(11, 17))


async def test_requests_of_several_adapters_are_answered_together(setup: Setup):
    answers = await asyncio.gather(setup.answer(0), setup.answer(0, adapter="a"), setup.answer(0, adapter="b"))
    assert answers[0] == [1, 2, 3, 4, 5]
    assert sorted(answer[0] for answer in answers[1:]) == [2, 3]  # slots 1 and 2


async def test_an_end_token_ends_a_sequence_and_the_token_computed_beyond_it_is_dropped(setup: Setup):
    assert await setup.answer(996, tokens=50) == [997, 998, 999]


async def test_a_sequence_that_fails_does_not_affect_others(setup: Setup):
    setup.shards.failing_token = 105
    good, bad = await asyncio.gather(setup.answer(1, tokens=20), setup.answer(100, tokens=20), return_exceptions=True)
    assert good == list(range(2, 22))
    assert isinstance(bad, GenerationError)


async def test_a_grammar_that_becomes_too_complex_is_the_requests_fault_and_named_as_its_field(setup: Setup):
    setup.shards.failing_token, setup.shards.failure = 105, shard_pb2.FAILURE_REASON_GRAMMAR
    grammar = Grammar(GrammarKind.REGEX, "a*", field="guided_regex")
    with pytest.raises(InvalidRequestError, match="guided_regex: became too complex"):
        await setup.answer(100, tokens=20, grammar=grammar)


class PanicError(BaseException):
    """An error like a panic in Rust, which is not an Exception."""


async def test_a_sequence_whose_tokens_cannot_be_read_does_not_affect_others(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
):
    push = Detokenizer.push

    def panic(self: Detokenizer, token: int) -> str:
        if token == 105:
            raise PanicError
        return push(self, token)

    monkeypatch.setattr(Detokenizer, "push", panic)
    good, bad = await asyncio.gather(setup.answer(1, tokens=20), setup.answer(100, tokens=20), return_exceptions=True)
    assert good == list(range(2, 22))
    assert isinstance(bad, GenerationError)


async def test_an_adapter_that_cannot_be_loaded_only_fails_its_own_requests_and_frees_its_slot(setup: Setup):
    setup.shards.load_error = AdapterInvalidError("does not fit")
    base, bad = await asyncio.gather(setup.answer(1), setup.answer(1, adapter="a"), return_exceptions=True)
    assert base == [2, 3, 4, 5, 6] and isinstance(bad, AdapterInvalidError)
    setup.shards.load_error = None
    assert len(await setup.answer(1, adapter="a")) == 5


async def test_requests_continue_while_an_adapter_loads(setup: Setup):
    setup.shards.loads_held.clear()
    waiting = asyncio.create_task(setup.answer(1, adapter="a"))
    for _ in range(3):
        assert len(await setup.answer(1)) == 5
    assert not waiting.done()
    setup.shards.loads_held.set()
    assert len(await waiting) == 5


async def test_an_adapter_is_unloaded_before_its_slot_is_given_to_another():
    setup = Setup(slots=1)
    task = asyncio.create_task(setup.engine.run())
    for name in ("a", "b", "a"):
        await setup.answer(1, adapter=name)
    task.cancel()
    moves = [entry for entry in setup.shards.log if "load" in entry]
    assert moves == [
        "load digest of a into 1",
        "unload 1",
        "load digest of b into 1",
        "unload 1",
        "load digest of a into 1",
    ]


async def test_several_adapters_are_unloaded_before_a_larger_one_is_loaded():
    setup = Setup(slots=4, device_bytes=30)
    setup.shards.device_bytes = {"large": 25}
    task = asyncio.create_task(setup.engine.run())
    for name in ("a", "b", "large"):
        assert len(await setup.answer(1, adapter=name)) == 5
    task.cancel()
    moves = [entry for entry in setup.shards.log if "load" in entry]
    assert moves == [
        "load digest of a into 1",
        "load digest of b into 2",
        "unload 1",
        "unload 2",
        "load digest of large into 2",
    ]


async def test_an_adapter_without_memory_on_the_device_waits_until_another_has_left_it(setup: Setup):
    holding = asyncio.create_task(setup.answer(1, tokens=30, adapter="a"))
    while "load digest of a into 1" not in setup.shards.log:
        await asyncio.sleep(0)
    setup.shards.step_seconds = 0.01
    setup.shards.room = 1  # another process takes the rest
    assert len(await setup.answer(1, adapter="b")) == 5
    assert holding.done() and len(await holding) == 30
    assert setup.shards.log.count("unload 1") == 1


async def test_an_adapter_without_memory_on_an_empty_device_is_refused_as_overload(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("loraplex_router.engine.transfers.SHORTAGE_SECONDS", 0.05)
    setup.shards.room = 0
    base, bad = await asyncio.gather(setup.answer(1), setup.answer(1, adapter="a"), return_exceptions=True)
    assert base == [2, 3, 4, 5, 6] and isinstance(bad, OverloadedError)
    setup.shards.room = 1
    assert len(await setup.answer(1, adapter="a")) == 5


async def test_an_adapter_that_leaves_host_memory_gives_its_slot_to_one_that_waits():
    setup = Setup(slots=1)
    task = asyncio.create_task(setup.engine.run())
    await setup.answer(1, adapter="a")
    setup.shards.unloads_held.clear()
    leaving = asyncio.create_task(setup.replica.adapters.unload(setup.pool.get("digest of a")))
    waiting = asyncio.create_task(setup.answer(1, adapter="b"))
    await asyncio.sleep(0.05)
    setup.shards.unloads_held.set()
    assert len(await waiting) == 5
    await leaving
    task.cancel()


async def test_an_adapter_that_is_about_to_leave_gives_its_slot_to_those_whose_turn_comes_before():
    setup = Setup(slots=1)
    task = asyncio.create_task(setup.engine.run())
    await setup.answer(1, adapter="a")
    background = asyncio.create_task(setup.answer(1, adapter="a", background=True))
    adapter = setup.pool.get("digest of a")
    while not adapter.waiting:
        await asyncio.sleep(0)
    leaving = asyncio.create_task(setup.replica.adapters.unload(adapter))
    async with asyncio.timeout(60):
        assert len(await setup.answer(1, adapter="b")) == len(await background) == 5
        await leaving
    assert setup.pool.get("digest of a") is None
    task.cancel()


async def test_an_adapter_that_many_requests_wait_for_is_staged_once(setup: Setup):
    await asyncio.gather(*(setup.answer(1, adapter="a") for _ in range(8)))
    assert setup.shards.log.count("stage a") == 1


async def test_a_slow_reader_gets_missed_tokens_as_one_delta(setup: Setup):
    generation = await setup.service.generate(Request(prompt=(40,), max_new_tokens=30))
    while generation.outputs[0].finish_reason is None:
        await asyncio.sleep(0)
    deltas: list[Delta] = [delta async for _, delta in generation.deltas()]
    setup.service.requests.close(generation)
    assert len(deltas) == 1 and len(deltas[0].samples) == 30
    assert deltas[0].finish_reason is FinishReason.LENGTH


async def test_an_abandoned_generation_counts_as_cancelled(setup: Setup):
    generation: Generation = await setup.service.generate(Request(prompt=(1,), max_new_tokens=150))
    setup.service.requests.close(generation)
    labels = {"outcome": "cancelled", "adapter": BASE_NAME}
    assert setup.telemetry.registry.get_sample_value("loraplex_requests_total", labels) == 1
    assert setup.service.requests.idle


async def test_a_full_queue_has_room_for_a_tenant_that_waits_for_less_than_its_share():
    tenants = {name: TenantSettings(keys=[sha256(name.encode()).hexdigest()]) for name in ("loud", "quiet")}
    setup = Setup(max_queue=4, tenants=tenants)  # its engine does not run
    running = [await setup.service.generate(Request(prompt=(1,)), "loud") for _ in range(4)]
    with pytest.raises(OverloadedError, match=r"full .4 sequences are waiting"):
        await setup.service.generate(Request(prompt=(1,)), "loud")
    running += [await setup.service.generate(Request(prompt=(1,)), "quiet") for _ in range(2)]
    for name in tenants:
        with pytest.raises(OverloadedError, match=r"full .6 sequences are waiting"):
            await setup.service.generate(Request(prompt=(1,)), name)
    for generation in running:
        setup.service.requests.close(generation)
    assert setup.service.requests.idle


async def test_a_background_plan_is_alone_in_flight_and_begins_when_nothing_else_does(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("loraplex_router.engine.engine.QUIET_SECONDS", 0.05)
    send, sent = setup.shards.send, list[tuple[bool, int]]()

    async def watched(request: shard_pb2.StepRequest) -> None:
        in_flight = setup.engine.loss(busy=False).plans
        sent.append((in_flight[-1].background, len(in_flight)))
        await send(request)

    monkeypatch.setattr(setup.shards, "send", watched)
    background = asyncio.create_task(setup.answer(10, tokens=30, background=True))
    others = [await setup.answer(first, tokens=10) for first in (50, 70)]
    assert others == [list(range(51, 61)), list(range(71, 81))]
    assert await background == list(range(11, 41))
    assert {count for is_background, count in sent if is_background} == {1}
    assert {count for is_background, count in sent if not is_background} == {1, 2}
    assert [is_background for is_background, _ in sent[-20:]] == [True] * 20


async def test_a_background_plan_begins_although_its_time_comes_while_another_plan_is_sought(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
):
    schedule = setup.engine._scheduler.schedule

    def schedule_slowly(background: bool) -> Plan | None:
        plan = schedule(background)
        if plan is None:
            time.sleep(QUIET_SECONDS)
        return plan

    await setup.answer(50)
    monkeypatch.setattr(setup.engine._scheduler, "schedule", schedule_slowly)
    async with asyncio.timeout(10):
        assert await setup.answer(10, background=True) == list(range(11, 16))


async def test_background_requests_leave_half_of_the_queue_to_others():
    setup = Setup(max_queue=4)  # its engine does not run
    running = [await setup.service.generate(Request(prompt=(1,), background=True)) for _ in range(2)]
    with pytest.raises(OverloadedError, match="half of the queue"):
        await setup.service.generate(Request(prompt=(1,), background=True))
    running += [await setup.service.generate(Request(prompt=(1,))) for _ in range(2)]
    assert [generation.outputs[0].sequence.background for generation in running] == [True, True, False, False]
    for generation in running:
        setup.service.requests.close(generation)
    assert setup.service.requests.idle
