"""Streams that are resumed: a client that comes back with its last event's id gets exactly the rest."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.errors import UnavailableError
from loraplex_router.access.keys import TenantSettings
from loraplex_router.access.tenant import Visit
from loraplex_router.engine.generation import Generation
from loraplex_router.journal import stores
from loraplex_router.journal.journal import Journal
from loraplex_router.journal.records import Record, decode, encode_tokens
from loraplex_router.journal.redis_store import RedisStore
from loraplex_router.journal.stores import MemoryStore, Store
from loraplex_router.store import redis_server as redis_servers
from loraplex_router.store.redis_server import CONNECTIONS, PREFIX, RedisServer
from loraplex_router.text.renderer import Renderer
from loraplex_router.vocabulary.chat import ChatTemplates
from tests.redis_server import redis_server
from tests.router.test_engine import MODEL, Setup
from tests.router.test_http_streams import Client, until
from tests.router.test_uploads import upload
from tests.tools import needs_redis

SAID = [{"role": "user", "content": "A"}]
GREEDY = {"model": "base", "temperature": 0, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRAX": ("/generate_stream", {"inputs": "A", "parameters": {"max_new_tokens": 20, "details": True}}),
    "completions": ("/v1/completions", {**GREEDY, **USAGE, "prompt": ["A", "bc"], "max_tokens": 4, "n": 2}),
    "stop": ("/v1/completions", {**GREEDY, "prompt": "A", "max_tokens": 40, "stop": ["KLM", "Z]"], "echo": True}),
    "adapters": ("/v1/completions", {**GREEDY, "prompt": "A", "max_tokens": 5, "adapters": ["a", "b"]}),
    "chat": ("/v1/chat/completions", {**GREEDY, **USAGE, "messages": SAID, "max_tokens": 6, "n": 2}),
    "messages": ("/v1/messages", {**GREEDY, "messages": SAID, "max_tokens": 8}),
    "responses": ("/v1/responses", {**GREEDY, "input": "A", "max_output_tokens": 8}),
}


@asynccontextmanager
async def router(
    store: Store, tenants: Mapping[str, TenantSettings] | None = None, journal: type[Journal] = Journal
) -> AsyncIterator[Setup]:
    journal = journal(store, seconds=60)
    templates = ChatTemplates({"default": "{{ messages[0]['content'] }}"})
    renderer = Renderer(templates)
    made = Setup(model=replace(MODEL, chat_templates=templates, renderer=renderer), tenants=tenants, journal=journal)
    tasks = [asyncio.create_task(made.engine.run()), asyncio.create_task(journal.run())]
    yield made
    assert made.service.requests.idle and not made.service.requests.num_running
    await journal.flush()
    assert not journal._entries
    for task in tasks:
        task.cancel()
    await renderer.aclose()


async def ask(setup: Setup, path: str, body: object, last: str = "", **headers: str) -> Client:
    client = Client(setup, path, body, **({"last_event_id": last} if last else {}), **headers)
    await client.run()
    return client


def events(client: Client) -> list[tuple[str, str]]:
    """The events' ids, and the events."""
    found = []
    for event in "".join(client.bodies).split("\n\n")[:-1]:
        id, rest = re.fullmatch(r"(?:id: (.*)\n)?((?s:.*))", event).groups()
        found.append((id, re.sub(r'"(created|created_at|completed_at)":\d+', '"created":0', rest)))
    return found


def told(events: list[tuple[str, str]]) -> dict[object, list[Any]]:
    """What the events say together, by what each is of: texts in one piece, since tokens that are known already come at
    once."""
    found: dict[object, list[Any]] = {}

    def add(of: object, said: Any) -> None:
        former = found.setdefault(of, [])
        if isinstance(said, str) and former and isinstance(former[-1], str):
            former[-1] += said
        else:
            former.append(said)

    for _, event in events:
        *name, data = event.split("\n")
        body = json.loads(data.removeprefix("data: ")) if "[DONE]" not in data else {"done": True}
        body.pop("sequence_number", None)
        for choice in body.pop("choices", ()):
            text = choice.pop("text", None) or choice.get("delta", {}).pop("content", "")
            add(choice["index"], text)
            if any(value for name, value in choice.items() if name not in ("index", "adapter")):
                add(choice["index"], choice)
            body = {}
        if isinstance(text := body.get("delta"), str) or "text" in (text := body.get("delta", {})):
            add("text", text if isinstance(text, str) else text["text"])
        elif body:
            add("others", (name, body))
    return found


