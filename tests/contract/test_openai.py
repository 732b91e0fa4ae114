"""The `openai` client from PyPI, unmodified."""

import asyncio
import json

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.processes import Server
from tests.e2e.tiny import byte_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Reads something.", "parameters": SCHEMA}}
    for name in ("read_time", "read_weather")
]


def test_models_are_the_base_and_its_adapters(client: OpenAI, base: str):
    models = {model.id: model for model in client.models.list()}
    assert next(iter(models)) == base and {"first", "second"} < set(models)
    assert models["first"].parent == base and models[base].parent is None
    assert client.models.retrieve("first").id == "first"
    for name in ("absent", "broken"):
        assert name not in models
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_models_are_listed_in_pages_if_requested(client: OpenAI, base: str):
    def page(**query: object) -> tuple[list[str], bool]:
        got = client.models.list(extra_query=query)
        return [model.id for model in got], got.has_more

    everything, more = page()
    assert more is False
    assert page(limit=2) == (everything[:2], True)
    assert page(limit=2, after=everything[1]) == (everything[2:4], len(everything) > 4)
    assert page(after=everything[-1]) == ([], False)
    for query in ({"after": "absent"}, {"limit": 0}):
        with pytest.raises(openai.BadRequestError):
            page(**query)


def test_the_model_names_the_adapter_alone_or_after_the_base(client: OpenAI, base: str):
    def answer(model: str) -> str:
        return client.completions.create(model=model, prompt="Hello", max_tokens=6, temperature=0).choices[0].text

    assert answer("first") == answer(f"{base}:first") != answer(base)
    for unknown in ("absent", f"{base}:absent", f"{base}:"):
        with pytest.raises(openai.NotFoundError) as caught:
            answer(unknown)
        assert caught.value.code == "model_not_found"


