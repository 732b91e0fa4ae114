"""The `anthropic` client from PyPI, unmodified, on /v1/messages."""

import json
from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.e2e.processes import Server

COLD = {"temperature": 0}  # this client has no such argument any more; older ones do
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"name": name, "description": "Reads.", "input_schema": SCHEMA} for name in ("read_time", "read_weather")]


@pytest.fixture
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as connected:
        yield connected


def test_a_streamed_message_is_the_same_as_a_whole_one(client: Anthropic, base: str):
    for name in (base, "first"):
        asked = {"model": name, "max_tokens": 12, "messages": HELLO, "system": "Be brief.", "extra_body": COLD}
        whole = client.messages.create(**asked)
        assert (whole.model, whole.role, whole.stop_reason) == (name, "assistant", "max_tokens")
        assert whole.usage.output_tokens == 12 and whole.id.removeprefix("msg_") == whole._request_id
        with client.messages.stream(**asked) as stream:
            events = [event.type for event in stream]
            streamed = stream.get_final_message()
        assert streamed.content[0].text == whole.content[0].text and streamed.stop_reason == whole.stop_reason
        first, second = (
            (answer.usage.input_tokens + answer.usage.cache_read_input_tokens, answer.usage.output_tokens)
            for answer in (whole, streamed)
        )
        assert first == second
        assert events[:2] == ["message_start", "content_block_start"] and "text" in events
        assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stop_sequence_ends_the_message_and_is_named(client: Anthropic, base: str):
    asked = {"model": base, "messages": HELLO, "extra_body": COLD}
    text = client.messages.create(**asked, max_tokens=40).content[0].text
    stop = text[5:8]
    message = client.messages.create(**asked, max_tokens=40, stop_sequences=[stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in message.content) == text.partition(stop)[0]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "read_weather"}])
def test_forced_tools_are_used_streamed_or_not(client: Anthropic, base: str, choice: dict[str, object]):
    asked = {
        "model": base,
        "messages": HELLO,
        "max_tokens": 200,
        "tools": TOOLS,
        "tool_choice": {**choice, "disable_parallel_tool_use": True},
        "extra_body": {"seed": 3},
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "array"}}},  # gives way
    }
    message = client.messages.create(**asked)
    (use,) = message.content
    assert message.stop_reason == "tool_use" and use.type == "tool_use" and use.id.startswith("toolu_")
    assert use.name == choice.get("name", use.name) and set(use.input) == {"a"}
    with client.messages.stream(**asked) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert json.loads("".join(pieces)) == use.input == streamed.content[0].input and len(pieces) > 1
    assert (streamed.content[0].name, streamed.stop_reason) == (use.name, "tool_use")
    cut_off = client.messages.create(**{**asked, "max_tokens": 12})
    assert cut_off.stop_reason == "max_tokens" and all(block.type == "tool_use" for block in cut_off.content)


def test_an_answer_follows_a_schema(client: Anthropic, base: str):
    wanted = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = client.messages.create(model=base, max_tokens=200, messages=HELLO, output_config=wanted)
    assert message.stop_reason == "end_turn" and set(json.loads(message.content[0].text)) == {"a"}


def test_a_conversation_with_uses_of_tools_is_understood_and_counted(client: Anthropic, base: str):
    use = {"type": "tool_use", "id": "toolu_1", "name": "read_time", "input": {"a": True}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "noon"}]}
    cached = {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, use]},
        {"role": "user", "content": [result, cached]},
    ]
    plain = client.messages.count_tokens(model=base, messages=messages).input_tokens
    offered = client.messages.count_tokens(model=base, messages=messages, tools=TOOLS).input_tokens
    assert offered > plain + 100
    usage = client.messages.create(model=base, messages=messages, tools=TOOLS, max_tokens=2).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == offered
    again = client.messages.create(model=base, messages=messages, tools=TOOLS, max_tokens=2).usage
    assert again.cache_read_input_tokens > 0 and again.input_tokens + again.cache_read_input_tokens == offered


def test_the_answer_continues_a_last_message_of_the_assistants(client: Anthropic, base: str):
    begun = [*HELLO, {"role": "assistant", "content": "The answer is ("}]
    closed = [*begun, *HELLO]
    counts = [client.messages.count_tokens(model=base, messages=given).input_tokens for given in (begun, closed)]
    assert counts[0] + len("Hello") < counts[1]
    assert client.messages.create(model=base, messages=begun, max_tokens=3).usage.output_tokens == 3


def test_an_answer_may_fill_the_context(client: Anthropic, server: Server, base: str):
    def messages(length: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": "a" * length}]

    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as openai:
        context = openai.models.retrieve(base).max_model_len
    around = client.messages.count_tokens(model=base, messages=messages(1)).input_tokens - 1  # a byte is a token
    asked = {"model": base, "messages": messages(context - around - 3), "max_tokens": 100, "extra_body": {"seed": 1}}
    message = client.messages.create(**asked)
    assert (message.stop_reason, message.usage.output_tokens) == ("model_context_window_exceeded", 3)


def test_what_is_not_as_asked_is_a_warning(client: Anthropic, base: str):
    answer = client.messages.with_raw_response.create(
        model=base, messages=HELLO, max_tokens=2048, thinking={"type": "enabled", "budget_tokens": 1024},
        stop_sequences=["a", "e", "t", " "], extra_body={"context_management": {"edits": []}}
    )  # fmt: skip
    found = answer.headers["x-loraplex-warning"]
    assert found == "thinking.budget_tokens is not enforced; context_management is not applied"


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0][content][0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0][content][0]"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"name": "a", "input_schema": {"type": "array"}}], "tool_choice": {"type": "any"}},
         "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "absent"}}, "tool_choice"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"$ref": "#"}}}}, "output_config.format"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_refused_by_name(client: Anthropic, base: str, wrong: dict[str, object], name: str):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model=base, messages=HELLO, max_tokens=2, extra_body=wrong)
    error = caught.value.body["error"]
    assert error["type"] == "invalid_request_error" and f"`{name}`" in error["message"]


def test_errors_are_anthropics(client: Anthropic):
    for call in (client.messages.create, client.messages.stream):
        with pytest.raises(anthropic.NotFoundError) as caught, call(model="absent", messages=HELLO, max_tokens=2):
            pass
        assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "not_found_error"
