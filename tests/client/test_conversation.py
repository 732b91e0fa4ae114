"""Conversations with tools, for both clients."""

import asyncio
import inspect
import json
import threading
from enum import Enum
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from loraplex import (
    AnswerError,
    AsyncClient,
    AsyncConversation,
    Client,
    Conversation,
    InvalidRequestError,
    LoraplexError,
    Tool,
    ToolCall,
    TooManyRoundsError,
)
from loraplex.tools import write_result
from loraplex_protos import generation_pb2 as pb
from tests.client.scripted import ScriptedServicer, answer


def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
    """The weather in a city."""
    if city == "Atlantis":
        raise LookupError("no such city")
    return f"sunny in {city}, 20 {unit}"


def call(id: int, name: str = "weather", /, **arguments: object) -> pb.ToolCall:
    return pb.ToolCall(id=f"c{id}", name=name, arguments=json.dumps(arguments))


def chats(servicer: ScriptedServicer) -> list[list[tuple[str, str]]]:
    """(role, content) of each request's messages."""
    return [[(each.role, each.content) for each in request.chat.messages] for request in servicer.requests]


def test_a_conversation_remembers_what_was_said(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer("Hello", reasoning="Hm"), answer("Fine")]
    conversation = Conversation(client, [{"role": "system", "content": "Be kind."}], adapter="sql", seed=1)
    assert conversation.say("Hi").text == "Hello"
    assert "".join(piece.text for piece in conversation.stream("How are you?")) == "Fine"
    told = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "How are you?")]
    assert chats(servicer) == [told[:2], told]
    first, second = servicer.requests
    assert first.session == second.session != ""
    assert (second.adapter.id, second.sampling.seed, second.chat.messages[2].reasoning) == ("sql", 1, "Hm")
    assert conversation.messages[-1] == {"role": "assistant", "content": "Fine"}


def test_a_fork_goes_on_by_itself(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer("1"), answer("2"), answer("3")]
    one = Conversation(client)
    one.say("a")
    other = one.fork()
    one.say("b")
    other.say("c")
    assert [[message["content"] for message in each.messages] for each in (one, other)] == [
        ["a", "1", "b", "2"],
        ["a", "1", "c", "3"],
    ]
    assert len({request.session for request in servicer.requests}) == 1


def test_functions_are_called_until_the_model_answers(client: Client, servicer: ScriptedServicer) -> None:
    calls = call(1, city="Rome"), call(2, city="Oslo", unit="F")
    rounds = [answer("Let me see.", *calls), answer("", call(3, city="Bern")), answer("Sunny everywhere.")]
    servicer.answers = [*rounds, *rounds]
    for streams in (False, True):
        servicer.requests.clear()
        conversation = Conversation(client, tools=[weather])
        if streams:
            pieces = list(conversation.stream("Weather?"))
            assert "".join(piece.text for piece in pieces) == "Let me see.Sunny everywhere."
            names = [(part.index, part.name) for piece in pieces for part in piece.tool_calls if part.name]
            assert names == [(0, "weather"), (1, "weather"), (0, "weather")]
        else:
            assert conversation.say("Weather?").text == "Sunny everywhere."
        *_, last = chats(servicer)
        assert last == [
            ("user", "Weather?"),
            ("assistant", "Let me see."),
            ("tool", "sunny in Rome, 20 C"),
            ("tool", "sunny in Oslo, 20 F"),
            ("assistant", ""),
            ("tool", "sunny in Bern, 20 C"),
        ]
        said = servicer.requests[-1].chat.messages
        assert list(said[1].tool_calls) == list(calls)
        assert [(each.tool_call_id, each.name) for each in said[2:4]] == [("c1", "weather"), ("c2", "weather")]
        assert conversation.messages[-1]["content"] == "Sunny everywhere."


