from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex import (
    AdapterReference,
    Choice,
    GenerateOptions,
    Grammar,
    InvalidRequestError,
    JsonObject,
    JsonSchema,
    Lark,
    MergedAdapters,
    Regex,
    Tool,
)
from loraplex.requests import adapter_reference, embed_request, generate_request, tokenize_request
from loraplex_protos import generation_pb2 as pb


def test_a_text_becomes_a_text_prompt() -> None:
    assert generate_request("Hi") == pb.GenerateRequest(
        text="Hi", n=1, sampling=pb.Sampling(), stopping=pb.Stopping(), detail=pb.Detail()
    )


def test_numbers_become_token_ids() -> None:
    assert list(generate_request([1, 2, 3]).token_ids.ids) == [1, 2, 3]


def test_an_empty_list_of_tokens_is_sent_for_the_server_to_refuse() -> None:
    assert generate_request([]).WhichOneof("prompt") == "token_ids"


def test_what_is_not_a_text_is_named() -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    with pytest.raises(InvalidRequestError, match=r"^content: .*'Hi'.* is not a text"):
        generate_request(parts)


def test_an_unknown_option_is_refused_with_the_one_that_may_be_meant() -> None:
    options: Any = {"max_tokens": 5, "fish": 1}
    with pytest.raises(TypeError, match=r"unknown option: max_tokens \(max_new_tokens\?\), fish"):
        generate_request("Hi", **options)


