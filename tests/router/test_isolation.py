"""What one tenant learns of another: nothing, whatever it calls. Each route and each method is called twice, with the
name or id of something of the other tenant's and with one of nothing: the answers are the same."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import AdapterError, AdapterNotFoundError, ForbiddenError
from loraplex_protos.generation_pb2_grpc import GenerationServiceStub
from loraplex_router.access.keys import TenantSettings
from loraplex_router.adapters.registry_content import read_registry
from loraplex_router.api.grpc import GenerationApi, GrpcServer
from loraplex_router.batches.folder import BatchFolder
from loraplex_router.engine.generation import Generation
from loraplex_router.journal.journal import Journal
from loraplex_router.journal.stores import MemoryStore
from loraplex_router.service.response_store import ResponseStore
from loraplex_router.text.renderer import Renderer
from loraplex_router.vocabulary.adapter import LocalAdapter
from loraplex_router.vocabulary.chat import ChatTemplates
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.request import Request
from tests.router.test_engine import MODEL, Setup
from tests.router.test_http_streams import Client
from tests.router.test_keys import hashed
from tests.router.test_resume import SAID, ask, events

ALLOWED = {
    "ann": {"adapters": ["ann/*", "plan", "both/*"]},
    "bob": {"adapters": ["bob/*", "public", "both/*"]},
    "eve": {"admin": True},
}
TENANTS = {name: TenantSettings(keys=[hashed(name)], **may) for name, may in ALLOWED.items()}
REGISTRY = """
adapters:
  plan: {1: {id: ann/plan, source: local}, 2: {id: ann/plan2, source: local}}
  public: {1: {id: a, source: local}}