def test_choices_of_several_prompts_are_numbered_consecutively_streamed_or_not(client: OpenAI, base: str):
    options = {"model": base, "prompt": ["Hello", "Good day"], "n": 2, "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (13, 20)
    texts, reasons = [""] * 4, [""] * 4
    *chunks, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and reasons == ["length"] * 4
    assert last.choices == [] and last.usage.completion_tokens == 20


def test_echo_scores_the_prompt_without_an_answer(client: OpenAI, base: str):
    tokens = list(range(30, 40))
    scored = client.completions.create(model=base, prompt=tokens, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert len(scored.text) == len(scored.logprobs.tokens) == 10
    assert scored.logprobs.token_logprobs[0] is None and all(value < 0 for value in scored.logprobs.token_logprobs[1:])
    assert scored.logprobs.text_offset == list(range(10))


def test_alternatives_to_a_prompts_tokens_are_reported(client: OpenAI, base: str):
    tokens = list(range(30, 40))
    options = {"model": base, "prompt": tokens, "max_tokens": 1, "temperature": 0}
    echoed = client.completions.create(**options, echo=True, logprobs=3).choices[0].logprobs
    assert echoed.top_logprobs[0] is None and len(echoed.top_logprobs) == 11
    for own, top in zip(echoed.token_logprobs[1:], echoed.top_logprobs[1:], strict=True):
        assert own in top.values() and 3 <= len(top) <= 4 and [*top.values()] == sorted(top.values(), reverse=True)
    reported = client.completions.create(**options, extra_body={"prompt_logprobs": 2}).choices[0].prompt_logprobs
    assert reported[0] is None and len(reported) == 10
    for token, own, found in zip(tokens[1:], echoed.token_logprobs[1:-1], reported[1:], strict=True):
        assert found[str(token)]["logprob"] == pytest.approx(own, abs=1e-4)
        ranks = sorted(entry["rank"] for entry in found.values())
        assert ranks[:2] == [1, 2] and len(ranks) == len(found) and len(set(ranks)) == len(ranks)
    alone = client.completions.create(**options, extra_body={"prompt_logprobs": 0}).choices[0].prompt_logprobs
    assert [list(found) for found in alone[1:]] == [[str(token)] for token in tokens[1:]]


def test_logprobs_belong_to_the_text_and_best_of_keeps_the_likeliest(client: OpenAI, base: str):
    choice = client.completions.create(model=base, prompt="Hello", max_tokens=6, temperature=0, logprobs=3).choices[0]
    assert len(choice.logprobs.tokens) == 6
    assert all(
        max(top.values()) == own and len(top) >= 1
        for own, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)
    )
    assert len(client.completions.create(model=base, prompt="Hello", max_tokens=3, n=2, best_of=4).choices) == 2


def test_a_streamed_chat_is_the_same_as_a_whole_one(client: OpenAI, base: str):
    options = {"model": "second", "messages": HELLO, "max_completion_tokens": 8, "seed": 5, "temperature": 0.8}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    message = whole.choices[0]
    assert message.message.role == "assistant" and message.finish_reason == "length"
    assert [len(token.top_logprobs) for token in message.logprobs.content] == [2] * 8
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == message.message.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"


async def test_many_asynchronous_streams_at_once(server: Server, base: str):
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def read(model: str) -> int:
            stream = await client.chat.completions.create(model=model, messages=HELLO, max_tokens=16, stream=True)
            async with stream:
                count = 0
                async for _ in stream:
                    count += 1
                    if model == "first" and count > 2:
                        break  # closes the stream midway
                return count

        counts = await asyncio.gather(*(read(model) for model in [base, "first", "second"] * 4))
    assert all(counts)
    server.assert_nothing_is_held()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0][content][0]"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias[x]"),
        ({"stop": 5}, "stop"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"functions": [{"name": "f"}], "tools": [{"type": "function", "function": {"name": "f"}}]}, "functions"),
        ({"extra_body": {"bad_words": [""]}}, "bad_words"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, "response_format"),  # it has no schema
        ({"extra_body": {"regex": "(a"}}, "regex"),
        ({"extra_body": {"json_schema": {"type": "odd"}}}, "json_schema"),
    ],
)
def test_an_invalid_field_is_a_bad_request_that_names_it(
    client: OpenAI, base: str, wrong: dict[str, object], param: str, stream: bool
):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": base, "messages": HELLO, "stream": stream, **wrong})
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_a_prompt_that_exceeds_the_context_is_refused_with_the_limit(client: OpenAI, base: str):
    for options in ({"messages": [{"role": "user", "content": "x" * 9000}]}, {"max_tokens": 10**6}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": base, "messages": HELLO, **options})
        assert caught.value.code == "context_length_exceeded"
        assert "this model's maximum context length is 4096 tokens" in caught.value.message


def test_tokens_of_logprobs_are_ids_if_vllms_option_is_set(client: OpenAI, base: str):
    common = {"model": base, "max_tokens": 5, "temperature": 0}
    as_ids = {"extra_body": {"return_tokens_as_token_ids": True}}
    completion = {**common, "prompt": "Hi", "logprobs": 2, "echo": True}
    texts = client.completions.create(**completion).choices[0].logprobs
    named = client.completions.create(**completion, **as_ids).choices[0].logprobs
    prompt = [f"token_id:{token}" for token in byte_tokenizer().encode("Hi")]
    assert named.tokens[: len(prompt)] == prompt and named.text_offset == texts.text_offset
    assert all(name.startswith("token_id:") for top in named.top_logprobs[1:] for name in top)
    chunks = client.completions.create(**completion, **as_ids, stream=True)
    assert [name for chunk in chunks for name in chunk.choices[0].logprobs.tokens] == named.tokens
    chat = {**common, "messages": HELLO, "logprobs": True, "top_logprobs": 1, **as_ids}
    whole = client.chat.completions.create(**chat).choices[0].logprobs.content
    assert all(token.token.startswith("token_id:") for token in whole)
    assert [token.token for token in whole] == [token.top_logprobs[0].token for token in whole]
    pieces = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**chat, stream=True)]
    assert [token for piece in pieces if piece for token in piece.content] == whole