@pytest.mark.parametrize("stream", STREAMS)
async def test_another_router_sends_what_follows_each_event(stream: str):
    path, body = STREAMS[stream]
    store = MemoryStore(60)
    async with router(store) as first, router(store) as second:
        whole = events(await ask(first, path, body, x_request_id="mine"))
        assert len({id for id, _ in whole}) == len(whole) > 8
        for place, (id, _) in enumerate(whole, 1):
            rest = events(await ask(second, path, body, id))
            assert told(rest) == told(whole[place:]), (place, id)
            for further, (again, _) in enumerate(rest[:2], 1):  # which the client has when it is lost again
                assert told(events(await ask(first, path, body, again))) == told(rest[further:]), (place, again)


PATH, BODY = STREAMS["LoRAX"]
LONG = {"inputs": "A", "parameters": {"max_new_tokens": 100, "details": True}}


class SharedStore(MemoryStore):
    """One that other routers have, too. `failing`: it does not answer. `forgetful`: no tokens arrive in it."""

    shared = True
    failing = forgetful = False

    async def append(
        self, parts: Mapping[str, bytes], records: Mapping[str, bytes], begun: Mapping[str, str]
    ) -> Collection[str]:
        if self.failing:
            raise UnavailableError("no answer")
        return await super().append(dict.fromkeys(parts, b"") if self.forgetful else parts, records, begun)


async def test_what_the_store_does_not_have_yet_is_generated_again_and_compared():
    store = SharedStore(60)
    store.forgetful = True
    async with router(store) as first, router(store) as second:
        whole = events(await ask(first, PATH, BODY))
        for place, (id, _) in enumerate(whole, 1):
            assert told(events(await ask(second, PATH, BODY, id))) == told(whole[place:])
        id, _ = whole[9]
        tokens, check = id.rpartition("-")[::2]
        (error,) = (await ask(second, PATH, BODY, f"{tokens}-{int(check, 16) ^ 1:08x}")).events
        assert error["error_type"] == "generation" and "other tokens are generated here" in error["error"]


async def test_a_stream_is_resumed_by_its_own_tenant_with_its_own_request():
    keys = {name: TenantSettings(keys=[sha256(name.encode()).hexdigest()]) for name in ("ann", "bob")}
    async with router(SharedStore(60), keys) as only:

        async def refusal(body: object = BODY, last: str = "", key: str = "ann") -> tuple[int, str]:
            client = await ask(only, PATH, body, last, authorization=f"Bearer {key}")
            return client.status, client.bodies[0]

        (id, _), *rest = events(await ask(only, PATH, BODY, authorization="Bearer ann"))
        status, error = await refusal(last=id, key="bob")
        assert status == 404 and "is not known here" in error
        status, error = await refusal(last=id.replace(":", "x:"))
        assert status == 404 and "is not known here" in error
        status, error = await refusal(LONG, id)
        assert status == 422 and "`Last-Event-ID` is of a stream with another request" in error
        status, error = await refusal(last="7")
        assert status == 422 and "is not the id of one of this server's events" in error
        whole = await ask(only, "/generate", BODY, id, authorization="Bearer ann")
        assert whole.status == 422 and "is of a stream: send the request with `stream: true`" in whole.bodies[0]
        client = await ask(only, PATH, BODY, id, authorization="Bearer ann")
        assert told(events(client)) == told(rest)


async def test_a_router_that_keeps_no_streams_says_so_and_gives_no_ids():
    setup = Setup()
    engine = asyncio.create_task(setup.engine.run())
    client = await ask(setup, PATH, BODY, "x:0-00000000")
    assert client.status == 422 and "does not keep streams: see --store" in client.bodies[0]
    assert "id: " not in "".join((await ask(setup, PATH, BODY)).bodies)
    engine.cancel()