def test_a_function_is_described_by_its_signature_and_docstring() -> None:
    class Mood(Enum):
        GOOD = "good"

    class Place(BaseModel):
        city: str

    def plan(place: Place, mood: Mood, *, days: Annotated[int, Field(ge=1, description="How many")] = 1) -> None:
        """Plans a journey.

        Only in Europe.
        """

    tool = Tool.of(plan)
    assert (tool.name, tool.description) == ("plan", "Plans a journey.\n\nOnly in Europe.")
    assert tool.parameters is not None
    assert tool.parameters["properties"] == {
        "place": {"$ref": "#/$defs/Place"},
        "mood": {"$ref": "#/$defs/Mood"},
        "days": {"type": "integer", "minimum": 1, "default": 1, "description": "How many"},
    }
    assert tool.parameters["required"] == ["place", "mood"]


@pytest.mark.parametrize("tool", [len, lambda *cities: None, "weather", weather.__call__])
def test_what_cannot_be_described_is_refused(tool: object, client: Client) -> None:
    with pytest.raises((InvalidRequestError, TypeError), match=r"tools: |cannot be described"):
        Conversation(client, tools=[tool])  # type: ignore[list-item]


def test_arguments_become_what_the_annotations_say() -> None:
    class Place(BaseModel):
        city: str

    def where(place: Place) -> Place:
        return place

    tool = Tool.of(where)
    assert tool.call('{"place": {"city": "Rome"}}') == Place(city="Rome")
    assert write_result(tool.call('{"place": {"city": "Rome"}}')) == '{"city":"Rome"}'


@pytest.mark.parametrize(
    ("called", "told"),
    [
        (call(1, city="Atlantis"), "error: LookupError: no such city"),
        (call(1, unit="C"), "error: ValidationError: city: Missing required argument"),
        (call(1, city="Rome", unit="K"), "error: ValidationError: unit: Input should be 'C' or 'F'"),
        (pb.ToolCall(name="weather", arguments="{"), "error: ValidationError: Invalid JSON: EOF"),
    ],
)
def test_the_model_is_told_what_went_wrong(
    called: pb.ToolCall, told: str, client: Client, servicer: ScriptedServicer
) -> None:
    servicer.answers = [answer("", called), answer("Sorry.")]
    assert Conversation(client, tools=[weather]).say("Weather?").text == "Sorry."
    ((_, _, (role, content)),) = [chat for chat in chats(servicer) if len(chat) == 3]
    assert role == "tool" and content.startswith(told)


def test_calls_of_one_answer_run_at_the_same_time(client: Client, servicer: ScriptedServicer) -> None:
    together = threading.Barrier(3)

    def meet(number: int) -> int:
        together.wait(10)
        return number

    servicer.answers = [answer("", *(call(number, "meet", number=number) for number in range(3))), answer("Done")]
    conversation = Conversation(client, tools=[meet])
    assert conversation.say("Meet").text == "Done"
    assert [each["content"] for each in conversation.messages if each["role"] == "tool"] == ["0", "1", "2"]


async def test_asyncio_awaits_coroutine_functions(async_client: AsyncClient, servicer: ScriptedServicer) -> None:
    together = asyncio.Barrier(2)

    async def meet(number: int) -> int:
        await together.wait()
        if number:
            raise ValueError("late")
        return number

    servicer.answers = [answer("", call(0, "meet", number=0), call(1, "meet", number=1), call(2, city="Rome"))]
    servicer.answers += [answer("Done"), answer("Bye")]
    conversation = AsyncConversation(async_client, tools=[meet, weather])
    assert (await conversation.say("Meet")).text == "Done"
    results = [each["content"] for each in conversation.messages if each["role"] == "tool"]
    assert results == ["0", "error: ValueError: late", "sunny in Rome, 20 C"]
    assert "".join([piece.text async for piece in conversation.fork().stream("Bye")]) == "Bye"
    assert conversation.messages[-1]["content"] == "Done"


def test_the_ordinary_client_refuses_coroutine_functions(client: Client) -> None:
    async def later() -> None: ...

    with pytest.raises(TypeError, match="later is a coroutine function"):
        Conversation(client, tools=[later])