"""
SECRETS = re.compile(r"ann/|plan|ann's|the prompt of ann", re.IGNORECASE)  # in nothing that bob gets
PAIRS = [("ann/secret", "ann/nothing"), ("plan", "plen"), ("plan@1", "plen@1"), ("plan@7", "plen@7")]

GENERATES = {"max_tokens": 3, "temperature": 0}
NAMED: dict[str, Any] = {  # the body of each route that names an adapter, for a name
    "POST /generate": lambda name: {"inputs": "A", "parameters": {"adapter_id": name, "adapter_source": "local"}},
    "POST /generate_stream": lambda name: {"inputs": "A", "parameters": {"adapter_id": name}},
    "POST /invocations": lambda name: {"inputs": "A", "parameters": {"adapter_id": name}},
    "POST /": lambda name: {"inputs": "A", "parameters": {"adapter_id": name}},
    "POST /embed": lambda name: {"inputs": "A", "parameters": {"adapter_id": name}},
    "POST /classify": lambda name: {"inputs": "A", "parameters": {"adapter_id": name}},
    "POST /classify_batch": lambda name: {"inputs": ["A"], "parameters": {"adapter_id": name}},
    "POST /v1/completions": lambda name: {"model": name, "prompt": "A", **GENERATES},
    "POST /v1/chat/completions": lambda name: {"model": "base", "adapters": [None, name], "messages": SAID},
    "POST /v1/responses": lambda name: {"model": name, "input": "A"},
    "POST /v1/messages": lambda name: {"model": name, "messages": SAID, "max_tokens": 3},
    "POST /v1/messages/count_tokens": lambda name: {"model": name, "messages": SAID},
    "POST /v1/embeddings": lambda name: {"model": name, "input": "A"},
    **{f"POST {prefix}/score": lambda name: {"model": name, "text_1": "A", "text_2": "B"} for prefix in ("", "/v1")},
    **{
        f"POST {prefix}/rerank": lambda name: {"model": name, "query": "A", "documents": ["B"]}
        for prefix in ("", "/v1", "/v2")
    },
    "POST /tokenize": lambda name: {"model": name, "prompt": "A"},
    "POST /detokenize": lambda name: {"model": name, "tokens": [1]},
    "GET /v1/models/{model}": lambda name: None,
    "GET /v1/models": lambda name: None,
    "GET /adapters": lambda name: None,
}
WITH_ID = {  # the kind of id that each route takes, and its body
    "GET /v1/responses/{id}": ("response", lambda id: None),
    "DELETE /v1/responses/{id}": ("response", lambda id: None),
    "GET /v1/responses/{id}/input_items": ("response", lambda id: None),
    "POST /v1/responses": ("response", lambda id: {"model": "base", "input": "A", "previous_response_id": id}),
    "GET /v1/files/{file_id}": ("file", lambda id: None),
    "DELETE /v1/files/{file_id}": ("file", lambda id: None),
    "GET /v1/files/{file_id}/content": ("file", lambda id: None),
    "GET /v1/files": ("file", lambda id: None),
    "POST /v1/batches": (
        "file",
        lambda id: {"input_file_id": id, "endpoint": "/v1/completions", "completion_window": "24h"},
    ),
    "GET /v1/batches/{batch_id}": ("batch", lambda id: None),
    "GET /v1/batches": ("batch", lambda id: None),
    "POST /v1/batches/{batch_id}/cancel": ("batch", lambda id: {}),
}
FOR_ADMINISTRATORS = {
    *(f"POST /adapters/{what}" for what in ["load", "upload", "register", "alias", "remove", "unload", "pin", "unpin"]),
    *(f"POST {prefix}/{what}_lora_adapter" for prefix in ("", "/v1") for what in ("load", "unload")),
}
OF_NOBODY = {  # about the server, and what the caller has used
    *(f"GET /{path}" for path in ("", "info", "ping", "health", "startup", "version", "load", "usage", "metrics")),
    "GET /tokenizer_info",
    "POST /ping",
    "POST /v1/files",  # new
}


class World:
    """A server on which ann has everything that a tenant can have, and of which bob asks."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(MemoryStore(60), seconds=60)
        templates = ChatTemplates({"default": "{{ messages[0]['content'] }}"})
        self.renderer = Renderer(templates)
        registry = path / "registry.yaml"
        registry.write_text(REGISTRY)
        self.setup = Setup(
            model=replace(MODEL, chat_templates=templates, renderer=self.renderer),
            tenants=TENANTS,
            journal=self.journal,
            registry_file=registry,
        )
        self.setup.service.batches = BatchFolder(path / "batches", 1 << 20)
        self.setup.service.responses = ResponseStore(1 << 20)
        names = ["ann/secret", "ann/plan", "bob/own", "a"]
        self.setup.shards.local = [LocalAdapter(name) for name in sorted(names)]
        self.setup.shards.absent = {"bob/sekret", "both/absent"}
        self.ids: dict[str, tuple[str, str]] = {}  # of ann's, and of nothing

    async def fill(self) -> Generation:
        """What ann does. Returns a request that still runs."""
        service, said = self.setup.service, {"authorization": "Bearer ann"}
        answer = await ask(self.setup, "/v1/responses", {"model": "ann/secret", "input": "the prompt of ann"}, **said)
        assert answer.status == 200, answer.bodies
        response = json.loads(answer.bodies[0])["id"]
        folder = service.batches
        assert folder is not None
        with (Path(folder._path) / "ann's").open("w+b") as content:
            content.write(b"the prompt of ann")
            file = folder.add_file("ann", "ann's.jsonl", "batch", content)
        batch = folder.add_batch("ann", file.id, "/v1/completions", "24h", {"what": "ann's"})
        stream = {"inputs": "the prompt of ann", "parameters": {"max_new_tokens": 3}}
        (event, _), *_ = events(await ask(self.setup, "/generate_stream", stream, **said))
        self.ids = {
            "response": (response, f"resp_{'0' * 16}"),
            "file": (file.id, f"file-{'0' * 24}"),
            "batch": (batch.id, f"batch_{'0' * 24}"),
            "request": ("ann-1", "ann-2"),
            "event": (event, event[1:] if event[0] != "x" else f"y{event[1:]}"),
        }
        merged = MergedReference((AdapterReference("both/one"), AdapterReference("plan@1")))
        (of_both,) = await service.generate_each(Request(prompt=(1,), adapter=merged, max_new_tokens=1), "eve")
        await of_both.collect()
        service.requests.close(of_both)
        self.setup.shards.loads_held.clear()
        adapter = AdapterReference("ann/loading")
        return await service.generate(
            Request(prompt=(1,), adapter=adapter, max_new_tokens=100, request_id="ann-1"), "ann"
        )

    async def call(self, route: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], str]:
        """What bob gets."""
        method, _, path = route.partition(" ")
        client = Client(self.setup, path, body, authorization="Bearer bob", **headers)
        client._scope["method"] = method
        await client.run()
        found = "".join(client.bodies)
        assert not SECRETS.search(re.sub("|".join(map(re.escape, self.said)), "", found)), found
        return client.status, client.headers, found

    @property
    def said(self) -> list[str]:
        """What bob says himself."""
        return [each for pair in (*PAIRS, *self.ids.values()) for each in pair]

    async def compare(self, route: str, named: tuple[str, str], body: Any, **headers: str) -> int:
        """Calls a route with both names, and returns the status of both answers."""
        answers = []
        for name in named:
            path = re.sub(r"\{\w+\}", name, route)
            status, headed, text = await self.call(path, body(name), **headers)
            hidden = {key: value.replace(name, "NAME") for key, value in headed.items() if key != "x-request-id"}
            hidden.pop("content-length", None)
            answers.append((status, hidden, text.replace(name, "NAME")))
        assert answers[0] == answers[1], route
        return answers[0][0]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    tasks = [asyncio.create_task(each) for each in (made.setup.engine.run(), made.journal.run())]
    yield made
    for task in tasks:
        task.cancel()
    await made.renderer.aclose()


