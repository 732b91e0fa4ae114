"""/v1/responses, with the `openai` client from PyPI, unmodified."""

import json

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "name": name, "description": "Reads.", "parameters": SCHEMA, "strict": True}
    for name in ("read_time", "read_weather")
]
SAID = {"role": "user", "content": "Hello"}


class Found(BaseModel):
    model_config = ConfigDict(extra="forbid")

    a: bool


def test_a_streamed_response_is_the_same_as_a_whole_one(client: OpenAI, base: str):
    for name in (base, "first"):
        asked = {"model": name, "input": "Hello", "instructions": "Be brief.", "temperature": 0}
        asked |= {"max_output_tokens": 12, "metadata": {"a": "b"}}
        whole = client.responses.create(**asked)
        assert (whole.model, whole.status, whole.incomplete_details.reason) == (name, "incomplete", "max_output_tokens")
        assert whole.usage.output_tokens == 12 and whole.metadata == {"a": "b"} and whole.temperature == 0
        with client.responses.stream(**asked) as stream:
            events = list(stream)
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        assert set(kinds[4:-4]) == {"output_text.delta"}
        assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        streamed = events[-1].response
        assert streamed.output_text == whole.output_text and streamed.usage.output_tokens == 12


def test_a_response_means_what_a_chat_completion_means(client: OpenAI, base: str):
    parts = [{"type": "input_text", "text": "Hello"}]
    said = [{"role": "developer", "content": "Be kind."}, {"type": "message", "role": "user", "content": parts}]
    response = client.responses.create(
        model=base, instructions="Be brief.", input=said, max_output_tokens=12, temperature=0
    )
    messages = [{"role": "system", "content": "Be brief.\n\nBe kind."}, {"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model=base, messages=messages, max_tokens=12, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.input_tokens_details.cached_tokens >= 0


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "read_weather"}])
def test_forced_functions_are_called_streamed_or_not(client: OpenAI, base: str, choice: object):
    asked = {"model": base, "input": "Hello", "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    asked |= {"max_output_tokens": 200, "extra_body": {"seed": 3}}
    whole = client.responses.create(**asked)
    (call,) = whole.output
    assert whole.status == "completed" and call.type == "function_call" and call.call_id.startswith("call_")
    assert set(json.loads(call.arguments)) == {"a"} and (choice == "required" or call.name == "read_weather")
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_response().output
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments == streamed.arguments and len(deltas) > 1
    assert [event.type.removeprefix("response.") for event in events[-3:]] == [
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_outputs_of_a_response_are_input_of_the_next(client: OpenAI, base: str):
    said = [{"role": "user", "content": "Hello"}]
    asked = {"model": base, "tools": TOOLS, "max_output_tokens": 200}
    first = client.responses.create(input=said, tool_choice="required", **asked)
    said += first.output
    said += [{"type": "function_call_output", "call_id": call.call_id, "output": "noon"} for call in first.output]
    assert client.responses.create(input=said, **asked).usage.input_tokens > first.usage.input_tokens


def test_a_kept_response_is_continued_shown_and_deleted(client: OpenAI, base: str):
    asked = {"model": base, "max_output_tokens": 6, "temperature": 0}
    first = client.responses.create(input="Hello", instructions="Be brief.", **asked)
    with client.responses.stream(input="And you?", previous_response_id=first.id, **asked) as stream:
        second = list(stream)[-1].response
    assert first.store and second.store and second.previous_response_id == first.id
    said = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "And you?"}]
    at_once = client.responses.create(input=said, store=False, **asked)  # instructions are not carried over
    assert at_once.output_text == second.output_text
    assert at_once.usage.input_tokens == second.usage.input_tokens and not at_once.store
    shown = client.responses.retrieve(second.id)
    assert shown.output_text == second.output_text and shown.usage == second.usage
    listed = list(client.responses.input_items.list(second.id, limit=2, order="asc"))  # two pages
    assert [item.content[0].text for item in listed] == ["Hello", first.output_text, "And you?"]
    assert [item.role for item in listed] == ["user", "assistant", "user"]
    newest = next(iter(client.responses.input_items.list(second.id)))
    assert newest.id == listed[-1].id
    client.responses.delete(first.id)
    for gone in (first.id, at_once.id):
        for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError, match="one router"):
                call(gone)
    for previous in (first.id, second.id):  # the second one needs the first
        with pytest.raises(openai.BadRequestError, match=f"there is no response '{first.id}'") as caught:
            client.responses.create(input="And?", previous_response_id=previous, **asked)
        assert caught.value.param == "previous_response_id"


def test_requests_with_one_id_are_kept_as_several_responses(client: OpenAI, base: str):
    asked = {"model": base, "max_output_tokens": 4, "temperature": 0, "extra_headers": {"X-Request-Id": "trace"}}
    first, second = (client.responses.create(input=text, **asked) for text in ("One", "Two"))
    third = client.responses.create(input="Three", previous_response_id=second.id, **asked)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    listed = client.responses.input_items.list(third.id, order="asc")
    assert [item.content[0].text for item in listed] == ["Two", second.output_text, "Three"]