def test_only_the_first_answer_is_forced_to_call(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer("", call(1, city="Rome")), answer("Sunny")]
    Conversation(client, tools=[weather], tool_choice="weather", parallel_tool_calls=False).say("Weather?")
    choices = [request.tool_choice for request in servicer.requests]
    assert choices == [pb.ToolChoice(name="weather", single=True), pb.ToolChoice(single=True)]


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([answer("", call(1, city="Rome"))] * 3, TooManyRoundsError),
        ([answer("", call(1, city="Rome"), finish_reason="LENGTH")], AnswerError),
        ([answer("", call(1, city="Rome"), finish_reason="CANCELLED")], AnswerError),
    ],
)
@pytest.mark.parametrize("method", [Conversation.say, lambda *args: list(Conversation.stream(*args))])
def test_after_an_error_the_conversation_is_as_before(
    answers: list[pb.GeneratedSequence], error: type[LoraplexError], method, client: Client, servicer: ScriptedServicer
) -> None:
    servicer.answers = [*answers]
    conversation = Conversation(client, tools=[weather], max_rounds=3)
    with pytest.raises(error):
        method(conversation, "Weather?")
    assert conversation.messages == [] and servicer.answers == []


@pytest.mark.parametrize("max_rounds", [0, 1.5, float("nan"), float("inf")])
def test_what_is_no_number_of_rounds_is_refused(max_rounds, client: Client) -> None:
    with pytest.raises(ValueError, match="max_rounds must be a whole number"):
        Conversation(client, max_rounds=max_rounds)


def test_a_stream_that_is_left_early_changes_nothing(client: Client, servicer: ScriptedServicer) -> None:
    servicer.answers = [answer("Hello")]
    conversation = Conversation(client)
    for piece in conversation.stream("Hi"):
        if piece.text:
            break
    assert conversation.messages == []


def test_an_option_or_a_tool_that_does_not_fit_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="adapters, n"):
        Conversation(client, n=2, adapters=["a"])
    with pytest.raises(TypeError, match="no function"):
        Conversation(client, tools=[Tool("weather")])


def test_tools_and_calls_are_sent_and_answered_without_a_conversation(
    client: Client, servicer: ScriptedServicer
) -> None:
    servicer.answers = [answer("", call(1, city="Rome"), reasoning="Rome?")]
    openai = {"id": "c0", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [openai], "reasoning_content": "Hm"},
        {"role": "tool", "tool_call_id": "c0", "content": "?"},
    ]
    tools = [Tool("weather", strict=True), {"type": "function", "function": {"name": "time", "parameters": {}}}]
    sequence = client.generate(messages, tools=tools, tool_choice="required").sequences[0]
    assert sequence.tool_calls == (ToolCall("c1", "weather", '{"city": "Rome"}'),)
    assert sequence.reasoning == "Rome?"
    (request,) = servicer.requests
    assert request.chat.messages[1].reasoning == "Hm"
    assert request.chat.messages[1].tool_calls == [pb.ToolCall(id="c0", name="weather", arguments="{}")]
    assert request.chat.tools == [pb.Tool(name="weather", strict=True), pb.Tool(name="time", parameters="{}")]
    assert request.tool_choice == pb.ToolChoice(mode="MODE_REQUIRED")
    client.tokenize(messages, tools=tools)
    assert servicer.requests[-1] == pb.TokenizeRequest(chat=request.chat)
    with pytest.raises(InvalidRequestError, match="tools: needs a conversation"):
        client.generate("Hi", tools=[weather])
    with pytest.raises(InvalidRequestError, match=r"tools: .* form of OpenAI's API"):
        client.generate(messages, tools=[{"name": "time"}])
    with pytest.raises(InvalidRequestError, match="tool_choice: is auto"):
        client.generate(messages, tools=[weather], tool_choice={"type": "function"})  # type: ignore[arg-type]


def test_both_conversations_have_the_same_methods_with_the_same_parameters() -> None:
    for name in ("__init__", "say", "stream", "fork"):
        mine, its = (inspect.signature(getattr(kind, name)) for kind in (Conversation, AsyncConversation))
        assert list(mine.parameters) == list(its.parameters)