async def test_no_route_tells_what_others_have(world: World) -> None:
    running = await world.fill()
    for route, body in NAMED.items():
        for pair in PAIRS:
            status = await world.compare(route, pair, body)
            assert status == (200 if body("") is None and "{" not in route else 404 if body("") is None else 403), route
    for route, (kind, body) in WITH_ID.items():
        status = await world.compare(route, world.ids[kind], body)
        listing = body("") is None and "{" not in route
        assert status == (200 if listing else 400 if "previous" in str(body("")) else 404), route
        if listing:
            status = await world.compare(f"{route}?after={{id}}", world.ids[kind], body)
            assert status in (400, 422)
    for route in ("GET /adapters?after={id}", "GET /v1/models?after={id}"):
        for pair in PAIRS:
            assert await world.compare(route, pair, lambda name: None) in (400, 422)
    for route in FOR_ADMINISTRATORS:
        body = {"name": "plan", "id": "plan", "targets": {}, "lora_name": "plan", "lora_path": "plan"}
        status, _, text = await world.call(
            f"{route}?name=plan" if "upload" in route else route, body, content_length="9"
        )
        assert status == 403, (route, text)
    for route in OF_NOBODY - {"POST /v1/files"}:
        await world.call(route, {} if route.startswith("POST") else None)
    documented = {
        f"{method.upper()} {path}" for path, methods in world.setup.app.openapi()["paths"].items() for method in methods
    }
    assert documented == NAMED.keys() | WITH_ID.keys() | FOR_ADMINISTRATORS | OF_NOBODY
    assert running.unfinished
    world.setup.service.requests.close(running)


async def test_ids_of_requests_and_streams_are_each_tenants_own(world: World) -> None:
    running = await world.fill()
    body = {"model": "base", "prompt": "A", **GENERATES}
    for id in world.ids["request"]:
        status, headers, _ = await world.call("POST /v1/completions", body, x_request_id=id)
        assert (status, headers["x-request-id"]) == (200, id)
        status, _, text = await world.call("POST /v1/completions", body | {"request_id": id})
        assert status == 200 and id in text
    stream = {"inputs": "the prompt of ann", "parameters": {"max_new_tokens": 3}}
    answers = [await world.call("POST /generate_stream", stream, last_event_id=id) for id in world.ids["event"]]
    assert answers[0][0] == answers[1][0] == 404 and answers[0][2] == answers[1][2]
    assert running.unfinished and world.setup.service.is_running("ann-1", "ann")
    world.setup.service.cancel_request("ann-1", "eve")
    assert running.finished
    world.setup.service.requests.close(running)


