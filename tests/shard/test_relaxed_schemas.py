"""Schemas are compiled without the keywords that cannot be enforced, and nothing else is lost."""

import json
from random import Random
from typing import Any

import jsonschema
import pytest

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import InvalidRequestError
from loraplex_router.vocabulary.grammar import EmbeddedSchema, Grammar, GrammarKind
from loraplex_shard.sampling.relaxed_schemas import relax
from tests.shard.grammar_samples import constrained, create_compiler, sample

OBJECT = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
NUMBERS = {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}, "maxProperties": 2}
LOOK_AHEAD = "^(?=[ab]+$)a.*$"

RELAXED = [
    ({**OBJECT, "not": {"required": ["b"]}}, OBJECT, ["not"]),
    ({**OBJECT, "if": {}, "then": {"required": ["b"]}, "else": {}}, OBJECT, ["if", "then", "else"]),
    ({**OBJECT, "dependentRequired": {"a": ["b"]}}, OBJECT, ["dependentRequired"]),
    ({"type": "array", "items": OBJECT, "uniqueItems": True}, {"type": "array", "items": OBJECT}, ["uniqueItems"]),
    ({**NUMBERS, "propertyNames": {"maxLength": 3}}, NUMBERS, ["propertyNames"]),
    ({"type": "string", "pattern": LOOK_AHEAD, "maxLength": 4}, {"type": "string", "maxLength": 4}, ["pattern"]),
    (
        {"type": "object", "patternProperties": {LOOK_AHEAD: {"const": 1}, "^b": {}}, "additionalProperties": False},
        {"type": "object", "patternProperties": {"^b": {}}, "additionalProperties": {"const": 1}},
        ["patternProperties"],
    ),
    ({"properties": {"not": OBJECT, "if": {"const": {"not": 1}}}}, None, []),
    ({**OBJECT, "uniqueItems": False, "propertyNames": {}, "dependentRequired": {}}, OBJECT, []),
]


@pytest.mark.parametrize(("schema", "relaxed", "left_out"), RELAXED)
def test_only_what_cannot_be_enforced_is_left_out(
    schema: dict[str, Any], relaxed: dict[str, Any] | None, left_out: list[str]
) -> None:
    assert relax(schema, lambda pattern: "(?" not in pattern) == (relaxed or schema, left_out)


@pytest.mark.parametrize(("schema", "relaxed", "left_out"), RELAXED)
def test_answers_match_the_rest_and_the_keywords_are_told(
    schema: dict[str, Any], relaxed: dict[str, Any] | None, left_out: list[str]
) -> None:
    compiler = create_compiler()
    grammar = pb.Grammar(kind=pb.GRAMMAR_KIND_JSON_SCHEMA, text=json.dumps(schema))
    told = [pb.UnenforcedSchema(field="grammar", keywords=left_out)] if left_out else []
    assert compiler.unenforced(grammar) == told
    for seed in range(3):
        text = sample(constrained(compiler, grammar), Random(seed))
        if text is not None:
            jsonschema.validate(json.loads(text), relaxed or schema)


def test_one_of_many_tools_is_relaxed_alone() -> None:
    schemas = [json.dumps(OBJECT), json.dumps({**OBJECT, "not": {"required": ["b"]}})]
    grammar = pb.Grammar(kind=pb.GRAMMAR_KIND_LARK, text="start: schema_0 | schema_1", schemas=schemas)
    (found,) = create_compiler().unenforced(grammar)
    assert (found.field, found.keywords) == ("grammar.schemas[1]", ["not"])


def test_a_strict_schema_is_refused_with_its_owner_and_the_keywords() -> None:
    lax, strict = (EmbeddedSchema("{}", f"tools[{at}]", f"of 'f{at}' ", strict=bool(at)) for at in range(2))
    grammar = Grammar(GrammarKind.LARK, "", (lax, strict))
    assert grammar.unenforced("grammar.schemas[0]", ["not"]) == (
        "tools[0] of 'f0' has keywords that are not enforced: not"
    )
    with pytest.raises(InvalidRequestError, match=r"tools\[1\]: of 'f1' is strict, .* cannot be enforced: not, if"):
        grammar.unenforced("grammar.schemas[1]", ["not", "if"])
    with pytest.raises(InvalidRequestError, match="response_format: is strict"):
        Grammar.json_schema("{}", "response_format", strict=True).unenforced("grammar", ["not"])
