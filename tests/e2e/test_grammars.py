"""Structured output through a running server: answers, refusals, and other requests that are not affected."""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonschema
import pytest

from loraplex import (
    AnswerError,
    AsyncClient,
    AsyncConversation,
    Choice,
    Client,
    Conversation,
    FinishReason,
    GeneratedSequence,
    Grammar,
    InvalidRequestError,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
)
from tests.e2e.processes import Server
from tests.e2e.tiny import byte_tokenizer

END = byte_tokenizer().eos_token_id
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "größe": {"type": "integer", "minimum": 0, "maximum": 300},
        "tags": {"type": "array", "items": {"enum": ["a", "ß", None]}, "maxItems": 3},
    },
    "required": ["name", "größe", "tags"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 1.0, "max_new_tokens": 120, "adapter": "r8"}
NESTED = re.compile(r"\(*x\)*")


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def answer(client: Client, grammar: Grammar, **options: object) -> GeneratedSequence:
    return client.generate("Say: ", grammar=grammar, temperature=1.0, **options).sequences[0]  # type: ignore[arg-type]


def test_json_answers_are_valid_and_end_by_themselves(client: Client) -> None:
    for seed in range(8):
        whole = answer(client, JsonSchema(SCHEMA), seed=seed, max_new_tokens=400)
        assert whole.finish_reason is FinishReason.END_TOKEN
        jsonschema.validate(json.loads(whole.text), SCHEMA)


def test_any_json_object_can_be_requested(client: Client) -> None:
    cut = answer(client, JsonObject(), seed=1, max_new_tokens=60)
    assert cut.text.startswith("{")
    if cut.finish_reason is FinishReason.END_TOKEN:
        assert isinstance(json.loads(cut.text), dict)


def test_regex_choice_and_lark_are_matched(client: Client) -> None:
    for seed in range(4):
        assert re.fullmatch(r"\d{2}-[a-f]+!", answer(client, Regex(r"\d{2}-[a-f]{1,9}!"), seed=seed).text)
        assert answer(client, Choice(["ja", "nein", "weiß nicht"]), seed=seed).text in ("ja", "nein", "weiß nicht")
        nested = answer(client, Lark('start: "(" start ")" | "x"'), seed=seed, max_new_tokens=300)
        assert NESTED.fullmatch(nested.text) and nested.text.count("(") == nested.text.count(")")


def test_an_answer_that_meets_the_token_limit_says_so(client: Client) -> None:
    cut = answer(client, JsonSchema(SCHEMA), max_new_tokens=5)
    assert cut.finish_reason is FinishReason.LENGTH and cut.text == '{"nam'


def test_a_grammar_that_cannot_be_compiled_is_refused_before_the_stream_begins(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="unclosed group") as refused:
        answer(client, Regex("(a"))
    assert refused.value.violations[0].field == "grammar"
    with pytest.raises(InvalidRequestError, match="Unsatisfiable"):
        next(client.stream("Hi", grammar=JsonSchema({"not": {}})))


@pytest.mark.parametrize(
    ("grammar", "options", "field"),
    [
        (Regex("a" * 32_769), {}, "grammar"),
        (Lark("start: " + " " * 8_192), {}, "grammar"),
        (Regex(""), {}, "grammar"),
        (Choice([]), {}, "grammar.choice"),
        (None, {"min_new_tokens": 5, "max_new_tokens": 4}, "stopping.min_new_tokens"),
        (None, {"min_new_tokens": 1_000_000}, "stopping.min_new_tokens"),
    ],
)
def test_conflicting_fields_are_refused_by_field(
    client: Client, grammar: Grammar | None, options: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        client.generate("Hi", grammar=grammar, **options)  # type: ignore[arg-type]
    assert field in [violation.field for violation in refused.value.violations]


async def test_constrained_and_plain_sequences_run_together_and_do_not_change_each_other(server: Server) -> None:
    async with AsyncClient(server.address) as client:
        plain = [await client.generate(f"Prompt {i}", temperature=1.0, seed=i, max_new_tokens=40) for i in range(6)]

        async def constrained(seed: int) -> str:
            adapter = "r8" if seed % 2 else None
            whole = await client.generate("x", adapter=adapter, grammar=JsonSchema(SCHEMA), top_p=0.9, seed=seed)
            return whole.text

        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(constrained(seed)) for seed in range(10)]
            again = [
                group.create_task(client.generate(f"Prompt {i}", temperature=1.0, seed=i, max_new_tokens=40))
                for i in range(6)
            ]
    for task in answers:
        jsonschema.validate(json.loads(task.result()), SCHEMA)
    assert [task.result().text for task in again] == [generation.text for generation in plain]