async def test_a_client_whose_connection_was_lost_ends_its_former_request():
    ann = TenantSettings(keys=[sha256(b"ann").hexdigest()], max_requests=1)
    key = {"authorization": "Bearer ann"}
    async with router(MemoryStore(60), {"ann": ann}) as only:
        former = Client(only, PATH, LONG, x_request_id="mine", **key)
        running = asyncio.create_task(former.run())
        await until(lambda: len(former.messages) > 3)
        former.reads.clear()  # the server does not know yet
        sent = events(former)
        resumed = asyncio.create_task(ask(only, PATH, LONG, sent[-1][0], **key))
        await until(lambda: all(generation.finished for generation in only.service.requests._running))
        former.reads.set()
        rest = events(await resumed)
        await running
        assert "the request was cancelled" in former.bodies[-1]
        texts = [json.loads(event.removeprefix("data: "))["token"]["id"] for _, event in sent + rest]
        assert texts == list(range(texts[0], texts[0] + 100))


async def test_a_later_request_with_the_same_id_does_not_end_when_a_stream_is_resumed():
    async with router(MemoryStore(60)) as only:
        (id, _), *rest = events(await ask(only, PATH, BODY, x_request_id="mine"))
        later = Client(only, PATH, LONG, x_request_id="mine")
        running = asyncio.create_task(later.run())
        await until(lambda: len(later.messages) > 3)
        assert told(events(await ask(only, PATH, BODY, id))) == told(rest)
        await running
        assert len(events(later)) == 100


async def test_only_tokens_that_are_in_the_store_cost_nothing_when_a_stream_is_resumed(
    monkeypatch: pytest.MonkeyPatch,
):
    spent = list[int]()
    monkeypatch.setattr(Visit, "spend", lambda visit, tokens, now: spent.append(tokens))
    async with router(MemoryStore(60)) as only:
        client = Client(only, PATH, LONG)
        running = asyncio.create_task(client.run())
        await until(lambda: len(client.messages) > 3)
        (generation,) = only.service.requests._running
        only.service.requests.cancel(generation)
        await running
        known = generation.num_generated
        assert sum(spent) == 1 + known  # with the prompt
        (id, _), *_ = events(client)
        forged = await ask(only, PATH, LONG, f"{id.partition(':')[0]}:99999-00000000")
        assert "other tokens are generated here" in forged.bodies[-1]
        assert sum(spent) >= 1 + 100


async def test_a_stream_goes_on_with_the_version_that_it_began_with_while_a_replica_has_it():
    body = {**LONG, "parameters": {**LONG["parameters"], "adapter_id": "policy"}}
    async with router(MemoryStore(60)) as only:
        version = await upload(only, b"one")
        former = Client(only, PATH, body)
        running = asyncio.create_task(former.run())
        await until(lambda: len(former.messages) > 3)
        former.reads.clear()  # the connection is lost, and the server does not know yet
        sent = events(former)
        await upload(only, b"two")
        resumed = asyncio.create_task(ask(only, PATH, body, sent[-1][0]))
        await until(lambda: all(generation.finished for generation in only.service.requests._running))
        former.reads.set()
        client = await resumed
        await running
        assert client.headers["x-adapter-version"] == f"policy@{version}"
        texts = [json.loads(event.removeprefix("data: "))["token"]["id"] for _, event in sent + events(client)]
        assert texts == list(range(texts[0], texts[0] + 200, 2))  # as an adapter in the first slot answers
        used = [(adapter, each.requests) for _, adapter, each in (await only.service.usage())[1]]
        assert used == [("policy", 1)]
        await until(lambda: len(only.pool) == 1)  # it has left
        late = await ask(only, PATH, body, sent[-1][0])
        assert late.status == 409 and "'policy' was replaced or removed since the stream began" in late.bodies[0]
        assert "send the request again without the stream's id" in late.bodies[0]


async def test_a_router_that_stops_hands_its_streams_over():
    store = SharedStore(60)
    async with router(store) as first, router(store) as second:
        client = Client(first, PATH, LONG)
        running = asyncio.create_task(client.run())
        await until(lambda: len(client.messages) > 3)
        first.service.requests.draining = True
        await first.service.requests.hand_over()
        await running
        *sent, (_, error) = events(client)
        assert "another router continues" in error and "unavailable" in error
        rest = events(await ask(second, PATH, LONG, sent[-1][0]))
        assert len(sent) + len(rest) == 100 and second.telemetry.metrics.resumed._value.get() == 1