async def test_suggestions_and_listings_have_no_adapter_that_was_merged_with_anothers(world: World) -> None:
    world.setup.service.requests.close(await world.fill())
    listed = {status.id for status in (await world.setup.service.adapters.list("bob")).adapters}
    assert listed == {"bob/own", "public", "public@1", "both/one"}
    assert "both/one,plan@1" in {status.id for status in (await world.setup.service.adapters.list("eve")).adapters}
    for asked, meant in ("bob/sekret", ""), ("both/absent", ""):
        reference = AdapterReference(asked)
        with pytest.raises(AdapterNotFoundError) as refusal:
            await world.setup.service.generate(Request(prompt=(1,), adapter=reference, max_new_tokens=1), "bob")
        assert not SECRETS.search(refusal.value.message) and meant in refusal.value.message
    page = await world.setup.service.adapters.list("bob", after="public@1")
    assert await world.setup.service.adapters.lists("public@1", "bob") and page.adapters == []


async def test_no_figure_of_an_answer_tells_what_others_have_sent(world: World) -> None:
    service, prompt = world.setup.service, list(range(1, 41))

    async def cached(key: str, **options: object) -> list[object]:
        """The cached tokens that each face reports, of a whole answer and of a stream."""
        body = {"model": "base", "prompt": prompt, **GENERATES, **options}
        stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
        whole, streamed = [
            await ask(world.setup, "/v1/completions", each, authorization=f"Bearer {key}") for each in (body, stream)
        ]
        *_, (_, last), _done = events(streamed)
        usages = [json.loads(text)["usage"] for text in (whole.bodies[0], last.removeprefix("data: "))]
        return [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]

    assert await cached("bob") == [0, 36]
    assert await cached("ann") == [0, 36]  # not what bob has sent
    service.keys.update(TENANTS | {"ann": TENANTS["ann"].model_copy(update={"keys": [hashed("new")]})})
    assert await cached("new") == [36, 36]  # another key of the same tenant
    renamed = {name: TENANTS[name] for name in ("bob", "eve")} | {"fay": TENANTS["ann"]}
    service.keys.update(renamed)
    assert await cached("ann") == [0, 36]  # the same key, of another tenant
    assert {tenant for tenant, *_ in (await service.usage("ann"))[1]} == {"fay"}


async def test_the_use_of_equal_content_under_a_name_of_anothers_is_not_shown(world: World) -> None:
    world.setup.shards.digests = {"ann/twin": "same", "bob/own": "same", "public": "same"}
    for key, name in ("bob", "bob/own"), ("ann", "ann/twin"):
        wanted = Request(prompt=(1,), adapter=AdapterReference(name), max_new_tokens=1)
        generation = await world.setup.service.generate(wanted, key)
        await generation.collect()
        world.setup.service.requests.close(generation)
    for key, shows in ("bob", False), ("eve", True):
        (status,) = (await world.setup.service.adapters.list(key, only="bob/own")).adapters
        assert status.HasField("last_used") == shows and status.requests == 0


async def test_an_adapter_that_is_made_private_ends_what_may_be_asked_of_it(world: World) -> None:
    service, wanted = world.setup.service, Request(prompt=(1,), adapter=AdapterReference("bob/own"), max_new_tokens=3)
    queued = await service.generate(wanted, "bob")
    service.keys.update(TENANTS | {"bob": TENANTS["bob"].model_copy(update={"adapters": []})})
    assert await queued.collect()  # it was allowed when it arrived
    service.requests.close(queued)
    with pytest.raises(ForbiddenError):
        await service.generate(wanted, "bob")
    assert (await service.adapters.list("bob")).adapters == []


