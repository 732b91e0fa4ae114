"""Schemas made narrow: what is closed, and what is left alone."""

import json

import pytest

from loraplex_shard.json_schemas import close_objects

NAMED = {"type": "object", "properties": {"a": {"type": "string"}}}
CLOSED = {**NAMED, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (NAMED, CLOSED),
        ({"properties": {"properties": NAMED}}, {"properties": {"properties": CLOSED}, "additionalProperties": False}),
        ({"type": "array", "items": NAMED}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [NAMED, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$ref": "#/$defs/x", "$defs": {"x": NAMED}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED}}),
    ],
)
def test_objects_get_no_other_properties_than_they_name(schema: object, closed: object) -> None:
    assert json.loads(close_objects(json.dumps(schema))) == closed


@pytest.mark.parametrize(
    "schema",
    [
        CLOSED,
        {**NAMED, "additionalProperties": True},
        {**NAMED, "required": ["b"]},
        {**NAMED, "patternProperties": {"^x": {}}},
        {"allOf": [NAMED, {"properties": {"b": {}}}]},
        {**NAMED, "anyOf": [{"properties": {"b": {}}}]},
        {"type": "object"},
        {"enum": [NAMED]},
        True,
    ],
)
def test_what_says_more_or_is_combined_is_left_as_it_is(schema: object) -> None:
    assert json.loads(close_objects(json.dumps(schema))) == schema


def test_what_is_no_json_is_left_to_the_compiler() -> None:
    assert close_objects('{"type": "str') == '{"type": "str'