async def test_streams_are_handed_over_while_others_end():
    class SlowJournal(Journal):
        async def keep_up(self, generation: Generation) -> bool:
            await asyncio.sleep(0.01)
            return await super().keep_up(generation)

    async with router(SharedStore(60), journal=SlowJournal) as first:
        first.shards.step_seconds = 0.05
        several = "/v1/completions", {**GREEDY, "prompt": "A", "max_tokens": 100, "adapters": ["a", "b"]}
        clients = [Client(first, *each) for each in (several, (PATH, LONG), several)]
        running = [asyncio.create_task(client.run()) for client in clients]
        await until(lambda: all(len(client.messages) > 3 for client in clients))
        first.service.requests.draining = True
        await first.service.requests.hand_over()  # which ends both generations of a request at once
        await asyncio.gather(*running)
        assert "another router continues" in events(clients[0])[-1][1]


async def test_a_store_that_fails_costs_streams_nothing_but_their_ids():
    store = SharedStore(60)
    async with router(store) as only:
        store.failing = True
        for _ in range(2):
            client = await ask(only, PATH, BODY)
            assert len(client.events) == 20 and "id: " not in "".join(client.bodies)
        store.failing = False
        await only.service.requests._journal.flush()
        assert all(id for id, _ in events(await ask(only, PATH, BODY)))


async def test_a_resumed_stream_can_be_resumed_again_although_the_store_failed_meanwhile():
    store = SharedStore(60)
    async with router(store) as first, router(store) as second, router(store) as third:
        whole = events(await ask(first, PATH, BODY))
        store.failing = True
        resumed = events(await ask(second, PATH, BODY, whole[4][0]))
        assert told(resumed) == told(whole[5:])
        for place, (id, _) in enumerate(resumed, 6):
            assert told(events(await ask(third, PATH, BODY, id))) == told(whole[place:])
        store.failing = False


async def test_a_stream_that_began_while_the_store_failed_can_be_resumed_once_it_is_back():
    store = SharedStore(60)
    async with router(store) as first, router(store) as second:
        store.failing = True
        client = Client(first, PATH, LONG)
        running = asyncio.create_task(client.run())
        await until(lambda: len(client.messages) > 3)
        assert "id: " not in "".join(client.bodies)
        client.reads.clear()
        store.failing = False
        await first.service.requests._journal.flush()
        client.reads.set()
        await running
        sent = events(client)
        ids = [id for id, _ in sent]
        begin = next(place for place, id in enumerate(ids) if id)
        assert begin > 0 and all(ids[begin:])
        for place in range(begin, len(sent), 20):
            assert told(events(await ask(second, PATH, LONG, ids[place]))) == told(sent[place + 1 :])


@needs_redis
async def test_a_stream_can_be_resumed_although_the_redis_server_was_emptied_amid_it(tmp_path: Path):
    with redis_server(tmp_path) as (url, _):
        server = RedisServer(url)
        store = RedisStore(server, 60)
        async with router(store) as first, router(store) as second:
            client = Client(first, PATH, LONG)
            running = asyncio.create_task(client.run())
            await until(lambda: len(client.messages) > 3)
            client.reads.clear()
            await server.run([("FLUSHALL",)])
            flushed = len(client.messages)
            client.reads.set()
            await running
            sent = events(client)
            assert len(sent) == 100 and all(id for id, _ in sent)
            for place in range(flushed, len(sent), 20):
                assert told(events(await ask(second, PATH, LONG, sent[place][0]))) == told(sent[place + 1 :])
            (keys,) = await server.run([("KEYS", f"{PREFIX}stream:*")])
            assert keys and all(time > 0 for time in await server.run([("PTTL", key) for key in keys]))
        await server.aclose()


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans())))
def test_what_a_store_that_hung_is_told_twice_or_late_is_read_once(writes: list[tuple[int, bool, bool]]):
    """A router writes again what was not answered, with what is new since; the store may get to the former later."""
    record, tokens = Record("", "", "", (), "", "", "", (), 0, ""), list[int]()
    parts, late, written = [record.encode()], b"", 0
    for new, answered, is_late in [*writes, (1, True, False)]:
        tokens += range(new)
        part = encode_tokens(0, written, tokens[written:])
        if is_late and not answered:
            late += part
        else:
            parts += [part, late] if answered else [part]
        if answered:
            late, written = b"", len(tokens)
    assert decode(b"".join(parts), 1) == (record, (tokens,))


