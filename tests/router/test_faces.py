"""Each path belongs to one face, which also answers errors that occur before a route is found."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from loraplex_router.access.keys import TenantSettings
from loraplex_router.api.http import admin, lorax, openai
from loraplex_router.api.http.app import FACES
from loraplex_router.api.http.face import Face, face_of
from loraplex_router.api.http.other_servers import HINTS
from loraplex_router.vocabulary.adapter import LocalAdapter
from tests.router.test_engine import Setup
from tests.router.test_http_streams import Client
from tests.router.test_keys import hashed

DEEPER = Face(prefix="/v1/deeper", routers=(), write_error=lambda error: {})


@pytest.mark.parametrize(
    ("path", "face"),
    {
        "/generate": lorax.FACE,
        "/": lorax.FACE,
        "*": lorax.FACE,
        "/v1": openai.FACE,
        "/v1/models": openai.FACE,
        "/v1beta/models": lorax.FACE,
        "/adapters": admin.FACE,
        "/adapters/load": admin.FACE,
        "/v1/deeper": DEEPER,
        "/v1/deeper/batches": DEEPER,
        "/v1/deeper_of": openai.FACE,
    }.items(),
)
def test_a_path_belongs_to_the_face_with_the_longest_prefix(path: str, face: Face):
    assert face_of(path, (*FACES, DEEPER)) is face


@pytest.mark.parametrize("path", ["/nowhere", "/v1/nowhere", "/adapters/nowhere", "/health", "/v1/models", "/adapters"])
async def test_requests_without_a_route_are_answered_in_the_form_of_the_path(path: str):
    client = Client(Setup(), path, {})
    await client.run()
    status, said = (404, "Not Found") if "nowhere" in path else (405, "Method Not Allowed")
    openai = {"error": {"message": said, "type": "invalid_request_error", "param": None, "code": None}}
    plain = {"error": said, "error_type": "http"}
    body, found = (openai if "/v1" in path else plain), json.loads(client.bodies[0])
    assert client.status == status and found.keys() == body.keys()
    assert client.headers.get("allow") == (None if status == 404 else "GET")
    if status == 405:
        assert found == body
    else:  # it lists what there is
        routes = f"{path!r} is not one of /, /adapters, "
        assert all(part in client.bodies[0] for part in (said, routes, ", /generate, ", ", /v1/chat/completions, "))


@pytest.mark.parametrize("path", ["/lora-adapters", "/api/chat", "/v1/tokenize", "/load_lora_adapter_from_tensors"])
async def test_paths_of_other_servers_say_what_to_call_here(path: str):
    client = Client(Setup(), path, {})
    await client.run()
    assert client.status == 404 and HINTS[path] in client.bodies[0]


def test_what_they_say_to_call_exists():
    routes = ((face.prefix, route) for face in FACES for router in face.routers for route in router.routes)
    there = {prefix + route.path for prefix, route in routes if isinstance(route, APIRoute)}
    named = {path for hint in HINTS.values() for path in re.findall(r"(?:GET|POST) (/[a-z0-9/]+)", hint)}
    assert named <= there and not HINTS.keys() & there


@pytest.mark.parametrize(
    ("name", "here"),
    [("text", "completions"), ("prompt", "completions"), ("messages", "chat/completions")],
)
async def test_another_servers_body_at_generate_says_where_it_belongs(name: str, here: str):
    client = Client(Setup(), "/generate", {name: "Hi", "sampling_params": {}})
    await client.run()
    said = f"`body` has `{name}`: here the prompt is `inputs`; OpenAI's form is for /v1/{here}"
    assert client.status == 422 and json.loads(client.bodies[0])["error"] == f"Input validation error: {said}"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/embed", {"inputs": "A", "parameters": {"adapter_id": "../x"}}, "adapter_id"),
        ("/v1/embeddings", {"input": "A", "model": "../x"}, "model"),
        ("/v1/completions", {"model": "base", "prompt": "A", "lora_path": "../x"}, "lora_path"),
        ("/v1/completions", {"model": "base", "prompt": "A", "adapters": [None, "../x"]}, "adapters[1]"),
        ("/generate", {"inputs": "A", "parameters": {"merged_adapters": {"ids": ["a", "../x"]}}}, "ids[1]"),
        ("/adapters/load", {"id": "../x"}, "id"),
        ("/adapters/load", {}, "id"),
        ("/adapters/load", [], "body"),
        ("/load_lora_adapter", {"lora_path": "a"}, "lora_name"),
    ],
)
async def test_errors_name_fields_as_this_face_does(path: str, body: object, field: str):
    client = Client(Setup(), path, body)
    await client.run()
    assert client.status == (400 if path.startswith(("/v1", "/load")) else 422) and f"`{field}` " in client.bodies[0]


@pytest.mark.parametrize("name", ["absent", "forbidden", "plan@7"])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (lambda name: {"model": name}, "model"),
        (lambda name: {"model": "base", "lora_path": name}, "lora_path"),
        (lambda name: {"model": "base", "adapters": ["a", None, name]}, "adapters[2]"),
    ],
)
async def test_an_adapter_that_cannot_be_used_is_named_by_the_field_that_has_it(
    body: Callable[[str], dict[str, object]], param: str, name: str, tmp_path: Path
):
    registry = tmp_path / "registry.yaml"
    registry.write_text("adapters: {plan: {1: {id: a}}}")
    keys = {"ann": TenantSettings(keys=[hashed("ann")], adapters=["a", "absent", "plan"])}
    client = Client(
        Setup(tenants=keys, registry_file=registry),
        "/v1/completions",
        {"prompt": "A", **body(name)},
        authorization="Bearer ann",
    )
    await client.run()
    error = json.loads(client.bodies[0])["error"]
    assert error["param"] == param and name in error["message"]
    assert client.status == (403 if name == "forbidden" else 404)


async def test_the_pages_of_models_add_up_to_the_whole_list():
    setup = Setup()
    faults = {"broken": "cut short", "c": "cut short"}
    names = ("a", "b", "base", "broken", "c", "d", "tgi")
    setup.shards.local = [LocalAdapter(name, faults.get(name, "")) for name in names]

    async def ids(query: str) -> tuple[list[str], bool]:
        client = Client(setup, f"/v1/models{query}")
        await client.run()
        found = json.loads("".join(client.bodies))
        return [model["id"] for model in found["data"]], found["has_more"]

    whole, more = await ids("")
    assert whole == ["base", "a", "b", "base:base", "d", "base:tgi"] and not more
    for limit in (1, 2, 3, 5, 6, 7):
        paged, more = await ids(f"?limit={limit}")
        while more:
            page, more = await ids(f"?limit={limit}&after={paged[-1]}")
            assert 1 <= len(page) <= limit
            paged += page
        assert paged == whole
