"""Forced tool calls: from the schemas of a request's tools to the allowed texts."""

import json
import re
from random import Random
from typing import Any

import jsonschema
import pytest

from loraplex_protos.errors import InvalidRequestError
from loraplex_protos.shard_pb2 import Grammar as ShardGrammar
from loraplex_router.text.tool_calls import Arguments, ToolCall, ToolCallParser
from loraplex_router.text.tool_grammar import list_of_calls, one_call, read_parameters
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_shard.sampling.grammars import GrammarCompiler
from tests.random_schemas import random_tool_schema
from tests.shard.grammar_samples import constrained, create_compiler, sample

Tools = dict[str, dict[str, Any] | None]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return create_compiler()


def encode(grammar: Grammar) -> ShardGrammar:
    kind: Any = grammar.kind.value
    return ShardGrammar(kind=kind, text=grammar.text, schemas=[schema.text for schema in grammar.schemas])


def answers(compiler: GrammarCompiler, grammar: Grammar, random: Random) -> str | None:
    return sample(constrained(compiler, encode(grammar)), random)


def forced(tools: Tools, several: bool) -> Grammar:
    read = [(name, read_parameters(given, name, f"tools[{at}]")) for at, (name, given) in enumerate(tools.items())]
    return list_of_calls(read, several, "tool_choice")


def read_calls(text: str, tools: Tools) -> list[tuple[str, Any]]:
    parser, calls = ToolCallParser(tools), list[tuple[str, str]]()
    for piece in [*parser.feed(text), *parser.flush()]:
        assert not isinstance(piece, str)
        match piece:
            case ToolCall(name):
                calls.append((name, ""))
            case Arguments(part):
                calls[-1] = calls[-1][0], calls[-1][1] + part
    return [(name, json.loads(arguments)) for name, arguments in calls]


def test_arguments_fit_the_called_tools_schema_whatever_the_others_define(
    compiler: GrammarCompiler,
) -> None:
    called = list[str]()
    for seed in range(60):
        random = Random(seed)
        tools: Tools = {name: random_tool_schema(random) for name in ("pizza", "car.2", "my-tool")}
        answer = answers(compiler, forced(tools, several=seed % 2 == 0), random)
        if answer is None:  # an endless list
            continue
        calls = read_calls(answer, tools)
        assert calls and (len(calls) == 1 or seed % 2 == 0)
        for name, arguments in calls:
            jsonschema.Draft202012Validator(tools[name]).validate(arguments)
            called.append(name)
    assert len(called) > 50 and set(called) == {"pizza", "car.2", "my-tool"}


def test_one_named_tool_is_called_once(compiler: GrammarCompiler) -> None:
    for seed in range(20):
        random = Random(seed)
        schema = random_tool_schema(random)
        answer = answers(compiler, one_call("pizza", read_parameters(schema, "pizza", "tools[0]"), "x"), random)
        assert answer is not None
        ((_, arguments),) = read_calls(answer, {"pizza": schema})
        jsonschema.Draft202012Validator(schema).validate(arguments)


NODE = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        (None, r"\{\}"),
        ({}, r"\{\}"),
        ({"type": "object", "properties": {}}, r"\{\}"),
        ({"properties": {"a": {"const": 1}}, "required": ["a"]}, r'\{"a": 1\}'),
        ({"type": ["object", "null"], "properties": {"a": {"const": 1}}}, r'\{("a": 1)?\}'),
        ({"type": "object", "properties": {"a": True, "b": False}, "required": ["a"]}, r'\{"a": .*\}'),
        ({"properties": {"$ref": {"const": 1}}, "required": ["$ref"]}, r'\{"\$ref": 1\}'),
        ({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}, r'(\{"next": )*(null|\{\})\}*'),
        (
            {"type": "object", "required": ["a"], "additionalProperties": {"const": 1}, "maxProperties": 1},
            r'\{"a": 1\}',
        ),
    ],
)
def test_a_tools_arguments_are_an_object(
    compiler: GrammarCompiler, parameters: dict[str, Any] | None, arguments: str
) -> None:
    for seed in range(5):
        answer = answers(compiler, forced({"f": parameters}, several=False), Random(seed))
        assert answer is None or re.fullmatch(
            r'\[\{"name": "f", "arguments": ' + arguments + r"\}\]", answer, re.DOTALL
        )


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"type": "object", "properties": {"a": {"type": "odd"}}}, "odd"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/Missing"}}}, "Missing"),
        ({"$ref": "#"}, "without end"),
        ({"type": "string"}, "object"),
    ],
)
def test_a_refusal_names_the_tool_and_the_keyword(
    compiler: GrammarCompiler, parameters: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        grammar = forced({"good": {"type": "object"}, "bad": parameters}, several=True)
        try:
            compiler.matcher(encode(grammar))
        except InvalidRequestError as error:
            raise grammar.refusal(error) from error
    (violation,) = refused.value.violations
    assert violation.field == "tools[1]" and "'bad'" in violation.description and reason in violation.description


def test_too_long_schemas_are_refused_by_their_tools_names() -> None:
    long, short = {"description": "x" * 40_000}, {"description": "x" * 30_000}
    (found,) = forced({"good": {}, "bad": long}, several=True).check()
    assert found.field == "tools[1]" and "'bad'" in found.description
    assert not list(forced({f"f{at}": short for at in range(8)}, several=True).check())
    (found,) = forced({f"f{at}": short for at in range(9)}, several=True).check()
    assert found.field == "tool_choice"
