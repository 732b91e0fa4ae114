"""Limits on one request's content: JSON is checked before it is parsed, and errors quote little of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import (
    MAX_QUOTED,
    FieldViolation,
    InvalidRequestError,
    LoraplexError,
    from_rpc_error,
    quote,
    to_status,
)
from loraplex_router.api.http.fields import Bias, Items, Prompts, TokenId
from loraplex_router.api.message_limits import MAX_FIELDS, MAX_NUMBERS, check_message
from loraplex_router.text.json_limits import MAX_DEPTH, MAX_ELEMENTS, MAX_NODES, JsonStructure, parse, parse_body
from loraplex_router.vocabulary.grammar import (
    MAX_LENGTH,
    MAX_SCHEMAS_LENGTH,
    EmbeddedSchema,
    Grammar,
    GrammarKind,
)
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sequence import Detail
from loraplex_router.vocabulary.volume import MAX_LOGPROBS, Volume

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\,:[]{}é\n'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab"\\,:[]{}', max_size=3), inner, max_size=4),
)


def count(value: object) -> tuple[int, int, int]:
    """The number of commas; of lists, objects and names; and the depth of a value as JSON."""
    if not isinstance(value, (list, dict)):
        return 0, 0, 0
    parts = [count(part) for part in (value.values() if isinstance(value, dict) else value)]
    commas, nodes, depths = map(list, zip(*parts, strict=True)) if parts else ([], [], [])
    names = len(value) if isinstance(value, dict) else 0
    return max(0, len(parts) - 1) + sum(commas), 1 + names + sum(nodes), 1 + max(depths, default=0)


@given(value=VALUES, cuts=st.lists(st.integers(1, 5), max_size=60))
def test_structure_is_only_counted_outside_strings_however_the_text_is_divided(value, cuts):
    rest = json.dumps(value, ensure_ascii=False).encode()
    structure = JsonStructure()
    for cut in [*cuts, len(rest) + 1]:
        piece, rest = rest[:cut], rest[cut:]
        structure.feed(piece)
    commas, nodes, _ = count(value)
    assert (structure._elements, structure._nodes, structure._depth) == (commas, nodes, 0)


@given(value=VALUES)
async def test_json_within_the_limits_is_read_unchanged(value):
    text = json.dumps(value)
    assert parse(text) == await parse_body(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        ("[" + "1," * MAX_ELEMENTS + "1,1]", "is too large"),
        ("[" + "[]," * MAX_NODES + "1]", "is too large"),
        ("{" + '"a":1,' * (MAX_NODES + 1) + '"b":1}', "is too large"),
        ("[1,", "is not valid JSON"),
        ('"\\ud800"', "is not valid JSON"),
        ("\ud800", "is not valid JSON"),
    ],
)
async def test_json_beyond_the_limits_is_refused_before_it_is_parsed(text, reason):
    with pytest.raises(ValueError, match=f"^.*{reason}"):
        parse(text)
    with pytest.raises(ValueError, match=reason):
        await parse_body(text.encode(errors="surrogatepass"))


def test_the_deepest_accepted_json_can_be_serialized():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse(text)) == text


@pytest.mark.parametrize(
    ("kind", "given", "place"),
    [
        (Prompts, [-1] * 1000, 0),
        (Prompts, [1] * 10 + ["a"] * 1000, 10),
        (Prompts, [[1], *[[-1] * 1000] * 1000], 1),
        (Prompts, ["a", *[1] * 1000], 1),
        (Items[TokenId], [2**32] * 1000, 0),
    ],
)
def test_a_long_list_is_refused_for_its_first_error(kind, given, place):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(given)
    (error,) = caught.value.errors()
    assert place in error["loc"]


@pytest.mark.parametrize("given", ["", "text", [], ["a", "b"], [1, 2], [[1, 2], [3]], [[]]])
def test_each_kind_of_prompt_is_read(given):
    assert TypeAdapter(Prompts).validate_python(given) == given


@pytest.mark.parametrize("given", [1, None, {"a": 1}, [None], [{}]])
def test_invalid_prompts_are_refused(given):
    with pytest.raises(ValidationError):
        TypeAdapter(Prompts).validate_python(given)


def test_a_million_biases_are_one_error():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Bias).validate_python({str(-place): "?" for place in range(10**6)})
    assert caught.value.error_count() == 1


@given(text=st.text(max_size=3 * MAX_QUOTED))
def test_a_quote_is_one_line_and_short(text):
    assert "\n" not in quote(text) and eval(quote(text).removesuffix("...")) == text[:MAX_QUOTED]


class _Call(Exception):
    """A failed gRPC call as its client sees it."""

    def __init__(self, status):
        self._status = status

    def code(self):
        return self._status.code

    def details(self):
        return self._status.details

    def trailing_metadata(self):
        return self._status.trailing_metadata


@pytest.mark.parametrize("letter", ["x", "é", "😀", "\n"])
def test_errors_fit_into_the_trailers_that_grpc_clients_accept(letter):
    long = letter * 100_000
    for error in (LoraplexError(long), InvalidRequestError(*[FieldViolation(long, long)] * 100)):
        status = to_status(error)
        size = 3 * len(status.details.encode()) + sum(len(k) + len(v) * 4 / 3 for k, v in status.trailing_metadata)
        assert size < 8 << 10
        assert type(from_rpc_error(_Call(status))) is type(error)


LOGPROBS = Detail(logprobs=True, top_logprobs=19)


def test_an_answer_without_max_tokens_is_limited_by_its_logprobs():
    assert Volume().add(Request("Hi", n=4), 10, 10**6) == 10**6
    assert Volume().add(Request("Hi", n=4, detail=LOGPROBS), 10, 10**6) == MAX_LOGPROBS // 80
    assert Volume().add(Request("Hi", detail=LOGPROBS), 10, 100) == 100


@pytest.mark.parametrize(
    ("request_", "prompt_length"),
    [
        (Request("Hi", n=64, max_new_tokens=1000, detail=LOGPROBS), 10),
        (Request("Hi", detail=Detail(prompt_logprobs=True, prompt_top_logprobs=20)), 100_000),
        (Request("Hi", n=64), 100_000),
    ],
)
def test_requests_that_would_need_too_much_memory_are_refused(request_, prompt_length):
    with pytest.raises(InvalidRequestError, match="at most"):
        Volume().add(request_, prompt_length, 10**6)


def test_all_prompts_of_a_call_count_together():
    volume, request = Volume(), Request("Hi", max_new_tokens=100, detail=LOGPROBS)
    for _ in range(MAX_LOGPROBS // 2000):
        assert volume.add(request, 10, 100) == 100
    with pytest.raises(InvalidRequestError):
        volume.add(request, 10, 100)


def test_a_grpc_request_of_many_parts_is_refused_before_it_is_parsed():
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")] * 5000)
    few = pb.GenerateRequest(chat=pb.Chat(messages=chat.messages[:4096]), token_ids=None)
    check_message(few.SerializeToString(), pb.GenerateRequest.DESCRIPTOR)
    for many in (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * (MAX_FIELDS + 1))),
        pb.GenerateRequest(stopping=pb.Stopping(stop=[""] * (MAX_FIELDS + 1))),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * (MAX_NUMBERS + 1))),
        pb.GenerateRequest(chat=pb.Chat(messages=[*chat.messages] * 3)),
    ):
        with pytest.raises(InvalidRequestError):
            check_message(many.SerializeToString(), pb.GenerateRequest.DESCRIPTOR)


def test_long_texts_and_ids_are_one_part_of_a_grpc_request():
    for message in (
        pb.GenerateRequest(text="\0" * 10**6, sampling=pb.Sampling(temperature=1.0, logit_bias={1: 2.0})),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * MAX_NUMBERS)),
    ):
        check_message(message.SerializeToString(), pb.GenerateRequest.DESCRIPTOR)


@given(data=st.binary(max_size=60))
def test_invalid_grpc_requests_are_left_to_the_parser(data):
    check_message(data, pb.GenerateRequest.DESCRIPTOR)


@pytest.mark.parametrize("kind", GrammarKind)
def test_grammars_have_a_length(kind: GrammarKind):
    most = MAX_LENGTH[kind]
    assert list(Grammar(kind, "x" * most).check()) == []
    (violation,) = Grammar(kind, "x" * (most + 1)).check()
    assert str(most) in violation.description
    schemas = tuple(EmbeddedSchema("x" * most, f"schemas[{place}]") for place in range(MAX_SCHEMAS_LENGTH // most + 1))
    (violation,) = Grammar(GrammarKind.LARK, "", schemas).check()
    assert str(MAX_SCHEMAS_LENGTH) in violation.description
