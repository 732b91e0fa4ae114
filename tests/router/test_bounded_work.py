"""One request's work on the event loop, and in one step, is bounded. Work is counted here, not timed."""

import asyncio
import gc
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from types import FrameType, SimpleNamespace

import fastapi.routing
import grpc
import pytest
from google.protobuf.descriptor import Descriptor

from loraplex_protos import generation_pb2, shard_pb2
from loraplex_protos.adapter_names import why_not
from loraplex_router.access.keys import Keys
from loraplex_router.api import message_limits
from loraplex_router.api.http import json_body
from loraplex_router.api.http.face import build_routes
from loraplex_router.api.http.openai.logprobs import TokenNames, chat_logprobs
from loraplex_router.api.http.openai.responses import routes
from loraplex_router.api.message_limits import MessageLimits
from loraplex_router.engine import fairness
from loraplex_router.engine.delta import Delta
from loraplex_router.journal.records import Record
from loraplex_router.service.response_store import ResponseStore
from loraplex_router.text.json_limits import LONG
from loraplex_router.text.model import read_model
from loraplex_router.usage.event import Used
from loraplex_router.usage.ledger import MemoryLedger, today
from loraplex_router.vocabulary.request import EmbedRequest
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import WORD_SIZE, Sample
from tests.router.test_engine import Setup
from tests.router.test_http_streams import Client
from tests.router.test_scheduler import World
from tests.router.tiny_tokenizers import byte_tokenizer


async def test_no_request_waits_for_routes_to_be_built(monkeypatch: pytest.MonkeyPatch):
    built, build = [], fastapi.routing.get_dependant
    monkeypatch.setattr(fastapi.routing, "get_dependant", lambda **of: built.append(of["path"]) or build(**of))
    setup = Setup()
    build_routes(setup.app)
    assert "/v1/chat/completions" in built
    built.clear()
    client = Client(setup, "/nowhere")
    await client.run()
    assert client.status == 404 and not built


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1, 2], "max_tokens": 2, "temperature": 0, "repeat_penalty": 1.0}),
        ("/v1/completions", {"prompt": [1, "a"], "max_tokens": -2}),
        ("/v1/completions", [1, 2]),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"text": "a"}]}], "n": "a"}),
        ("/v1/messages", {"model": "base", "max_tokens": 1, "messages": [], "system": None, "a": 1}),
        ("/v1/responses", {"input": [{"type": "a"}]}),
        ("/generate", {"inputs": "A", "parameters": {"max_new_tokens": 1, "a": 1}}),
        ("/tokenize", {"inputs": "A"}),
        ("/tokenize", {"prompt": "A", "add_special_tokens": False}),
        ("/tokenize", {"prompt": 1}),
        ("/classify", {"inputs": "A", "parameters": 1}),
        ("/classify", {"input": "A", "truncate_prompt_tokens": "a"}),
        ("/rerank", {"query": "A", "documents": [1]}),
        ("/adapters/load", {"id": 1}),
    ],
)
async def test_long_bodies_are_read_on_a_thread_and_answered_as_short_ones(
    path: str, body: object, monkeypatch: pytest.MonkeyPatch
):
    setup, threads, parse = Setup(), list[threading.Thread](), json_body.parse
    monkeypatch.setattr(json_body, "parse", lambda sent: threads.append(threading.current_thread()) or parse(sent))
    engine = asyncio.create_task(setup.engine.run())
    answers = []
    for blanks in (0, LONG):
        client = Client(setup, path, body)
        client._body = b" " * blanks + client._body
        await client.run()
        said = re.sub(r"cmpl-\w+|\"created\":\d+", "", "".join(client.bodies))
        answers.append((client.status, said, client.headers.get("x-warnings")))
    assert answers[0] == answers[1]
    assert threads[0] is threading.main_thread() and threads[1] is not threads[0]
    engine.cancel()
    with suppress(asyncio.CancelledError):
        await engine


MANY = 4000
TEXT = {"type": "text", "text": "A"}