@asynccontextmanager
async def stub_of(world: World) -> AsyncIterator[GenerationServiceStub]:
    server = GrpcServer(GenerationApi(world.setup.service), world.setup.service.keys, 1 << 20)
    port = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield GenerationServiceStub(channel)
    await server.stop(0)


async def test_what_was_resolved_with_a_token_is_known_only_to_who_resolved_it_and_to_administrators(
    world: World,
) -> None:
    service, shards = world.setup.service, world.setup.shards
    service.keys.update(TENANTS | {"fay": TenantSettings(keys=[hashed("fay")])})
    secret = AdapterReference("both/hub", "hub", token="of ann")
    shards.absent.add("both/hubs")

    async def use(adapter: AdapterReference | MergedReference, key: str) -> None:
        generation = await service.generate(Request(prompt=(1,), adapter=adapter, max_new_tokens=1), key)
        await generation.collect()
        service.requests.close(generation)

    async def knows(key: str) -> set[str]:
        """The ways in which a tenant learns that it exists."""
        found, bearer = set[str](), {"authorization": f"Bearer {key}"}
        async with stub_of(world) as stub:
            listed = await stub.ListAdapters(pb.ListAdaptersRequest(), metadata=tuple(bearer.items()))
        found |= {"gRPC" for status in listed.adapters if "both/hub" in status.id}
        for path in ("/adapters", "/v1/models"):
            found |= {path for body in (await ask(world.setup, path, None, **bearer)).bodies if "both/hub" in body}
        for path in ("/adapters?after=both/hub", "/v1/models?after=both/hub", "/v1/models/both/hub"):
            if (await ask(world.setup, path, None, **bearer)).status == 200:
                found.add(path)
        answer = await ask(world.setup, "/v1/completions", {"model": "both/hubs", "prompt": "A"}, **bearer)
        assert answer.status == 404
        return found | {"suggestion" for body in answer.bodies if "'both/hub'" in body}

    everything = {"gRPC", "/adapters", "/v1/models", "/v1/models/both/hub", "suggestion"}
    everything |= {"/adapters?after=both/hub", "/v1/models?after=both/hub"}
    shards.stages_held.clear()
    waiting = asyncio.create_task(use(secret, "ann"))
    while not world.setup.replica.adapters.fetching():
        await asyncio.sleep(0)
    assert await knows("fay") == await knows("bob") == set()
    shards.stages_held.set()
    await waiting
    assert await knows("fay") == await knows("bob") == set()
    assert await knows("eve") == everything
    assert "both/hub" not in (await world.call("GET /metrics"))[2]
    await use(secret, "fay")  # with the same token
    assert await knows("fay") == everything and await knows("bob") == set()
    await use(MergedReference((secret, AdapterReference("both/one"))), "fay")
    assert await knows("bob") == set()
    (status,) = (await service.adapters.list("eve", only="both/hub,both/one")).adapters
    assert status.source == "merged"
    await use(replace(secret, token=""), "fay")  # it is public
    assert await knows("bob") == everything