@pytest.mark.parametrize("prompt", [None, {"role": "user", "content": "Hi"}, b"Hi", 7])
def test_what_is_not_a_prompt_is_refused_with_what_a_prompt_is(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt: has the type \w+: send a text, a list"):
        generate_request(prompt)


def test_a_message_that_is_not_a_dictionary_is_refused() -> None:
    messages: Any = [{"role": "user", "content": "Hi"}, "Hello"]
    with pytest.raises(InvalidRequestError, match=r"^messages: one has the type str"):
        generate_request(messages)


def test_messages_become_a_conversation() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    expected = pb.Chat(
        messages=[pb.ChatMessage(role="system", content="Be kind."), pb.ChatMessage(role="user", content="Hi")]
    )
    assert generate_request(messages).chat == expected
    assert tokenize_request(messages, False).chat == expected


def test_an_adapter_is_an_id_or_a_reference() -> None:
    assert generate_request("Hi", adapter="sql").adapter == pb.AdapterReference(id="sql")
    reference = AdapterReference("org/poet", source="hub", revision="main", token="secret")
    assert generate_request("Hi", adapter=reference).adapter == pb.AdapterReference(
        id="org/poet", source="hub", revision="main", token="secret"
    )


def test_an_adapters_token_is_not_shown() -> None:
    assert "secret" not in repr(AdapterReference("org/poet", token="secret"))


def test_each_kind_of_grammar_is_sent() -> None:
    def sent(grammar: Grammar) -> pb.Grammar:
        return generate_request("Hi", grammar=grammar).grammar

    assert sent(JsonSchema({"const": "é"})) == pb.Grammar(json_schema='{"const": "é"}')
    assert sent(JsonSchema("{}")) == pb.Grammar(json_schema="{}")
    assert sent(JsonObject()) == pb.Grammar(json_object=pb.JsonObject())
    assert sent(Regex("a+")) == pb.Grammar(regex="a+")
    assert sent(Choice(["a", "b"])) == pb.Grammar(choice=pb.Choice(texts=["a", "b"]))
    assert sent(Lark("start: /a/")) == pb.Grammar(lark="start: /a/")
    assert not generate_request("Hi").HasField("grammar")


def test_a_grammar_that_is_not_text_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        generate_request("Hi", grammar=JsonSchema({"const": object()}))
    assert refused.value.violations[0].field == "grammar"


def test_a_single_stop_text_is_not_split_into_characters() -> None:
    assert list(generate_request("Hi", stop="END").stopping.stop) == ["END"]
    assert list(generate_request("Hi", stop=["a", "b"]).stopping.stop) == ["a", "b"]


@given(
    temperature=st.none() | st.floats(0, 2, width=32),
    top_k=st.none() | st.integers(0, 2**32 - 1),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_sampling_fields_are_set_only_if_they_are_given(
    temperature: float | None, top_k: int | None, seed: int | None
) -> None:
    sampling = generate_request("Hi", temperature=temperature, top_k=top_k, seed=seed).sampling
    given_fields = {"temperature": temperature, "top_k": top_k, "seed": seed}
    assert {field.name: value for field, value in sampling.ListFields()} == {
        name: value for name, value in given_fields.items() if value is not None
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -1),
        ("seed", 2**64),
        ("temperature", "hot"),
        ("max_new_tokens", 1.5),
        ("stop_token_ids", [-1]),
        ("n", -1),
        ("request_id", 7),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        generate_request("Hi", **{field: value})  # type: ignore[arg-type]
    assert [violation.field for violation in raised.value.violations] == [field]


@pytest.mark.parametrize("option", ["temperatur", "text", "sampling"])
def test_an_unknown_option_is_a_type_error(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        generate_request("Hi", **{option: "x"})  # type: ignore[arg-type]


def test_every_option_is_a_field_of_a_message() -> None:
    names = set(GenerateOptions.__annotations__)
    options: dict[str, object] = {
        "request_id": "r",
        "cache_salt": "s",
        "session": "me",
        "adapter": "sql",
        "adapters": ["sql", None, AdapterReference("org/poet", token="t")],
        "grammar": Regex("a"),
        "stop": "END",
        "logit_bias": {1: 2.0},
        "stop_token_ids": [1],
        "tools": [Tool("weather")],
        "tool_choice": "weather",
        "parallel_tool_calls": False,
    }
    chat = [{"role": "user", "content": "Hi"}]
    request = generate_request(chat, **{name: options.get(name, 1) for name in names})  # type: ignore[arg-type]
    parts = (request.sampling, request.stopping, request.detail)
    present = {field.name for part in (request, request.chat, *parts) for field, _ in part.ListFields()}
    assert names - {"parallel_tool_calls"} <= present and request.tool_choice.single
    assert [(each.id, each.token) for each in request.adapters] == [("sql", ""), ("", ""), ("org/poet", "t")]
    assert {name for part in parts for name in part.DESCRIPTOR.fields_by_name} <= names


def test_a_misspelt_part_of_a_message_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match="contents"):
        generate_request([{"role": "user", "contents": "Hi"}])


def test_an_adapter_id_that_is_not_text_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="id"):
        adapter_reference(AdapterReference(7))  # type: ignore[arg-type]


def test_merged_adapters_are_ids_or_references() -> None:
    merged = MergedAdapters(["sql", AdapterReference("org/poet", token="t")], [1, -0.5], strategy="ties", density=0.5)
    request = generate_request("Hi", adapter=merged)
    assert request.WhichOneof("weights") == "merged_adapters"
    assert request.merged_adapters == pb.MergedAdapters(
        adapters=[pb.AdapterReference(id="sql"), pb.AdapterReference(id="org/poet", token="t")],
        weights=[1, -0.5],
        strategy="ties",
        density=0.5,
        majority_sign_method="total",
    )


def test_embed_takes_one_text_or_many_prompts() -> None:
    assert embed_request("Hi", None) == pb.EmbedRequest(inputs=[pb.EmbedInput(text="Hi")])
    many = embed_request(["Hi", [1, 2], [{"role": "user", "content": "Yo"}]], "sql")
    assert many == pb.EmbedRequest(
        inputs=[
            pb.EmbedInput(text="Hi"),
            pb.EmbedInput(token_ids=pb.TokenIds(ids=[1, 2])),
            pb.EmbedInput(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Yo")])),
        ],
        adapter=pb.AdapterReference(id="sql"),
    )


@pytest.mark.parametrize("options", [{"adapter": ["a", "b"]}, {"adapter": 5}, {"adapters": ["a", 5]}])
def test_an_adapter_of_another_type_is_refused_with_what_fits(options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match="adapter: is a name or an AdapterReference; several answer by"):
        generate_request("Hi", **options)  # type: ignore[arg-type]