def test_a_stream_of_a_long_prompt_is_written_down_without_a_call_for_each_token():
    record, calls = Record("", "", "", (), "", "", "", tuple(range(MANY)), 0, ""), 0

    def count(frame: FrameType, event: str, of: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        line = record.encode()
    finally:
        sys.setprofile(None)
    assert Record.decode(line) == record and calls < 100 < MANY


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [TEXT] * MANY}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}] * MANY}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "A"}] * MANY}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "A"}], "guided_choice": ["A"] * 9 * MANY}),
        ("/v1/completions", {"prompt": "A", "max_tokens": 1, **{f"a{at}": 1 for at in range(MANY)}}),
        ("/v1/completions", {"prompt": ["A"] * 9 * MANY}),
        ("/v1/completions", {"prompt": "A", "stop": ["A"] * 9 * MANY}),
        ("/v1/completions", {"prompt": "A", "stop_token_ids": [1] * 9 * MANY}),
        ("/v1/completions", {"prompt": "A", "bad_words": ["A"] * 9 * MANY}),
        ("/v1/messages", {"model": "base", "max_tokens": 1, "messages": [{"role": "user", "content": [TEXT] * MANY}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "A"}] * MANY}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}] * MANY}]}),
        ("/rerank", {"query": "A", "documents": ["A"] * MANY}),
    ],
    ids=range(13),
)
async def test_a_large_request_makes_few_calls_on_the_event_loop(path: str, body: dict[str, object]):
    setup, calls = Setup(), 0

    def count(frame: FrameType, event: str, of: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    engine = asyncio.create_task(setup.engine.run())
    await Client(setup, path, {}).run()  # what is made once is there
    client = Client(setup, path, body)
    sys.setprofile(count)
    try:
        await client.run()
    finally:
        sys.setprofile(None)
    assert client.status in (200, 400) and calls < 12 * MANY
    engine.cancel()
    with suppress(asyncio.CancelledError):
        await engine


async def test_a_long_conversation_that_was_kept_is_continued_on_a_thread(monkeypatch: pytest.MonkeyPatch):
    setup, threads, read = Setup(), list[threading.Thread](), routes.read_as_chat
    monkeypatch.setattr(routes, "read_as_chat", lambda *of: threads.append(threading.current_thread()) or read(*of))
    setup.service.responses, tenant = ResponseStore(10**7), setup.service.keys.tenant(None).name
    parts = [{"type": "input_text", "text": "A"}]
    for number, count in enumerate((1, MANY)):
        earlier = {
            "response": {"output": [], "previous_response_id": None},
            "input": [{"content": parts * count, "role": "user"}],
        }
        setup.service.responses.put(tenant, f"resp_{number}", json.dumps(earlier).encode())
        client = Client(setup, "/v1/responses", {"input": "A", "previous_response_id": f"resp_{number}"})
        await client.run()
        assert client.status == 400 and "chat template" in client.bodies[0]
    assert threads[0] is threading.main_thread() and threads[1] is not threads[0]


async def test_many_inputs_end_a_few_at_a_time_however_often_their_caller_is_cancelled(monkeypatch: pytest.MonkeyPatch):
    setup, turns, others = Setup(max_queue=1000), list[int](), 0
    requests = setup.service.requests
    close = requests.close
    monkeypatch.setattr(requests, "close", lambda generation: turns.append(others) or close(generation))
    embedding = asyncio.create_task(setup.service.pooling.embed(EmbedRequest(("A",) * 200)))
    async with asyncio.timeout(60):
        while requests.num_running < 200:
            await asyncio.sleep(0)
        for _ in range(3):
            embedding.cancel()
            await asyncio.sleep(0)
        while not requests.idle:
            others += 1
            await asyncio.sleep(0)
    assert len(turns) == 200 and max(Counter(turns).values()) < 100
    with pytest.raises(asyncio.CancelledError):
        await embedding


async def test_usage_of_many_adapters_is_added_up_and_written_on_threads():
    setup, calls = Setup(), 0

    def count(frame: FrameType, event: str, of: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    await Client(setup, "/usage").run()  # what is made once is there
    ledger = setup.telemetry.usage.ledger
    assert isinstance(ledger, MemoryLedger)
    for day in range(3):
        totals = {("", f"a{at}"): Used(1, 2, 0, 3) for at in range(MANY)}
        ledger._days[today() - timedelta(day)] = totals
    client = Client(setup, "/usage")
    sys.setprofile(count)
    try:
        await client.run()
    finally:
        sys.setprofile(None)
    assert calls < MANY
    found = json.loads(client.bodies[0])["usage"]
    assert len(found) == MANY and found[0] == {
        **{"tenant": None, "adapter": "a0", "requests": 3, "prompt_tokens": 6},
        **{"cached_tokens": 0, "generated_tokens": 9},
    }


async def test_a_large_grpc_message_is_read_on_a_thread(monkeypatch: pytest.MonkeyPatch):
    threads, parse = list[threading.Thread](), message_limits.parse_message

    def parse_message(data: bytes, kind: Descriptor) -> object:
        threads.append(threading.current_thread())
        return parse(data, kind)

    async def answer(request: object, context: object) -> object:
        return request

    async def find(details: object) -> object:
        return grpc.unary_unary_rpc_method_handler(answer)

    monkeypatch.setattr(message_limits, "parse_message", parse_message)
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    limits = MessageLimits([service], lambda context: nullcontext(), Keys({}), 10**6)
    handler = await limits.intercept_service(find, SimpleNamespace(method=f"/{service.full_name}/Generate"))
    context = SimpleNamespace(invocation_metadata=tuple)
    for length in (1, LONG):
        request = generation_pb2.GenerateRequest(text="A" * length)

        async def messages(data: bytes = request.SerializeToString()) -> AsyncIterator[bytes]:
            yield data

        assert await handler.stream_unary(messages(), context) == request
    assert threads[0] is threading.main_thread() and threads[1] is not threads[0]


def test_a_long_adapter_name_is_refused_before_its_characters_are_looked_at():
    assert why_not("*" * 1000).startswith("it has 1000 bytes: ")
    assert why_not("*" * 100).startswith("it has '*': ")
    assert why_not("a" * 300).startswith("a part has more than 255 bytes: ")


async def test_bad_words_are_tokenized_together_on_a_thread():
    tokenizer, calls = byte_tokenizer(), list[tuple[int, threading.Thread]]()
    inner = tokenizer._tokenizer

    def encode_batch(texts: list[str], **options: bool) -> object:
        calls.append((len(texts), threading.current_thread()))
        return inner.encode_batch(texts, **options)

    tokenizer._tokenizer = SimpleNamespace(encode_batch=encode_batch)
    found = await tokenizer.spellings(["ab"] * 1000)
    assert found == [inner.encode("ab").ids] * 1000  # one of bytes has a space's byte more, so it is no spelling
    ((texts, thread),) = calls
    assert texts == 2000 and thread is not threading.main_thread()


@pytest.mark.parametrize(
    "large",
    [
        {"allowed_token_ids": frozenset(range(90))},
        {"bad_words": ((1,),) * (90 // WORD_SIZE)},
        {"sampling": Sampling(logit_bias=dict.fromkeys(range(90), 1.0))},
        {"tokens": [1] * 90, "prompt_length": 90},
    ],
    ids=lambda large: next(iter(large)),
)
def test_what_starts_in_one_step_is_bounded(large: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplex_router.engine.scheduler.MAX_STARTED", 150)
    world = World(budget=1000)
    for _ in range(5):
        sequence = world.submit("", [1], 1)
        for name, value in large.items():
            setattr(sequence, name, value)
    plans = [world.scheduler.schedule() for _ in range(3)]
    assert [len(plan.starts) for plan in plans if plan] == [2, 2, 1]


def test_a_prompt_is_compared_with_each_tenant_once(monkeypatch: pytest.MonkeyPatch):
    compared = []
    much_more = fairness._much_more
    monkeypatch.setattr(fairness, "_much_more", lambda *shares: compared.append(shares) or much_more(*shares))
    world = World(blocks=500, budget=500, rows=200)
    for number in range(200):
        world.submit("", [1], 1, tenant="ab"[number % 2])
    plan = world.scheduler.schedule()
    assert plan and len(plan.starts) == 200
    assert len(compared) <= 2 * 201


def test_logprobs_leave_nothing_for_the_garbage_collector_to_walk_through():
    alternatives = tuple((token, -1.0) for token in range(20))
    delta = Delta(samples=[Sample(1, -1.0, alternatives)] * 500, ends=list(range(500)))
    names = TokenNames(byte_tokenizer(), as_ids=False)
    before = len(gc.get_objects())
    written = chat_logprobs(delta, names)
    assert len(written["content"]) == 500
    assert len(gc.get_objects()) - before < 100


def test_replicas_of_a_model_share_its_tokenizer():
    files = shard_pb2.GetTokenizerResponse(tokenizer_json=byte_tokenizer("<x>")._tokenizer.to_str().encode())
    info = shard_pb2.GetInfoResponse(sampling_defaults=generation_pb2.Sampling())
    assert read_model(info, files, 1).tokenizer is read_model(info, files, 1).tokenizer