async def test_what_is_wrong_with_a_registered_adapter_does_not_name_its_origin_to_who_may_not_use_that(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service, shards, digest = world.setup.service, world.setup.shards, f"{1:064}"
    origins = {1: "id: ann/gone", 2: f"id: ann/changed, digest: '{digest}'", 3: "id: ann/secret, digest: plan"}
    origins |= {4: "id: ann/refused, source: hub", 5: "id: ann/broken, source: local"}
    versions = ", ".join(f"{number}: {{{origin}}}" for number, origin in origins.items())
    (tmp_path / "faulty.yaml").write_text(f"adapters: {{public: {{{versions}}}}}")
    world.setup.registry.update(read_registry(tmp_path / "faulty.yaml"))
    shards.absent |= {"ann/gone", "ann/refused"}
    shards.refused = {"ann/refused": "ann/refused is not on the hub"}
    shards.local = [LocalAdapter("ann/broken", "ann/broken is cut short")]
    await world.setup.prefetching._look()
    refusals = {
        1: "adapter public@1 of the registry cannot be found in its source: ",
        2: "adapter public@2 of the registry cannot be fetched from its source, or is not what the registry says: ",
        3: "'public@3' of the registry cannot be served: ",
    }
    for number, refusal in refusals.items():
        wanted = Request(prompt=(1,), adapter=AdapterReference(f"public@{number}"), max_new_tokens=1)
        merged = MergedReference((AdapterReference("bob/own"), AdapterReference(f"public@{number}")))
        for each in wanted, replace(wanted, adapter=merged):
            with pytest.raises(AdapterError) as told:
                await service.generate(each, "bob")
            assert told.value.message == refusal + "tell the administrator, who sees why"
        with pytest.raises(AdapterError) as whole:
            await service.generate(wanted, "eve")
        assert SECRETS.search(whole.value.message) and (number == 3 or whole.value.message in caplog.text)
    for key, hides in ("bob", True), ("eve", False):
        reasons = [status.reason for status in (await service.adapters.list(key)).adapters if "public@" in status.id]
        assert [bool(reason) for reason in reasons] == [False, False, True, True, True]
        assert all((reason == "tell the administrator, who sees why") == hides for reason in reasons if reason)


async def test_no_method_tells_what_others_have(world: World) -> None:
    running = await world.fill()
    prompt, chat = {"token_ids": pb.TokenIds(ids=[1])}, {"text": "the prompt of ann"}
    calls: dict[str, Any] = {
        "Generate": lambda name: pb.GenerateRequest(adapter=pb.AdapterReference(id=name), **prompt),
        "GenerateStream": lambda name: pb.GenerateRequest(adapters=[pb.AdapterReference(id=name)], **prompt),
        "Embed": lambda name: pb.EmbedRequest(inputs=[pb.EmbedInput(**prompt)], adapter=pb.AdapterReference(id=name)),
        "Classify": lambda name: pb.ClassifyRequest(
            inputs=[pb.EmbedInput(**prompt)], adapter=pb.AdapterReference(id=name)
        ),
        "ListAdapters": lambda name: pb.ListAdaptersRequest(),
    }
    of_ids: dict[str, tuple[str, Any]] = {
        "CancelGeneration": ("request", lambda id: pb.CancelGenerationRequest(request_id=id)),
        "GenerateStream": ("event", lambda id: pb.GenerateRequest(resume_token=id, **chat)),
    }
    for_administrators = {
        *("LoadAdapter", "UploadAdapter", "RegisterAdapter", "SetAlias", "RemoveAdapter"),
        *("UnloadAdapter", "PinAdapter", "UnpinAdapter"),
    }
    of_nobody = {"GetModelInfo", "Tokenize"}
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["GenerationService"].methods}
    assert methods == calls.keys() | of_ids.keys() | for_administrators | of_nobody
    key = (("authorization", "Bearer bob"),)

    async def ask_for(stub: GenerationServiceStub, method: str, name: str, message: Any) -> tuple[object, str]:
        try:
            call = getattr(stub, method)(message, metadata=key)
            found = [each async for each in call] if method == "GenerateStream" else await call
            return "answered", str(found)
        except grpc.aio.AioRpcError as error:
            return error.code(), f"{error.details()}".replace(name, "NAME")

    async with stub_of(world) as stub:
        pairs = [(method, pair, make) for method, make in calls.items() for pair in PAIRS]
        pairs += [(method, world.ids[kind], make) for method, (kind, make) in of_ids.items()]
        for method, (others, nothing), make in pairs:
            first, second = [await ask_for(stub, method, name, make(name)) for name in (others, nothing)]
            assert first == second and not SECRETS.search(first[1]), method
        for method in for_administrators:
            request = getattr(pb, f"{method}Request")()
            message = iter([request]) if method == "UploadAdapter" else request
            code, _ = await ask_for(stub, method, "plan", message)
            assert code is grpc.StatusCode.PERMISSION_DENIED, method
    assert running.unfinished
    world.setup.service.requests.close(running)