async def test_the_memory_for_streams_is_limited_in_time_and_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "MAX_BYTES", 10)
    now = 0.0
    store = MemoryStore(60, lambda: now)
    records = {"a": b"1", "b": b"4"}
    await store.append({"a": b"23", "b": b"56"}, records, {"a": "ann", "b": "ann"})
    now = 50.0
    assert not await store.append({"a": b"4"}, {}, {})
    now = 70.0
    assert await store.read("a") == b"1234" and await store.read("b") is None
    assert not await store.append({"c": b"234567"}, {"c": b"1"}, {"c": "ann"})
    assert await store.read("a") is None and await store.read("c") == b"1234567"
    await store.append({"d": b"2345678901"}, {"d": b"1"}, {"d": "ann"})
    assert await store.read("c") is None and await store.read("d") is None


async def test_streams_of_a_tenant_leave_room_for_those_of_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "MAX_BYTES", 10)
    store = MemoryStore(60)
    await store.append({"a": b"23"}, {"a": b"1"}, {"a": "ann"})
    for key in "bcde":
        await store.append({key: b"567"}, {key: b"4"}, {key: "bob"})
        await store.append({"a": b""}, {}, {})
    assert await store.read("a") == b"123" and await store.read("e") == b"4567"
    assert await store.read("b") is None and await store.read("c") is None
    assert not await store.append({"b": b"8"}, {}, {"b": "bob"})  # whose beginning would push out others
    assert await store.read("b") is None


@needs_redis
async def test_a_call_to_the_redis_server_can_be_cancelled_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplex_router.store.redis_server.TIMEOUT", 60.0)
    with redis_server(tmp_path) as (url, _):
        for turns in range(6):
            server = RedisServer(url)
            await server.run([])
            calling = asyncio.create_task(server.run([]))
            for _ in range(turns):
                await asyncio.sleep(0)
            in_time = not calling.done()
            calling.cancel()
            await asyncio.wait([calling])
            assert calling.cancelled() == in_time
            await server.aclose()


@needs_redis
async def test_many_calls_share_a_few_connections_of_the_redis_server_also_after_it_has_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(redis_servers, "TIMEOUT", 60.0)
    with redis_server(tmp_path) as (url, process):
        server = RedisServer(url)

        async def count() -> list[int]:
            answers = await asyncio.gather(*(server.run([("INCR", "a")]) for _ in range(300)))
            return [answer for (answer,) in answers]

        assert sorted(await count()) == list(range(1, 301))
        process.send_signal(signal.SIGSTOP)
        with monkeypatch.context() as impatient, pytest.raises(UnavailableError, match="does not answer"):
            impatient.setattr(redis_servers, "TIMEOUT", 1.0)
            await count()
        process.send_signal(signal.SIGCONT)
        assert len(await count()) == 300
        (clients,) = await server.run([("CLIENT", "LIST")])
        assert len(clients.splitlines()) <= CONNECTIONS
        await server.aclose()


@needs_redis
async def test_a_redis_server_that_hangs_or_dies_is_noticed_and_found_again(tmp_path: Path):
    with redis_server(tmp_path) as (url, process):
        server = RedisServer(url)
        store, other = RedisStore(server, 60), RedisStore(server, 0.05)
        for _ in range(2):  # it begins once
            assert await store.append({"a": b"", "b": b"8"}, {"a": b"12"}, {}) == ["b"]
        assert not await store.append({"a": b"3"}, {}, {})
        assert await store.read("a") == b"123" and await store.read("b") is None
        process.send_signal(signal.SIGSTOP)
        for call in (lambda: store.append({"a": b"4"}, {}, {}), lambda: store.read("a")):
            with pytest.raises(UnavailableError, match="does not answer"):
                await call()
        process.send_signal(signal.SIGCONT)
        await store.append({"c": b""}, {"c": b"5"}, {})
        assert await store.read("c") == b"5" and (await store.read("a")).startswith(b"123")
        await other.append({"c": b""}, {}, {})
        await asyncio.sleep(0.1)
        assert await store.read("c") is None
    with pytest.raises(UnavailableError, match="the Redis server of --store fails"):
        await store.read("a")
    await server.aclose()
