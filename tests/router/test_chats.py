"""Chats of generation.proto: tools, calls, thoughts."""

import json

import pytest

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import InvalidRequestError
from loraplex_router.api.chats import create_reader, read_chat, read_parts
from loraplex_router.api.translation import read_request
from loraplex_router.engine.delta import Delta
from loraplex_router.vocabulary.chat import Chat
from loraplex_router.vocabulary.sequence import FinishReason
from loraplex_router.vocabulary.thoughts import Thoughts

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = pb.Tool(name="weather", description="The weather.", parameters=json.dumps(CITY))
TIME = pb.Tool(name="time")
HI = pb.ChatMessage(role="user", content="Hi")
CALLS = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


def asking(*tools: pb.Tool, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=[HI], tools=tools), **fields)


def refused(request: pb.GenerateRequest) -> list[str]:
    with pytest.raises(InvalidRequestError) as raised:
        read_request(request)
    return [violation.field for violation in raised.value.violations]


def test_templates_see_tools_calls_and_results_in_the_form_of_openais_api():
    call = pb.ToolCall(id="c1", name="weather", arguments='{"city": "Rome"}')
    chat = pb.Chat(
        messages=[
            HI,
            pb.ChatMessage(role="assistant", tool_calls=[call], reasoning="Rome?"),
            pb.ChatMessage(role="tool", tool_call_id="c1", name="weather", content="sunny"),
        ],
        tools=[WEATHER, TIME],
    )
    read = read_chat(chat)
    assert read.tools == (
        {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}},
        {"type": "function", "function": {"name": "time"}},
    )
    user, assistant, result = read.messages
    assert (user.content, user.fields) == ("Hi", {})
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert assistant.fields == {
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        "reasoning_content": "Rome?",
    }
    assert (result.content, result.fields) == ("sunny", {"tool_call_id": "c1", "name": "weather"})


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (pb.GenerateRequest(chat=pb.Chat(messages=[HI, pb.ChatMessage(content="Hi")])), ["chat.messages[1].role"]),
        (asking(pb.Tool(name="with space")), ["chat.tools[0].name"]),
        (asking(TIME, TIME), ["chat.tools"]),
        (asking(pb.Tool(name="t", parameters="{")), ["chat.tools[0].parameters"]),
        (asking(pb.Tool(name="t", parameters="[]")), ["chat.tools[0].parameters"]),
        (asking(tool_choice=pb.ToolChoice(mode="MODE_REQUIRED")), ["tool_choice"]),
        (pb.GenerateRequest(text="Hi", tool_choice=pb.ToolChoice(single=True)), ["tool_choice"]),
        (asking(TIME, tool_choice=pb.ToolChoice(name="date")), ["tool_choice.name"]),
        (asking(TIME, tool_choice=pb.ToolChoice(mode="MODE_NONE", name="time")), ["tool_choice.name"]),
        (asking(TIME, tool_choice=pb.ToolChoice(name="time"), grammar=pb.Grammar(regex="a")), ["grammar"]),
        (
            asking(pb.Tool(name="t", parameters='{"type": "array"}'), tool_choice=pb.ToolChoice(name="t")),
            ["chat.tools[0].parameters"],
        ),
    ],
)
def test_tools_that_cannot_be_as_they_are_described_are_refused_by_name(
    request_: pb.GenerateRequest, fields: list[str]
):
    assert refused(request_) == fields


def test_a_forced_call_has_a_grammar_that_the_parser_of_calls_reads():
    request = asking(WEATHER, TIME, tool_choice=pb.ToolChoice(mode="MODE_REQUIRED"))
    grammar = read_request(request).grammar
    assert grammar is not None and [schema.field for schema in grammar.schemas] == [
        "chat.tools[0].parameters",
        "chat.tools[1].parameters",
    ]
    one = read_request(asking(WEATHER, tool_choice=pb.ToolChoice(name="weather"))).grammar
    assert one is not None and '\\"weather\\"' in one.text
    assert read_request(asking(WEATHER, tool_choice=pb.ToolChoice(single=True))).grammar is None


def test_tools_that_must_not_be_called_are_not_described():
    request = asking(TIME, tool_choice=pb.ToolChoice(mode="MODE_NONE"))
    prompt = read_request(request).prompt
    assert isinstance(prompt, Chat) and prompt.tools == ()
    assert create_reader(request, None) is None


def parts(request: pb.GenerateRequest, *texts: str, thinks: bool = False) -> list[tuple[str, str, list[pb.ToolCall]]]:
    """(text, reasoning, parts of calls) of each piece of an answer. Ids are checked and left out."""
    reader = create_reader(request, Thoughts(("<think>",), ("</think>",)) if thinks else None)
    found = []
    for place, text in enumerate(texts):
        last = place == len(texts) - 1
        delta = Delta(text, finish_reason=FinishReason.END_TOKEN if last else None)
        read = read_parts(reader, delta, new_id=str)
        for part in read.calls:
            assert part.call.id.startswith("call_") == bool(part.call.name)
            part.call.ClearField("id")
        found.append((read.text, read.reasoning, [(part.index, part.call) for part in read.calls]))
    return found


def test_calls_are_found_in_an_answer():
    call = pb.ToolCall(name="weather", arguments='{"city": "Rome"}')
    assert parts(asking(WEATHER), f"Well. {CALLS}{CALLS}") == [("Well. ", "", [(0, call), (1, call)])]
    single = asking(WEATHER, tool_choice=pb.ToolChoice(single=True))
    assert parts(single, f"{CALLS}{CALLS}") == [("", "", [(0, call)])]
    assert parts(asking(TIME), CALLS)[0][2] == []
    assert parts(asking(), CALLS) == [(CALLS, "", [])]


def test_a_stream_has_a_calls_name_first_and_then_its_arguments():
    head, rest = '<tool_call>{"name": "weather", "arguments": {"ci', 'ty": "Rome"}}</tool_call>'
    assert parts(asking(WEATHER), "Well. ", head, rest) == [
        ("Well. ", "", []),
        ("", "", [(0, pb.ToolCall(name="weather", arguments='{"ci'))]),
        ("", "", [(0, pb.ToolCall(arguments='ty": "Rome"}'))]),
    ]


def test_thoughts_are_separated_if_asked_for_or_if_there_are_tools():
    answer = f"<think>{CALLS}?</think>Hello"
    expected = [("Hello", f"{CALLS}?", [])]
    assert parts(asking(WEATHER), answer, thinks=True) == expected
    assert parts(asking(detail=pb.Detail(reasoning=True)), answer, thinks=True) == expected
    assert parts(asking(), answer, thinks=True) == [(answer, "", [])]
