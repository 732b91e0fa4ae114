"""How schemas are changed for the compiler: what is closed, corrected or left out, and what is unchanged."""

import json

import jsonschema
import pytest
from jsonschema.exceptions import ValidationError

from loraplex_shard.sampling.json_schemas import close_objects, read_schema

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
        ({"allOf": [NAMED], "title": "described"}, {"allOf": [CLOSED], "title": "described"}),
    ],
)
def test_objects_have_only_the_properties_that_they_name(schema: dict[str, object], closed: object) -> None:
    assert close_objects(schema) == closed


@pytest.mark.parametrize(
    "schema",
    [
        CLOSED,
        {**NAMED, "additionalProperties": True},
        {**NAMED, "required": ["b"]},
        {**NAMED, "patternProperties": {"^x": {}}},
        {"allOf": [NAMED, {"properties": {"b": {}}}]},
        {**NAMED, "anyOf": [{"properties": {"b": {}}}]},
        {**NAMED, "allOf": [{"properties": {"b": {}}}]},
        {"anyOf": [NAMED], "$ref": "#/$defs/x"},
        {"type": "object"},
        {"enum": [NAMED]},
    ],
)
def test_schemas_that_say_more_or_are_combined_are_unchanged(schema: dict[str, object]) -> None:
    assert close_objects(schema) == schema


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"$ref": "#/$defs/Page[größe 1]"}, {"$ref": "#/$defs/Page%5Bgr%C3%B6%C3%9Fe%201%5D"}),
        ({"$ref": "#/$defs/a~1b%20c"}, {"$ref": "#/$defs/a~1b%20c"}),
        (
            {"$schema": "https://json-schema.org/draft-07/schema#"},
            {"$schema": "http://json-schema.org/draft-07/schema#"},
        ),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema"},) * 2,
        ({"$schema": "https://example.com/our-dialect"}, {}),
        ({"required": None, "enum": None, "properties": None, "description": None}, {}),
        ({"anyOf": [], "oneOf": [], "allOf": [], "type": "string"}, {"type": "string"}),
        ({"const": None, "default": None, "enum": [None]},) * 2,
        ({"format": "int32"}, {}),
        ({"format": "uuid4", "minLength": 1.0}, {"format": "uuid", "minLength": 1}),
        ({"format": "date", "maxItems": 1.5, "const": 1.0},) * 2,
        (
            {"properties": {"$ref": {"$ref": "# 1"}}, "minProperties": 0},
            {"properties": {"$ref": {"$ref": "#%201"}}, "minProperties": 0},
        ),
    ],
)
def test_common_mistakes_are_corrected(written: dict[str, object], read: dict[str, object]) -> None:
    assert read_schema(json.dumps(written)) == read


COLORS = {"$defs": {"color": {"type": "string", "enum": ["red", "dark.blue", 7]}}}
NUMBERS = {"type": "object", "additionalProperties": {"type": "integer"}}


INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    ("names", "enforced"),
    [
        ({"pattern": "^a"}, {"patternProperties": {"^a": INTEGER}}),
        ({"type": "string", "const": "a", "title": "Letter"}, {"properties": {"a": INTEGER}}),
        ({"$ref": "#/$defs/color"}, {"properties": {"red": INTEGER, "dark.blue": INTEGER}}),
    ],
)
def test_property_names_are_enforced(names: dict[str, object], enforced: dict[str, object]) -> None:
    read = read_schema(json.dumps({**NUMBERS, **COLORS, "propertyNames": names}))
    assert read == {**NUMBERS, **COLORS, **enforced, "additionalProperties": False}


def test_property_names_of_type_string_need_no_enforcement() -> None:
    assert read_schema(json.dumps({**NUMBERS, "propertyNames": {"type": "string"}})) == NUMBERS
    assert read_schema(json.dumps({**NAMED, "propertyNames": {}})) == CLOSED


@pytest.mark.parametrize(
    "names", [{"maxLength": 3}, {"pattern": "^a", "maxLength": 3}, {"$ref": "#/none"}, {"enum": []}, False]
)
def test_unsupported_property_names_are_left_to_the_compiler(names: object) -> None:
    assert read_schema(json.dumps({**NUMBERS, "propertyNames": names})) == {**NUMBERS, "propertyNames": names}
    named = {**NAMED, "propertyNames": {"pattern": "^a"}}
    assert read_schema(json.dumps(named)) == named


