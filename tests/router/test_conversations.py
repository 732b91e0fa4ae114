"""Conversations from OpenAI's clients, and what chat templates receive."""

from typing import Any

import pytest

from loraplex_protos.errors import InvalidRequestError
from loraplex_router.api.http.conversation import Conversation, read_conversation
from loraplex_router.vocabulary.chat import Chat, Message
from loraplex_router.vocabulary.violations import Violations


def read(*messages: dict[str, Any], **options: Any) -> Chat:
    found = Violations()
    chat = read_conversation(Conversation.model_validate({"messages": messages, **options}), found)
    found.raise_any()
    return chat


def test_fields_that_the_server_does_not_know_are_passed_on():
    fields = {"name": "Ann", "reasoning_content": "Hm.", "thinking": None, "x": {"y": [1]}}
    assert read({"role": "user", "content": "Hi", **fields}).messages == (Message("user", "Hi", fields),)
    documents = [{"title": "One", "text": "1"}]
    assert read({"role": "user", "content": "Hi"}, documents=documents).documents == documents


def test_templates_get_the_reasoning_effort_in_both_forms():
    def variables(**options: Any) -> Any:
        return read({"role": "user", "content": "Hi"}, **options).variables

    assert variables(reasoning_effort="low") == {"reasoning_effort": "low", "enable_thinking": True}
    assert variables(reasoning_effort="none") == {"reasoning_effort": "none", "enable_thinking": False}
    own = {"enable_thinking": False, "x": 1}
    assert variables(reasoning_effort="high", chat_template_kwargs=own) == {"reasoning_effort": "high", **own}
    assert variables(reasoning_effort=None) == {}


def test_tools_and_calls_keep_the_clients_order_and_text():
    tool = {"function": {"strict": True, "parameters": {"b": 1, "a": None}, "name": "add"}, "type": "function", "x": 1}
    (found,) = read({"role": "user", "content": "Hi"}, tools=[tool]).tools
    assert str(found) == str(tool)
    call = {"id": "c1", "index": 0, "function": {"arguments": '{"b":1}', "name": "add"}}
    message = read({"role": "assistant", "tool_calls": [call]}).messages[0]
    assert str(message.fields["tool_calls"]) == str([{"type": "function", **call}])
    assert message.content is None


@pytest.mark.parametrize("arguments", ["", '{"a": 1}', {"a": 1}, None])
def test_arguments_may_be_text_an_object_or_absent(arguments: Any):
    call = {"id": "c1", "function": {"name": "add", "arguments": arguments}}
    assert read({"role": "assistant", "tool_calls": [call]}).messages[0].fields["tool_calls"][0]["function"] == {
        "name": "add",
        "arguments": arguments,
    }


def test_an_empty_list_of_calls_is_the_same_as_none():
    assert read({"role": "assistant", "content": "Hi", "tool_calls": []}).messages == (Message("assistant", "Hi"),)


def test_all_text_parts_are_text_whatever_their_type():
    parts = [
        {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}},
        {"type": "input_text", "text": "two"},
        {"type": "refusal", "refusal": "three"},
    ]
    assert read({"role": "user", "content": parts}).messages[0].content == [
        parts[0],
        {"type": "text", "text": "two"},
        {"type": "text", "text": "three"},
    ]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "is of type 'image_url': the model reads text"),
        ({"type": "text"}, "has no text"),
        ({"type": "refusal", "text": "no"}, "has no refusal"),
    ],
)
def test_parts_that_are_not_text_are_refused_by_name(part: Any, reason: str):
    with pytest.raises(InvalidRequestError, match=rf"messages\[0\]\[content\]\[1\]\W+{reason}"):
        read({"role": "user", "content": [{"type": "text", "text": "one"}, part]})
