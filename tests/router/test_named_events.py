"""What named events, Anthropic's and those of OpenAI's responses, say of errors and of thoughts."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from loraplex_router.text.renderer import Renderer
from loraplex_router.vocabulary.chat import ChatTemplates
from tests.router.test_engine import MODEL, Setup
from tests.router.test_http_streams import Client

SAID = [{"role": "user", "content": "A"}]
MESSAGE = {"model": "base", "messages": SAID, "max_tokens": 40, "temperature": 0}
RESPONSE = {"model": "base", "input": "A", "max_output_tokens": 40, "temperature": 0}


@asynccontextmanager
async def serving(template: str) -> AsyncIterator[Setup]:
    templates = ChatTemplates({"default": template})
    renderer = Renderer(templates)
    made = Setup(model=replace(MODEL, chat_templates=templates, renderer=renderer))
    task = asyncio.create_task(made.engine.run())
    yield made
    task.cancel()
    await renderer.aclose()


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    async with serving("{{ messages[0]['content'] }}") as made:
        yield made


@pytest.fixture
async def thinking() -> AsyncIterator[Setup]:
    """The model thinks, and never comes to an end."""
    async with serving("{{ messages[0]['content'] }}<think>") as made:
        yield made


async def ask(setup: Setup, path: str, body: object) -> Client:
    client = Client(setup, path, body)
    await client.run()
    return client


def named(client: Client) -> list[tuple[str, dict[str, object]]]:
    """The events' names and data."""
    lines = [event.split("\n") for event in "".join(client.bodies).split("\n\n") if event]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


async def test_a_message_that_fails_ends_with_an_error(setup: Setup):
    setup.shards.failing_token = 45
    events = named(await ask(setup, "/v1/messages", {**MESSAGE, "stream": True}))
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    assert [name for name, _ in events[:3]] == ["message_start", "ping", "content_block_start"]
    name, data = events[-1]
    assert name == "error" and data["error"]["type"] == "api_error" and "NaN" in data["error"]["message"]


async def test_a_response_that_fails_says_so_in_its_last_event(setup: Setup):
    setup.shards.failing_token = 45
    events = named(await ask(setup, "/v1/responses", {**RESPONSE, "stream": True}))
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    name, data = events[-1]
    assert name == "response.failed" and data["response"]["status"] == "failed"
    assert data["response"]["error"]["code"] == "server_error" and "NaN" in data["response"]["error"]["message"]


async def test_an_unknown_field_of_a_message_is_refused_in_anthropics_form(setup: Setup):
    client = await ask(setup, "/v1/messages", {**MESSAGE, "sparkle": 1})
    error = {"type": "invalid_request_error", "message": "`sparkle` Extra inputs are not permitted"}
    assert client.status == 400 and json.loads(client.bodies[0]) == {"type": "error", "error": error}


async def test_dimensions_are_refused_for_a_model_of_one_length(setup: Setup):
    client = await ask(setup, "/v1/embeddings", {"input": "A", "dimensions": 8})
    assert client.status == 400 and json.loads(client.bodies[0])["error"]["param"] == "dimensions"


async def test_thoughts_are_a_block_of_a_message(thinking: Setup):
    whole = json.loads((await ask(thinking, "/v1/messages", MESSAGE)).bodies[0])
    (block,) = whole["content"]
    assert block["type"] == "thinking" and block["thinking"] and block["signature"] == ""
    events = [data for _, data in named(await ask(thinking, "/v1/messages", {**MESSAGE, "stream": True}))]
    deltas = [data["delta"] for data in events if data["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"thinking_delta"}
    assert "".join(delta["thinking"] for delta in deltas) == block["thinking"]
    hiding = {**MESSAGE, "thinking": {"type": "adaptive", "display": "omitted"}}
    (hidden,) = json.loads((await ask(thinking, "/v1/messages", hiding)).bodies[0])["content"]
    assert hidden == {**block, "thinking": ""}
    events = named(await ask(thinking, "/v1/messages", {**hiding, "stream": True}))
    assert "content_block_start" in dict(events) and "content_block_delta" not in dict(events)


async def test_thoughts_are_an_item_of_a_response(thinking: Setup):
    whole = json.loads((await ask(thinking, "/v1/responses", RESPONSE)).bodies[0])
    (item,) = whole["output"]
    assert (item["type"], item["status"], item["content"][0]["type"]) == ("reasoning", "incomplete", "reasoning_text")
    events = [data for _, data in named(await ask(thinking, "/v1/responses", {**RESPONSE, "stream": True}))]
    deltas = [data["delta"] for data in events if data["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == item["content"][0]["text"] and len(deltas) > 1