def test_tokens_that_are_parts_of_characters_are_identified_by_their_bytes(client: OpenAI, base: str):
    options = {"model": base, "max_tokens": 40, "temperature": 1.5, "seed": 3}
    for stream in (False, True):
        answer = client.completions.create(**options, prompt="é😀x:", echo=True, logprobs=5, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        text = "".join(choice.text for choice in choices)
        tokens = [token for choice in choices for token in choice.logprobs.tokens]
        offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
        top = [found for choice in choices for found in choice.logprobs.top_logprobs]
        assert tokens[:8] == [*(f"bytes:\\x{byte:02x}" for byte in "é😀".encode()), "x", ":"]
        assert offsets[:8] == [0, 0, 1, 1, 1, 1, 2, 3] and offsets == sorted(offsets)
        assert all(text[at] == token for token, at in zip(tokens, offsets, strict=True) if len(token) == 1)
        assert all(len(found) in (5, 6) and name in found for name, found in zip(tokens[1:], top[1:], strict=True))
    chat = {**options, "messages": HELLO, "logprobs": True, "top_logprobs": 5}
    for entry in client.chat.completions.create(**chat).choices[0].logprobs.content:
        for token in (entry, *entry.top_logprobs):
            name = token.token if token.token == "</s>" else token.token.encode().decode("unicode_escape")
            assert bytes(token.bytes) == (b"</s>" if token.token == "</s>" else name.encode("latin-1"))


def test_a_bias_chooses_tokens_but_does_not_change_the_logprobs(client: OpenAI, base: str):
    q, r = byte_tokenizer().encode("qr")
    options = {"model": base, "prompt": "Hello", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    plain = client.completions.create(**options).choices[0]
    forced = client.completions.create(**options, logit_bias={str(q): 100, str(r): 50}).choices[0]
    assert forced.text == "qqqq" and forced.logprobs.token_logprobs[0] < plain.logprobs.token_logprobs[0]
    assert client.completions.create(**options, logit_bias={str(q): -100, str(r): 100}).choices[0].text == "rrrr"


def test_special_tokens_are_shown_if_requested(client: OpenAI, base: str):
    end = byte_tokenizer().eos_token_id
    options = {"model": base, "prompt": "Hello", "max_tokens": 2, "logit_bias": {str(end): 100}}
    for skip, text in ((None, ""), (False, "</s></s>")):
        extra = {"ignore_eos": True, "skip_special_tokens": skip}
        assert client.completions.create(**options, extra_body=extra).choices[0].text == text
        whole = client.completions.create(**options, extra_body=extra, logprobs=0).choices[0].logprobs
        chunks = client.completions.create(**options, extra_body=extra, logprobs=0, stream=True)
        pieces = [chunk.choices[0].logprobs for chunk in chunks]
        assert [token for piece in pieces for token in piece.tokens] == whole.tokens == ["</s>", "</s>"]
        assert [at for piece in pieces for at in piece.text_offset] == whole.text_offset == [0, len(text) // 2]


def test_stop_strings_are_matched_in_the_output_after_min_tokens(client: OpenAI, base: str):
    (q,), end = byte_tokenizer().encode("q"), byte_tokenizer().eos_token_id
    options = {"model": base, "prompt": "Hello", "max_tokens": 12, "logit_bias": {str(q): 100}}
    for extra, text, reason, tokens in (
        ({}, "", "qq", 2),
        ({"min_tokens": 6}, "qqqqq", "qq", 7),
        ({"min_tokens": 12}, "q" * 12, None, 12),
        ({"stop_token_ids": [q]}, "", q, 1),
        ({"stop_token_ids": [q], "include_stop_str_in_output": True}, "q", q, 1),
    ):
        for stream in (False, True):
            asked = {**options, "stop": ["x", "qq"], "extra_body": {"stream_options": {"include_usage": True}, **extra}}
            answer = client.completions.create(**asked, stream=stream)
            chunks = list(answer) if stream else [answer]
            choices = [choice for chunk in chunks for choice in chunk.choices]
            assert ("".join(choice.text for choice in choices), choices[-1].stop_reason) == (text, reason)
            assert choices[-1].finish_reason == ("stop" if reason else "length")
            assert chunks[-1].usage.completion_tokens == tokens
    for stop, least in (("</s>", 0), ("</s></s>", 3)):
        extra = {"ignore_eos": True, "min_tokens": least}
        hidden = {**options, "stop": stop, "logit_bias": {str(end): 100}, "extra_body": extra}
        (choice,) = client.completions.create(**hidden).choices
        assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", stop)


def test_formats_of_openai_and_of_vllm(client: OpenAI, base: str):
    def answer(**options: object) -> str:
        completion = client.chat.completions.create(model=base, messages=HELLO, max_tokens=200, **options)
        assert completion.choices[0].finish_reason == "stop"
        return completion.choices[0].message.content

    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    assert set(json.loads(answer(response_format=schema))) == {"a"}
    assert answer(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in ("yes", "no")
    assert answer(extra_body={"guided_regex": "[0-9]{4}"}).isdigit()
    assert set(json.loads(answer(extra_body={"guided_json": SCHEMA}))) == {"a"}
    for others in (
        {"type": "json_object", "schema": SCHEMA},  # LoRAX's
        {"type": "json_object", "value": SCHEMA},  # text-generation-inference's
        {"type": "json", "value": json.dumps(SCHEMA)},
    ):
        assert set(json.loads(answer(response_format=others))) == {"a"}
    assert answer(response_format={"type": "regex", "value": "[0-9]{4}"}).isdigit()
    assert set(json.loads(answer(extra_body={"json_schema": SCHEMA, "grammar": ""}))) == {"a"}  # llama.cpp's
    assert answer(extra_body={"grammar": 'root ::= "yes" | "no"'}) in ("yes", "no")
    assert answer(extra_body={"ebnf": 'root ::= "yes" | "no"'}) in ("yes", "no")  # SGLang's
    assert answer(extra_body={"regex": "[0-9]{4}"}).isdigit()


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "read_weather"}}, "read_weather"]
)
def test_forced_tool_calls_are_calls_streamed_or_not(client: OpenAI, base: str, choice: object):
    options = {"model": base, "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**options, max_tokens=200, seed=3).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert call.function.name in ("read_time", "read_weather") and set(json.loads(call.function.arguments)) == {"a"}
    assert choice == "required" or call.function.name == "read_weather"
    chunks = list(client.chat.completions.create(**options, max_tokens=200, seed=3, stream=True))
    first, *others = (call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ())
    assert first.id and (first.function.name, first.function.arguments) == (call.function.name, "")
    assert len(others) > 1 and all(piece.index == 0 and piece.id is piece.function.name is None for piece in others)
    assert "".join(piece.function.arguments for piece in others) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def forced(schema: dict[str, object]) -> dict[str, object]:
    """Options that force a call of the second tool, which has this schema."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("read_clock", "read_sky")]
    tools[1]["function"] |= {"parameters": schema}
    return {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}


def test_a_forced_tools_schema_resolves_its_own_references(client: OpenAI, base: str):
    tree = {"type": "object", "properties": {"kid": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["kid"]}
    size = {
        "properties": {"size": {"$ref": "#/definitions/a"}},
        "required": ["size"],
        "definitions": {"a": {"const": 1}},
    }
    for schema in (tree, size):
        options = {**forced(schema), "tool_choice": "read_sky", "max_tokens": 300}
        for seed in range(3):
            choice = client.chat.completions.create(model=base, messages=HELLO, seed=seed, **options).choices[0]
            jsonschema.validate(json.loads(choice.message.tool_calls[0].function.arguments), schema)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (forced({"type": "object", "properties": {"a": {"type": "odd"}}}), "tools[1].function.parameters"),
        (forced({"type": "string"}), "tools[1].function.parameters"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "response_format"),
        ({"extra_body": {"guided_json": {"not": {}}}}, "guided_json"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, "structured_outputs.regex"),
    ],
)
def test_formats_that_cannot_be_enforced_are_refused_by_field(
    client: OpenAI, base: str, options: dict[str, object], param: str
):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=base, messages=HELLO, **options)
    assert caught.value.param == param and f"`{param}`" in caught.value.message


def test_a_tool_without_parameters_is_called_without_arguments(client: OpenAI, base: str):
    tool = {"type": "function", "function": {"name": "read_clock"}}
    choice = {"type": "function", "function": {"name": "read_clock"}}
    options = {"model": base, "messages": HELLO, "tools": [tool], "tool_choice": choice, "max_tokens": 200}
    (call,) = client.chat.completions.create(**options).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {}


def test_every_chunk_has_the_usage_so_far_if_vllms_option_is_set(client: OpenAI, base: str):
    asked = {"include_usage": True, "continuous_usage_stats": True}
    # Tokens that arrive faster than they are sent share a chunk, but not all of them.
    common = {
        "model": base,
        "max_tokens": 40,
        "stream": True,
        "stream_options": asked,
        "extra_body": {"ignore_eos": True},
    }
    for stream in (
        client.chat.completions.create(messages=HELLO, **common),
        client.completions.create(prompt="Hello", **common),
    ):
        counts = [chunk.usage.completion_tokens for chunk in stream]
        assert counts == sorted(counts) and counts[-1] == 40 and len(counts) > 2


def test_a_conversation_with_tool_results_is_understood(client: OpenAI, base: str):
    function = {"name": "read_time", "arguments": '{"a": true}'}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    plain = client.chat.completions.create(model=base, messages=messages, max_tokens=2).usage.prompt_tokens
    offered = client.chat.completions.create(model=base, messages=messages, tools=TOOLS, max_tokens=2).usage
    assert offered.prompt_tokens > plain + 100


def test_vllms_extra_fields_are_understood(client: OpenAI, base: str):
    extra = {
        "top_k": 5,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 3,
        "stop_token_ids": [5],
        "skip_special_tokens": True,
        "prompt_logprobs": 0,
        "truncate_prompt_tokens": 4,
    }
    completion = client.completions.create(model=base, prompt="Hello", max_tokens=4, extra_body=extra)
    assert completion.usage.prompt_tokens == 4 and len(completion.choices[0].prompt_logprobs) == 4
