"""Each path belongs to one face, which also answers errors that occur before a route is found."""

import json

import pytest

from loraplex_router.api.http import admin, lorax, openai
from loraplex_router.api.http.app import FACES
from loraplex_router.api.http.face import Face, face_of
from tests.router.test_engine import Setup
from tests.router.test_http_streams import Client

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


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/embed", {"inputs": "A", "parameters": {"adapter_id": "../x"}}, "adapter_id"),
        ("/v1/embeddings", {"input": "A", "model": "../x"}, "model"),
        ("/adapters/load", {"id": "../x"}, "id"),
        ("/adapters/load", {}, "id"),
        ("/adapters/load", [], "body"),
    ],
)
async def test_errors_name_fields_as_this_face_does(path: str, body: object, field: str):
    client = Client(Setup(), path, body)
    await client.run()
    assert client.status == (400 if path.startswith("/v1") else 422) and f"`{field}` " in client.bodies[0]