def test_property_names_are_listed_up_to_a_length() -> None:
    read = read_schema(json.dumps(nested_names(12)))
    assert len(json.dumps(read)) < 200_000 and read["propertyNames"]  # the compiler refuses it


def nested_names(depth: int) -> dict[str, object]:
    names = {"enum": [str(name) for name in range(1000)]}
    return {"propertyNames": names, "additionalProperties": nested_names(depth - 1) if depth else {"type": "integer"}}


SELF = {"$ref": "#"}
ENDLESS = [
    SELF,
    {"anyOf": [SELF]},
    {"allOf": [{"type": "object"}, SELF]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "object", "properties": {"next": SELF}, "required": ["next"]},
    {"$anchor": "top", "type": "object", "properties": {"next": {"$ref": "#top"}}, "required": ["next"]},
    {"$id": "http://a/b", "type": "array", "items": {"$ref": "http://a/b"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "null"}, SELF], "minItems": 2},
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_infinite_recursion_is_refused(schema: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="without end"):
        read_schema(json.dumps(schema))


@pytest.mark.parametrize("endless", ENDLESS[1:])
def test_optional_parts_with_infinite_recursion_are_left_out(endless: dict[str, object]) -> None:
    inner = {**endless, "$id": "http://inner/schema"}
    schema = {"type": "object", "properties": {"a": {"anyOf": [inner, {"type": "null"}]}, "b": inner}}
    read = read_schema(json.dumps(schema).replace("http://a/b", "http://inner/schema"))
    for document in ({}, {"a": None}):
        jsonschema.validate(document, read)
    with pytest.raises(ValidationError):  # and does not raise RecursionError
        jsonschema.validate({"b": {"next": 1}}, read)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": SELF}},
        {"type": "object", "properties": {"next": {"anyOf": [SELF, {"type": "null"}]}}, "required": ["next"]},
        {"properties": {"next": SELF}, "required": ["next"]},  # "a", 1, null, ... are also valid
        {"type": "array", "items": SELF},
        {"type": "array", "items": SELF, "minItems": 0},
        {"anyOf": [{"type": "string"}, {"type": "array", "items": SELF, "minItems": 2}]},
        {"$ref": "#/$defs/missing"},
        {"$ref": "http://elsewhere/schema"},
        {"$id": "urn:a:b", "$ref": "#/$defs/c", "$defs": {"c": {"$id": "d", "$ref": "#/$defs/e", "$defs": {"e": {}}}}},
    ],
)
def test_finite_recursion_is_kept(schema: dict[str, object]) -> None:
    assert {**read_schema(json.dumps(schema)), "additionalProperties": 0} == {**schema, "additionalProperties": 0}


@pytest.mark.parametrize("text", ['{"type": "str', "[]", "true", '"object"'])
def test_a_schema_that_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_schema(text)


@pytest.mark.parametrize("multiple", [1234567, 999983, 7919.0 * 7907, 0.1234567])
def test_multiples_that_take_minutes_to_compile_are_refused(multiple: float) -> None:
    with pytest.raises(ValueError, match="multipleOf"):
        read_schema(json.dumps({"type": "array", "items": {"type": "number", "multipleOf": multiple}}))


def test_multiples_of_one_number_count_together() -> None:
    parts = [{"type": "integer", "multipleOf": prime} for prime in (97, 89, 83)]
    read_schema(json.dumps({"allOf": parts[:2]}))
    with pytest.raises(ValueError, match="multipleOf"):
        read_schema(json.dumps({"allOf": parts}))


@pytest.mark.parametrize("multiple", [1, 5, 0.01, 0.25, 60, 3600, 86400, 1024, 10**9, 2**40, 0, True, 1e300])
def test_common_multiples_are_compiled(multiple: float) -> None:
    assert read_schema(json.dumps({"type": "number", "multipleOf": multiple}))["multipleOf"] == multiple
