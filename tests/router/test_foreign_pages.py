"""Which web pages may call a server, by what browsers say of them."""

import json
from hashlib import sha256
from typing import Any

import pytest

from loraplex_router.access.keys import TenantSettings
from loraplex_router.api.http.app import create_app
from tests.router.test_engine import Setup

TENANTS = {"acme": TenantSettings(keys=[sha256(b"secret").hexdigest()])}


async def ask(headers: dict[str, str], *origins: str, host: str = "127.0.0.1", keys: bool = False) -> tuple[int, str]:
    """The status and the body of an answer to a request with these headers."""
    sent = {"Host": "localhost:3000"} | headers
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/ping",
        "raw_path": b"/ping",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
    }
    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    await create_app(Setup(tenants=TENANTS if keys else None).service, origins, host=host)(scope, receive, send)
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages).decode()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "127.0.0.1:3000"},
        {"Host": "[::1]:3000"},
        {"Host": "192.168.0.7"},
        {"Host": "LOCALHOST"},
        {"Host": "host.docker.internal:3000"},
        {"Host": "desk.local"},
        {"Host": "desk:3000"},
        {"Host": ""},
        {"Origin": "http://localhost:3000"},
        {"Host": "app.example", "Origin": "https://app.example"},
        {"Origin": "https://app.example"},
    ],
)
async def test_programs_and_the_pages_of_this_machine_and_of_named_origins_may_call(headers: dict[str, str]) -> None:
    assert (await ask(headers, "https://app.example"))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:5173"},
        {"Origin": "null"},
        {"Host": "evil.example:3000"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": "[evil.example]"},
    ],
)
async def test_a_foreign_page_may_not(headers: dict[str, str]) -> None:
    status, body = await ask(headers)
    assert status == 403
    assert json.loads(body)["error_type"] == "forbidden"
    assert "--cors-origins" in json.loads(body)["error"]


async def test_a_host_that_is_not_one_is_no_fault_of_the_server() -> None:
    assert (await ask({"Host": "[::1"}))[0] == 200  # as other names without a dot, which no page can have


async def test_an_origin_may_be_set_as_its_address_is_copied_from_a_browser() -> None:
    page = {"Origin": "https://app.example"}
    assert (await ask(page, "https://App.example/"))[0] == 200
    assert (await ask(page, "https://app.example/"))[0] == 200


async def test_a_proxy_with_a_name_of_its_own_is_told_what_to_set() -> None:
    status, body = await ask({"Host": "llm.example"})
    assert status == 403 and "if a proxy sends them" in json.loads(body)["error"]
    assert (await ask({"Host": "llm.example"}, "https://llm.example"))[0] == 200


async def test_a_server_that_others_reach_is_called_by_any_name_but_not_by_foreign_pages() -> None:
    assert (await ask({"Host": "llm.example"}, host="0.0.0.0"))[0] == 200
    assert (await ask({"Host": "llm.example", "Origin": "https://evil.example"}, host="0.0.0.0"))[0] == 403


async def test_a_page_needs_a_key_where_everybody_does_and_else_nothing_if_all_origins_are_allowed() -> None:
    foreign = {"Origin": "https://evil.example", "Host": "evil.example"}
    assert (await ask(foreign, keys=True))[0] == 200
    assert (await ask(foreign, "*"))[0] == 200