def test_no_end_token_is_chosen_before_the_minimum_length(client: Client) -> None:
    ends = list(range(64))
    whole = client.generate("Hi", temperature=1.0, seed=1, stop_token_ids=ends, min_new_tokens=30, max_new_tokens=90)
    tokens = [token.id for token in whole.sequences[0].tokens]
    assert len(tokens) > 30 and not set(tokens[:30]) & {*ends, END}


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_new_tokens": 30}, {"ignore_eos": True, "seed": 1}])
def test_the_end_of_a_grammar_ends_an_answer_despite_ignore_eos(client: Client, options: dict[str, object]) -> None:
    document = answer(client, JsonSchema(SCHEMA), **options)
    jsonschema.validate(json.loads(document.text), SCHEMA)
    assert document.finish_reason is FinishReason.END_TOKEN
    longest = [answer(client, Regex("a{1,40}"), max_new_tokens=60, **options) for _ in range(3)]
    assert all(len(found.text) >= 30 for found in longest)
    assert "ignore_eos" not in options or {found.text for found in longest} == {"a" * 40}


def test_preempted_sequences_and_two_ranks_give_the_same_answers_with_or_without_logprobs(
    model: Path, adapters: Path, client: Client
) -> None:
    expected = [answer(client, JsonSchema(SCHEMA), seed=seed) for seed in range(8)]
    scored = [answer(client, JsonSchema(SCHEMA), seed=seed, logprobs=True) for seed in range(8)]
    for plain, whole in zip(expected, scored, strict=True):
        tokens = [token.id for token in whole.tokens]
        assert tokens == [token.id for token in plain.tokens]
        prompt = byte_tokenizer().encode("Say: ")
        known = client.generate([*prompt, *tokens], max_new_tokens=1, prompt_logprobs=True).prompt[len(prompt) :]
        assert [token.logprob for token in whole.tokens] == pytest.approx([t.logprob for t in known], abs=1e-3)

    async def ask(address: str, **options: bool) -> list[GeneratedSequence]:
        async with AsyncClient(address) as other, asyncio.TaskGroup() as group:
            options = {"grammar": JsonSchema(SCHEMA), "temperature": 1.0, **options}  # type: ignore[dict-item]
            tasks = [group.create_task(other.generate("Say: ", seed=seed, **options)) for seed in range(8)]  # type: ignore[arg-type]
        return [task.result().sequences[0] for task in tasks]

    with Server(str(model), "--tp=2", "--kv-blocks=12", "--max-model-len=160", "--threads=1") as small:
        assert [found.text for found in asyncio.run(ask(small.address))] == [whole.text for whole in expected]
        for found, whole in zip(asyncio.run(ask(small.address, logprobs=True)), scored, strict=True):
            assert [token.id for token in found.tokens] == [token.id for token in whole.tokens]
            logprobs = [token.logprob for token in whole.tokens]
            assert [token.logprob for token in found.tokens] == pytest.approx(logprobs, abs=1e-3)
        assert small.metric("loraplex_preemptions_total") > 0
        small.assert_nothing_is_held()


def test_an_answer_with_logprobs_ends_at_the_same_token_as_without(client: Client) -> None:
    for limit in range(1, 14):
        plain = answer(client, JsonSchema(SCHEMA), seed=3, max_new_tokens=limit)
        scored = answer(client, JsonSchema(SCHEMA), seed=3, max_new_tokens=limit, logprobs=True)
        assert (scored.text, scored.finish_reason) == (plain.text, plain.finish_reason)
        assert len(scored.tokens) == limit and all(token.logprob < 0 for token in scored.tokens)


@dataclass
class Verdict:
    mood: Literal["glad", "sad"]
    sure: bool


def weather(city: Literal["Rome", "Oslo"], days: list[Literal["today", "tomorrow"]]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def test_answers_are_instances_of_types(client: Client) -> None:
    answered = client.parse("Is Maria glad?", Verdict, n=3, seed=1, **SAMPLED)
    assert {type(value) for value in answered.values} == {Verdict}
    *_, last = client.stream_parsed("Is Maria glad?", Verdict, seed=1, **SAMPLED)
    assert last.parsed == answered.parsed
    with pytest.raises(AnswerError) as raised:
        client.parse("Is Maria glad?", Verdict, max_new_tokens=5)
    assert raised.value.text == '{"moo'


def test_functions_are_called(client: Client) -> None:
    options = {"tools": [weather], "tool_choice": "weather", "seed": 3, **SAMPLED}
    conversation, streamed = Conversation(client, **options), Conversation(client, **options)
    assert conversation.say("Weather?").sequences[0].tool_calls == ()
    _, called, result, _ = conversation.messages
    assert result["content"] in ("sunny in Rome", "sunny in Oslo")
    assert result["tool_call_id"] == called["tool_calls"][0].id
    parts = [part for piece in streamed.stream("Weather?") for part in piece.tool_calls]
    assert [part.name for part in parts if part.name] == ["weather"]
    assert "".join(part.arguments for part in parts) == called["tool_calls"][0].arguments
    assert [each["content"] for each in streamed.messages] == [each["content"] for each in conversation.messages]


async def test_coroutine_functions_are_called(server: Server) -> None:
    async def tomorrow(city: Literal["Rome", "Oslo"]) -> str:
        return f"rain in {city}"

    async with AsyncClient(server.address) as client:
        conversation = AsyncConversation(client, tools=[weather, tomorrow], tool_choice="tomorrow", **SAMPLED)
        await conversation.say("Weather?")
        assert conversation.messages[2]["content"].startswith("rain in ")
