"""Grammars: refusals, and sampled texts match, alone, beside others and after a preemption."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import jsonschema
import numpy as np
import pytest
import torch

from loraplex_protos.errors import InvalidRequestError
from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2 import (
    FAILURE_REASON_GRAMMAR,
    GRAMMAR_KIND_JSON_SCHEMA,
    GRAMMAR_KIND_LARK,
    GRAMMAR_KIND_REGEX,
    BadWord,
    Grammar,
    SequenceStart,
    Thoughts,
)
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.sampling import grammars
from loraplex_shard.sampling.constraints import Constraints
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.sampling.vocabulary import compare, keep_known
from loraplex_shard.stepping.runner import Runner
from tests.e2e.tiny import byte_tokenizer, save_model
from tests.random_schemas import random_document_schema
from tests.shard.decoders import load
from tests.shard.grammar_samples import END, TOKENIZER, TOKENIZER_JSON, VOCAB, constrained, create_compiler, sample
from tests.shard.planner import BLOCK_SIZE, NUM_BLOCKS, Planner

CPU = torch.device("cpu")
RANDOM = Sampling(temperature=1.5, seed=3)
DATE = Grammar(kind=GRAMMAR_KIND_REGEX, text=r"[12]\d{3}-[01]\d")


def schema(**content: object) -> Grammar:
    return Grammar(kind=GRAMMAR_KIND_JSON_SCHEMA, text=json.dumps(content))


PERSON = schema(
    type="object",
    properties={"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    required=["name", "age"],
    additionalProperties=False,
)

PERSON_NAME = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}
PERSON_AGE = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return create_compiler()


REFUSED = {
    "not JSON": (Grammar(kind=GRAMMAR_KIND_JSON_SCHEMA, text='{"type": "str'), "not JSON"),
    "unknown type": (schema(type="text"), "text"),
    "nothing fits": (schema(**{"not": {}}), "Unsatisfiable"),
    "reference to nowhere": (schema(**{"$ref": "#/$defs/missing"}), "missing"),
    "reference to itself": (schema(**{"$ref": "#"}), "without end"),
    "reference to a server": (schema(**{"$ref": "http://localhost:1/schema.json"}), "http://localhost:1"),
    "open group": (Grammar(kind=GRAMMAR_KIND_REGEX, text="(ab"), "unclosed group"),
    "look-around": (Grammar(kind=GRAMMAR_KIND_REGEX, text="a(?=b)"), "look-around"),
    "slash and open group": (Grammar(kind=GRAMMAR_KIND_REGEX, text="a/(b"), "unclosed group"),
    "no character": (Grammar(kind=GRAMMAR_KIND_REGEX, text=r"a?[^\s\S]"), "nothing matches it"),
    "unknown rule": (Grammar(kind=GRAMMAR_KIND_LARK, text="start: sentence"), "sentence"),
    "GBNF without root": (Grammar(kind=GRAMMAR_KIND_LARK, text='x ::= "a"'), "root"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_grammar_that_cannot_be_compiled_is_refused_with_the_reason(compiler: GrammarCompiler, case: str) -> None:
    grammar, reason = REFUSED[case]
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as refused:
        compiler.matcher(grammar)
    assert refused.value.violations[0].field == "grammar"


def test_the_states_that_a_grammar_may_need_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Grammar(kind=GRAMMAR_KIND_REGEX, text="(a|b)*a(a|b){40}")
    create_compiler().matcher(many)
    monkeypatch.setattr(grammars, "LEXER_FUEL", 3)
    with pytest.raises(InvalidRequestError, match="cannot be compiled"):
        create_compiler().matcher(many)


def test_a_model_without_an_end_token_or_with_an_unsupported_tokenizer_refuses_grammars() -> None:
    with pytest.raises(InvalidRequestError, match="end token"):
        GrammarCompiler(TOKENIZER_JSON, VOCAB, ()).matcher(DATE)
    with pytest.raises(InvalidRequestError, match="cannot be compiled"):
        GrammarCompiler(b"{}", VOCAB, (END,)).matcher(DATE)


@pytest.mark.parametrize("rows", [VOCAB - 2, VOCAB, VOCAB + 7])
def test_a_match_only_has_tokens_with_an_embedding(rows: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[PAD]", "yes"])  # both could be fast-forwarded by the grammar
    ends = END if rows > END else 0, rows - 1  # the tokenizer may lack one of them
    compiler = GrammarCompiler(tokenizer.backend_tokenizer.to_str().encode(), rows, ends)
    constraints = Constraints(compiler, rows)
    grammar = Grammar(kind=GRAMMAR_KIND_LARK, text='start: "[PAD]" /[yno]es/')
    constraints.start(SequenceStart(row=0, tokens=[0], prompt_length=1, grammar=grammar))
    tokens: list[int] = []
    while (token := one_of_allowed(constraints, len(tokens), rows)) not in ends:
        tokens += [token, *constraints.fast_forward(0, 9, end=False)]
        assert max(tokens) < rows
    assert re.fullmatch(r"\[PAD\][yno]es", tokenizer.decode(tokens))


def one_of_allowed(constraints: Constraints, length: int, rows: int, preferred: Sequence[int] = ()) -> int:
    masks = constraints.begin([0], [1 + length])
    assert masks is not None
    logits = torch.arange(float(rows))
    logits[list(preferred)] += rows
    token = int(masks.apply(logits[None]).argmax())  # the last
    constraints.accept([0], [token])
    assert not constraints.failed([0]).any()
    return token


@pytest.mark.parametrize("text", ["</s>", "<|end|>", "x<|end|>y</s>", "<|end|><|end|>"])
@pytest.mark.parametrize("most", [1, 2, 32])
def test_a_text_that_looks_like_a_special_token_is_spelled_out(text: str, most: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    compiler = GrammarCompiler(tokenizer.backend_tokenizer.to_str().encode(), VOCAB + 1, (END,))
    constraints = Constraints(compiler, VOCAB + 1)
    grammar = Grammar(kind=GRAMMAR_KIND_LARK, text=f'start: "{text}" /[yn]/ <|end|>')
    constraints.start(SequenceStart(row=0, tokens=[0], prompt_length=1, grammar=grammar))
    tokens: list[int] = []
    while (token := one_of_allowed(constraints, len(tokens), VOCAB + 1)) != END:
        tokens += [token, *constraints.fast_forward(0, most, end=False)]
    assert tokens[-1] == VOCAB  # the grammar's own <|end|>
    assert tokenizer.decode(tokens[:-1], skip_special_tokens=True) == f"{text}y"


def test_end_tokens_that_the_model_lacks_are_ignored() -> None:
    assert keep_known((-1, 3, 2, 300), 300) == (3, 2)
    constraints = Constraints(GrammarCompiler(TOKENIZER_JSON, VOCAB, (END,)), VOCAB)
    banned = [VOCAB, END, 2**32 - 1]
    constraints.start(SequenceStart(row=0, tokens=[0], prompt_length=1, min_new_tokens=3, end_token_ids=banned))
    masks = constraints.begin([0], [1])
    assert masks is not None
    assert np.flatnonzero(masks.apply(torch.zeros(1, VOCAB))[0].isneginf()).tolist() == [END]


def test_tokens_without_an_embedding_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    compare({"a": 0, "b": 1}, 2)
    assert not caplog.records
    compare({"a": 0, "<tool>": 2, "[PAD]": 3}, 2)
    assert "has 2 tokens without a row in the embedding (2 rows): '<tool>' (2), '[PAD]' (3)" in caplog.text


@pytest.mark.parametrize(
    ("grammar", "matches"),
    [
        (DATE, re.compile(r"[12][0-9]{3}-[01][0-9]").fullmatch),
        (Grammar(kind=GRAMMAR_KIND_REGEX, text=r'[a-c]\/"/é\n?'), re.compile(r'[a-c]/"/é\n?').fullmatch),
        (Grammar(kind=GRAMMAR_KIND_LARK, text='start: "yes" | "no" | "jé"'), {"yes", "no", "jé"}.__contains__),
        (Grammar(kind=GRAMMAR_KIND_LARK, text='start: "(" start ")" | "x"'), re.compile(r"\(*x\)*").fullmatch),
        (
            Grammar(kind=GRAMMAR_KIND_LARK, text='root ::= [a-c] "-" tail\ntail ::= "z" | "zz"'),
            re.compile("[a-c]-zz?").fullmatch,
        ),
        (
            Grammar(kind=GRAMMAR_KIND_LARK, text='  ?start: word mark\n  ?word: /[yn]/\n  !mark: "?"'),
            re.compile(r"[yn]\?").fullmatch,
        ),
        (
            Grammar(kind=GRAMMAR_KIND_LARK, text=r'root ::= "\u00e9\\u00e9" [\u4e00-\u4e03] "\U0001F600" "\u0041"'),
            re.compile(r"é\\u00e9[一-七]😀A").fullmatch,
        ),
    ],
    ids=["regex", "regex with slashes", "choice", "lark", "gbnf", "lark for parsers", "gbnf with escapes"],
)
def test_sampled_texts_match_the_grammar(
    compiler: GrammarCompiler, grammar: Grammar, matches: Callable[[str], object]
) -> None:
    answers = {sample(constrained(compiler, grammar), Random(seed)) for seed in range(20)}
    assert len(answers) > 1
    assert all(answer is not None and matches(answer) for answer in answers)


THINK = Thoughts(openings=["<think>"], closings=["</think>"])
THINKING = Thoughts(openings=["<think>"], closings=["</think>"], begun=True)
GRANITE = Thoughts(openings=["Here's my thought:"], closings=["Here is my response:", "Here's my response:"])
HARMONY = Thoughts(openings=["<|channel|>analysis"], closings=["<|end|>"], before_answer="<|channel|>final")


@pytest.mark.parametrize("special", [(), ("<think>", "</think>", "<|channel|>", "<|end|>")])
@pytest.mark.parametrize(
    ("thoughts", "begun"),
    [
        (THINK, "<think>\nWhat is 1999-01? A date.</think>\n\n"),
        (THINK, ""),
        (THINKING, "1999-01 < 2000 </thin </think>"),
        (THINKING, "\n<think>a</think>"),
        (GRANITE, "Here's my thought: it is 1/2. Here's my response: "),
        (HARMONY, "<|channel|>analysis a date<|end|><|channel|>final"),
        (HARMONY, "<|channel|>fin"),
    ],
)
def test_a_format_begins_after_free_thoughts(special: tuple[str, ...], thoughts: Thoughts, begun: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(special), special_tokens=True)
    rows = VOCAB + len(special)
    constraints = Constraints(GrammarCompiler(tokenizer.backend_tokenizer.to_str().encode(), rows, (END,)), rows)
    of_answers = tokenizer.encode("0123456789-!")
    document = Grammar(kind=GRAMMAR_KIND_JSON_SCHEMA, text='{"const": 1}')
    listed = Grammar(kind=GRAMMAR_KIND_LARK, text='start: schema_0 "!"', schemas=['{"const": 1}'])
    for answer, pattern in ((DATE, DATE.text), (document, "1"), (listed, "1!")):
        grammar = Grammar(kind=answer.kind, text=answer.text, schemas=answer.schemas, thoughts=thoughts)
        tokens = tokenizer.encode(begun)
        constraints.start(SequenceStart(row=0, tokens=[0, *tokens], prompt_length=1, grammar=grammar))
        while (token := one_of_allowed(constraints, len(tokens), rows, of_answers)) != END:
            tokens.append(token)
        assert re.fullmatch(re.escape(begun) + r"\D*" + pattern, tokenizer.decode(tokens))


def test_two_hundred_schemas_each_give_a_valid_document(compiler: GrammarCompiler) -> None:
    for seed in range(200):
        random = Random(seed)
        content = random_document_schema(random)
        answer = sample(constrained(compiler, schema(**content)), random)
        assert answer is not None, content
        jsonschema.Draft202012Validator(content).validate(json.loads(answer))


@pytest.mark.parametrize(
    "content",
    [
        {"type": "string", "format": "password", "maxLength": 4.0},
        {"type": "object", "additionalProperties": {"const": 1}, "propertyNames": {"enum": ["a", "b"]}},
        {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": PERSON_NAME, "b": PERSON_AGE}},
    ],
)
def test_schemas_as_programs_write_them_are_enforced(compiler: GrammarCompiler, content: dict[str, object]) -> None:
    answers = {sample(constrained(compiler, schema(**content)), Random(seed)) for seed in range(10)}
    for answer in answers:
        assert answer is not None
        jsonschema.validate(json.loads(answer), content)


def test_the_minimum_length_forbids_the_end_tokens_until_it_is_reached(compiler: GrammarCompiler) -> None:
    constraints = Constraints(compiler, VOCAB)
    constraints.start(SequenceStart(row=4, tokens=[1, 2, 3], prompt_length=2, min_new_tokens=3, end_token_ids=[END, 7]))
    constraints.start(SequenceStart(row=5, tokens=[1, 2], prompt_length=2, grammar=DATE))
    masks = constraints.begin([4, 1, 5], [4, 4, 2])
    assert masks is not None
    allowed = masks.apply(torch.zeros(3, VOCAB)).isfinite().numpy()
    assert np.flatnonzero(~allowed[0]).tolist() == [7, END]
    assert allowed[1].all()
    assert TOKENIZER.decode(np.flatnonzero(allowed[2]).tolist()) == "12"
    alone = constraints.begin([4], [4])
    assert alone is not None
    assert np.flatnonzero(~alone.apply(torch.zeros(1, VOCAB)).isfinite().numpy()[0]).tolist() == [7, END]
    assert constraints.begin([4, 1], [5, 4]) is None


def test_end_tokens_are_only_banned_where_the_grammar_allows_something_else(compiler: GrammarCompiler) -> None:
    short_or_long = Grammar(kind=GRAMMAR_KIND_REGEX, text="a(bc)?")
    for options in ({"min_new_tokens": 9, "end_token_ids": [END]}, {"unwanted_token_ids": [END]}):
        answers = {sample(constrained(compiler, short_or_long, **options), Random(seed)) for seed in range(9)}
        assert answers == {"abc"}


def test_only_allowed_tokens_are_sampled_and_bad_words_are_not(compiler: GrammarCompiler) -> None:
    a, b, c, four = TOKENIZER.encode("abc4")
    words = [BadWord(tokens=word) for word in ([c], [a, b], [b, b, a], [VOCAB + 5])]
    constraints = Constraints(compiler, VOCAB)
    start = SequenceStart(row=0, tokens=[a, b, b], prompt_length=1, allowed_token_ids=[a, b, c, VOCAB + 5])
    start.bad_words.extend(words)
    constraints.start(start)
    found = [b, b]
    for expected in ([b], [b], [b]):  # a would complete "bba"
        assert allowed_in(constraints, 0, 1 + len(found)) == expected
        constraints.accept([0], expected)
        found += expected
    constraints.accept([0], [a])
    assert allowed_in(constraints, 0, 5) == [a]  # neither "ab" nor "c"
    forced = Grammar(kind=GRAMMAR_KIND_REGEX, text="4(5|6)")
    start = SequenceStart(row=0, tokens=[a], prompt_length=1, grammar=forced, allowed_token_ids=[b])
    start.bad_words.append(BadWord(tokens=[four]))
    constraints.start(start)
    assert allowed_in(constraints, 0, 1) == [four]  # the grammar allows nothing else
    constraints.start(SequenceStart(row=0, tokens=[a], prompt_length=1))
    assert constraints.begin([0], [1]) is None


def allowed_in(constraints: Constraints, row: int, length: int) -> list[int]:
    masks = constraints.begin([row], [length])
    assert masks is not None
    return np.flatnonzero(masks.apply(torch.zeros(1, VOCAB)).isfinite().numpy()[0]).tolist()


def test_a_row_forgets_its_former_sequences_constraints(compiler: GrammarCompiler) -> None:
    constraints = constrained(compiler, DATE, min_new_tokens=9, end_token_ids=[END])
    constraints.start(SequenceStart(row=0, tokens=[1], prompt_length=1))
    assert constraints.begin([0], [1]) is None
    assert not constraints.failed([0]).any()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = save_model(tmp_path_factory.mktemp("bytes"))
    return load(directory, max_model_len=512)


@pytest.fixture
def runner(decoder: Decoder, compiler: GrammarCompiler, tmp_path: Path) -> Runner:
    adapters = AdapterStore(decoder.layouts, torch.float32, CPU, BaseModel("LlamaForCausalLM"), [LocalSource(tmp_path)])
    return Runner(decoder, decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE), adapters, Group(0, 1), 8, 512, CPU, compiler)


def text_of(planner: Planner, row: int) -> str:
    """The tokens before the end token, which must exist."""
    outputs = planner.rows[row].outputs
    return TOKENIZER.decode(outputs[: outputs.index(END)])


def test_constrained_sequences_match_and_their_neighbours_do_not_change(runner: Runner) -> None:
    prompt = TOKENIZER.encode("The answer is ")
    alone, mixed = Planner(), Planner()
    alone.start(1, prompt, sampling=RANDOM)
    alone.run(runner.step, {1: len(prompt)})
    alone.decode(runner.step, [1], 60)
    runner.clear()
    mixed.start(0, prompt, sampling=RANDOM, grammar=PERSON)
    mixed.start(1, prompt, sampling=RANDOM)
    mixed.start(2, prompt, grammar=DATE)
    mixed.run(runner.step, {0: 3, 1: len(prompt), 2: len(prompt)})
    mixed.run(runner.step, {0: len(prompt) - 3, 1: 1, 2: 1})
    mixed.decode(runner.step, [0, 1, 2], 59)
    jsonschema.validate(json.loads(text_of(mixed, 0)), json.loads(PERSON.text))
    assert re.fullmatch(DATE.text, text_of(mixed, 2))
    assert mixed.rows[1].outputs == alone.rows[1].outputs


def test_fast_forward_tokens_come_with_the_sampled_token_and_are_computed_as_one_chunk(runner: Runner) -> None:
    prompt = TOKENIZER.encode("Who?")
    planner = Planner()
    planner.start(0, prompt, sampling=RANDOM, grammar=PERSON)
    planner.start(1, prompt, sampling=RANDOM, logprobs=True, top_logprobs=2)
    response = planner.run(runner.step, {0: 4, 1: 4})
    assert TOKENIZER.decode(planner.rows[0].outputs) == '{"name": "'
    assert list(response.token_counts) == [len('{"name": "'), 1]
    assert list(response.alternative_counts) == [*[0] * len('{"name": "'), 2]
    assert [bool(value) for value in response.logprobs] == [True, *[False] * 9, True]
    planner.decode(runner.step, [0, 1], 1)
    assert len(planner.rows[0].outputs) == len('{"name": "') + 1


def test_fast_forward_tokens_that_the_next_plan_did_not_know_change_nothing(runner: Runner) -> None:
    prompt = TOKENIZER.encode("Who?")
    told, ahead = Planner(), Planner()
    told.start(0, prompt, sampling=RANDOM, grammar=PERSON)
    told.run(runner.step, {0: 4})
    told.decode(runner.step, [0], 5)
    runner.clear()
    ahead.start(0, prompt, sampling=RANDOM, grammar=PERSON)
    plans = [ahead.plan({0: 4}), ahead.plan({0: 1})]
    responses = [runner.step(plan) for plan in plans]
    assert [list(response.token_counts) for response in responses] == [[10], [0]]
    for plan, response in zip(plans, responses, strict=True):
        ahead.read(plan, response)
    ahead.rows[0].known -= 1  # the second plan's sample, which did not arrive
    ahead.decode(runner.step, [0], 5)
    assert ahead.rows[0].outputs == told.rows[0].outputs


@pytest.mark.parametrize("ahead", [0, 1])
def test_fast_forward_tokens_come_with_logprobs_if_requested(runner: Runner, ahead: int) -> None:
    prompt = TOKENIZER.encode("Who?")
    plain, scored, whole = Planner(), Planner(), Planner()
    plain.start(0, prompt, sampling=RANDOM, grammar=PERSON)
    plain.run(runner.step, {0: 4})
    plain.decode(runner.step, [0], 40)
    runner.clear()
    scored.start(0, prompt, sampling=RANDOM, grammar=PERSON, logprobs=True, top_logprobs=1)
    plans = [scored.plan({0: 4}), *[scored.plan({0: 1}) for _ in range(ahead)]]
    responses = [runner.step(plan) for plan in plans]
    for plan, response in zip(plans, responses, strict=True):
        scored.read(plan, response)
    scored.rows[0].known -= ahead  # the second plan's sample, which did not arrive
    assert [list(response.token_counts) for response in responses] == [[1]] * (1 + ahead)
    assert list(responses[0].unscored_counts) == [len('"name": "')]
    while END not in scored.rows[0].outputs:
        responses.append(scored.run(runner.step, {0: scored.rows[0].known - scored.rows[0].computed}))
    outputs, length = scored.rows[0].outputs, len(scored.rows[0].outputs)
    assert outputs == plain.rows[0].outputs[:length] and len(responses) < length
    whole.start(1, [*prompt, *outputs], prompt_logprobs=True)
    expected = whole.run(runner.step, {1: 4 + length}).prompt_logprobs[3:]
    logprobs = [value for response in responses for value in response.logprobs]
    best = [value for response in responses for value in response.alternative_logprobs]
    assert logprobs == pytest.approx(expected, abs=1e-4)
    assert len(best) == length and all(top >= own for own, top in zip(logprobs, best, strict=True))


def test_a_preempted_sequence_gets_the_logprobs_that_were_announced(runner: Runner) -> None:
    prompt = TOKENIZER.encode("Who?")
    planner = Planner()
    planner.start(0, prompt, sampling=RANDOM, grammar=PERSON, logprobs=True)
    first = planner.run(runner.step, {0: 4})
    outputs = [*first.tokens, *first.unscored_tokens]
    planner.release(0)
    options = {"sampling": RANDOM, "grammar": PERSON, "logprobs": True, "unscored": len(first.unscored_tokens)}
    planner.start(6, prompt, outputs=outputs, **options)
    again = planner.plan({6: 4 + len(outputs)})
    response = runner.step(again)
    assert list(response.tokens)[:-1] == list(first.unscored_tokens)
    assert len(response.logprobs) == len(response.tokens) and all(value < 0 for value in response.logprobs)


def test_fast_forward_tokens_stay_within_the_context(runner: Runner) -> None:
    planner = Planner()
    planner.start(0, [1] * 508, grammar=PERSON)
    assert list(planner.run(runner.step, {0: 508}).token_counts) == [4]


def test_a_preempted_sequence_continues_in_its_grammar(runner: Runner) -> None:
    prompt = TOKENIZER.encode("Who?")
    undisturbed, preempted = Planner(), Planner()
    undisturbed.start(0, prompt, sampling=RANDOM, grammar=PERSON)
    undisturbed.run(runner.step, {0: 4})
    undisturbed.decode(runner.step, [0], 50)
    runner.clear()
    preempted.start(0, prompt, sampling=RANDOM, grammar=PERSON)
    preempted.run(runner.step, {0: 4})
    preempted.decode(runner.step, [0], 11)
    outputs = preempted.rows[0].outputs
    preempted.release(0)
    preempted.start(6, prompt, outputs=outputs, sampling=RANDOM, grammar=PERSON)
    preempted.run(runner.step, {6: 4 + len(outputs)})
    preempted.decode(runner.step, [6], 50)
    assert text_of(preempted, 6) == text_of(undisturbed, 0)


def test_a_sequence_whose_output_violates_its_grammar_is_the_only_one_that_fails(runner: Runner) -> None:
    planner = Planner()
    planner.start(0, [1, 2], outputs=[3, 4], grammar=DATE)
    planner.start(1, [1, 2])
    response = planner.run(runner.step, {0: 4, 1: 2})
    assert (list(response.token_counts), list(response.failed_chunks)) == ([0, 1], [0])
    assert list(response.failure_reasons) == [FAILURE_REASON_GRAMMAR]
