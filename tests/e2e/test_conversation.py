"""Structured answers and tools with a real server, whose model answers at random what a grammar allows."""

from dataclasses import dataclass
from typing import Literal

import pytest

from loraplex import AnswerError, AsyncClient, AsyncConversation, Client, Conversation
from tests.e2e.processes import Server


@dataclass
class Verdict:
    mood: Literal["glad", "sad"]
    sure: bool


def weather(city: Literal["Rome", "Oslo"], days: list[Literal["today", "tomorrow"]]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


SAMPLED = {"temperature": 1.0, "max_new_tokens": 120, "adapter": "r8"}


def test_answers_are_instances_and_functions_are_called(server: Server):
    with Client(server.address) as client:
        answered = client.parse("Is Maria glad?", Verdict, n=3, seed=1, **SAMPLED)
        assert {type(value) for value in answered.values} == {Verdict}
        *_, last = client.stream_parsed("Is Maria glad?", Verdict, seed=1, **SAMPLED)
        assert last.parsed == answered.parsed
        conversation = Conversation(client, tools=[weather], tool_choice="weather", seed=3, **SAMPLED)
        assert conversation.say("Weather?").sequences[0].tool_calls == ()
        _, called, result, _ = conversation.messages
        assert result["content"] in ("sunny in Rome", "sunny in Oslo")
        assert result["tool_call_id"] == called["tool_calls"][0].id
        streamed = Conversation(client, tools=[weather], tool_choice="weather", seed=3, **SAMPLED)
        assert [part.name for piece in streamed.stream("Weather?") for part in piece.tool_calls if part.name] == [
            "weather"
        ]
        assert streamed.messages[1]["tool_calls"][0].arguments == called["tool_calls"][0].arguments
        assert [m["content"] for m in streamed.messages] == [m["content"] for m in conversation.messages]


async def test_with_asyncio_too(server: Server):
    async def tomorrow(city: Literal["Rome", "Oslo"]) -> str:
        return f"rain in {city}"

    async with AsyncClient(server.address) as client:
        answered = await client.parse("Is Maria glad?", Verdict, seed=1, **SAMPLED)
        assert isinstance(answered.parsed, Verdict)
        conversation = AsyncConversation(client, tools=[weather, tomorrow], tool_choice="tomorrow", **SAMPLED)
        await conversation.say("Weather?")
        assert conversation.messages[2]["content"].startswith("rain in ")


def test_an_answer_that_is_cut_off_is_an_error(server: Server):
    with Client(server.address) as client, pytest.raises(AnswerError) as raised:
        client.parse("Is Maria glad?", Verdict, max_new_tokens=5)
    assert raised.value.text == '{"moo'