def test_calls_of_a_kept_response_are_answered(client: OpenAI, base: str):
    asked = {"model": base, "tools": TOOLS, "max_output_tokens": 200}
    first = client.responses.create(input="Hello", tool_choice="required", **asked)
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "noon"} for call in first.output]
    second = client.responses.create(input=results, previous_response_id=first.id, **asked)
    assert second.usage.input_tokens > first.usage.input_tokens


def test_items_of_a_kept_response_are_referred_to(client: OpenAI, base: str):
    """As the AI SDK continues a conversation."""
    asked = {"model": base, "tools": TOOLS, "max_output_tokens": 200}
    first = client.responses.create(input=[SAID], tool_choice="required", parallel_tool_calls=False, **asked)
    (call,) = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    reference = {"type": "item_reference", "id": call.id}
    referred = client.responses.create(input=[SAID, reference, output], **asked)
    whole = client.responses.create(input=[SAID, call, output], **asked)
    assert referred.usage.input_tokens == whole.usage.input_tokens
    shown = client.responses.input_items.list(referred.id, order="asc").data
    assert [item.type for item in shown] == ["message", "function_call", "function_call_output"]
    client.responses.delete(first.id)
    for unknown in (call.id, referred.id):  # a response is not an item
        with pytest.raises(openai.BadRequestError, match="which is not known"):
            client.responses.create(input=[SAID, {"type": "item_reference", "id": unknown}, output], **asked)
    with pytest.raises(openai.NotFoundError):  # nor an item a response
        client.responses.retrieve(referred.output[0].id)


def test_tools_of_a_namespace_and_custom_tools_are_called(client: OpenAI, base: str):
    """As codex sends them, with a tool that OpenAI's servers run."""
    patch = {
        "type": "custom",
        "name": "patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a/"},
    }
    tools = [
        {"type": "web_search", "external_web_access": False},
        {"type": "namespace", "name": "clock", "tools": TOOLS},
        patch,
    ]
    asked = {"model": base, "input": "Hello", "tools": tools, "max_output_tokens": 400, "temperature": 0}
    asked["extra_body"] = {"tool_choice": {"type": "function", "namespace": "clock", "name": "read_time"}}
    answer = client.responses.with_raw_response.create(**asked)
    warning = answer.headers["x-loraplex-warning"]
    assert "tools[0] is left out" in warning and "tools[2].format is not enforced" in warning
    (called,) = answer.parse().output
    assert (called.type, called.name, called.namespace) == ("function_call", "read_time", "clock")

    asked["extra_body"] = {
        "tool_choice": {"type": "custom", "name": "patch"},
        "logit_bias": {"34": 5},
    }  # to end the text
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.custom_tool_call_input.delta"]
        (custom,) = stream.get_final_response().output
    assert (custom.type, custom.name, deltas) == ("custom_tool_call", "patch", [custom.input])
    output = {"type": "custom_tool_call_output", "call_id": custom.call_id, "output": "done"}
    outputs = [{"type": "function_call_output", "call_id": called.call_id, "output": "noon"}, output]
    said = [SAID, called, custom, *outputs]
    assert client.responses.create(model=base, input=said, tools=tools, max_output_tokens=2).usage.input_tokens > 100


def test_answers_follow_a_format(client: OpenAI, base: str):
    parsed = client.responses.parse(model=base, input="Hello", text_format=Found, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Found)
    anything = client.responses.create(
        model=base, input="Hello", text={"format": {"type": "json_object"}}, max_output_tokens=60
    )
    assert anything.output_text.startswith("{")


def test_logprobs_are_those_of_the_text(client: OpenAI, base: str):
    asked = {"model": base, "input": "Hello", "max_output_tokens": 5, "top_logprobs": 2, "temperature": 0}
    (message,) = client.responses.create(**asked, include=["message.output_text.logprobs"]).output
    entries = message.content[0].logprobs
    assert len(entries) == 5 and all(len(entry.top_logprobs) == 2 for entry in entries)
    with client.responses.stream(**asked) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
    pieces = [entry.token for event in deltas for entry in event.logprobs]
    assert pieces == [entry.token for entry in entries]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),  # it was never there
        ({"background": True}, "background"),
        ({"n": 2}, "n"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input[0][content][0]"),
        ({"tools": [{"type": "telepathy"}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "absent"}}, "tool_choice"),
        ({"tools": [{**TOOLS[0], "parameters": {"type": "string"}}], "tool_choice": "required"}, "tools[0].parameters"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"$ref": "#"}}}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": "many"}, "top_k"),
    ],
)
def test_an_invalid_field_is_refused_by_name(client: OpenAI, base: str, wrong: dict[str, object], param: str):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=base, input="Hello", extra_body=wrong)
    assert caught.value.param == param and f"`{param}`" in caught.value.message


def test_what_is_not_as_asked_is_a_warning(client: OpenAI, base: str):
    asked = {"model": base, "input": "Hello", "max_output_tokens": 2, "text": {"verbosity": "low"}}
    answer = client.responses.with_raw_response.create(**asked, extra_body={"sparkle": 1})
    found = answer.headers["x-loraplex-warning"]
    assert "text.verbosity is not applied" in found and "sparkle" in found


def test_an_unknown_model_is_not_found(client: OpenAI):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="absent", input="Hello")
