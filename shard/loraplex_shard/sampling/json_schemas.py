"""JSON schemas as the grammar compiler is to read them: slips mended that are usual, and as narrow as their authors
most likely meant them."""

import json
import re
from collections.abc import Set
from fractions import Fraction
from math import isfinite, lcm
from typing import Any
from urllib.parse import quote

from loraplex_shard.sampling.endless_schemas import endless_references
from loraplex_shard.sampling.property_names import name_properties
from loraplex_shard.sampling.schema_tree import Schema, change_parts, nodes

# With one of these an object may be described in several places, none of which may forbid the others' properties.
COMBINING = {"if", "not", "dependentSchemas", "$dynamicRef"}
COMBINING_WITH_PROPERTIES = {"anyOf", "oneOf", "allOf", "$ref"}
SAID = {"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"}

DIALECTS = re.compile(r"https?://json-schema\.org/(draft-0[3467]/schema|draft/20\d\d-\d\d/schema)#?")
IN_REFERENCES = "%/?#:@!$&'()*+,;=~"  # what need not be percent-encoded, besides letters and digits of ASCII
COMBINATIONS = {"allOf", "anyOf", "oneOf"}
NULLS = {"const", "default"}  # null means something
COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
MOST_REMAINDERS = 10_000  # a fifth of a second
NOTHING = {"enum": list[Any]()}  # fits no document

# The formats that the compiler knows. JSON Schema takes any other for a remark.
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown"}
UUID_VERSION = re.compile("uuid[1-8]")  # as pydantic calls it


def read_schema(text: str) -> Schema:
    """The schema, which refers to nothing outside of it. What fits the result fits what was written.

    Raises ValueError if it is not a JSON object, if no document fits it because it leads to itself without end, or if
    it would take very long to compile.
    """
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError("it is not a JSON object")
    _check_multiples(schema)
    schema = name_properties(_tidied(schema))
    endless = endless_references(schema)
    if id(schema) in endless:
        raise ValueError("no finite document can match: $ref leads back to itself without end")
    return close_objects(_ending(schema, endless))


def _check_multiples(schema: Schema) -> None:
    """The compiler keeps a state for each remainder, but where the last digits tell it, and takes the square of their
    number; conditions on one number are multiplied."""
    given = [node["multipleOf"] for node in nodes(schema) if isinstance(node.get("multipleOf"), int | float)]
    if lcm(*map(_remainders, given)) > MOST_REMAINDERS:
        raise ValueError(f"multipleOf: without its factors of 2 and 5 it must be at most {MOST_REMAINDERS}")


def _remainders(multiple: float) -> int:
    if not isfinite(multiple) or not multiple:
        return 1  # the compiler refuses it
    rest = abs(Fraction(str(+multiple)).numerator)
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    return rest


def close_objects(schema: Schema) -> Schema:
    """The schema with no other properties than those it names in an object, wherever it does not say whether there may
    be more: models, small ones above all, would go on adding some.

    Left as it is where objects may be described by several schemas together.
    """
    return schema if any(_combines(node) for node in nodes(schema)) else _closed(schema)


def _combines(node: Schema) -> bool:
    """Whether it describes an object in several places. An allOf around one $ref, as programs write it to add a
    description, does not."""
    several = isinstance(parts := node.get("allOf"), list) and len(parts) > 1
    places = COMBINING_WITH_PROPERTIES & node.keys()
    return several or bool(COMBINING & node.keys()) or len(places) + ("properties" in node) > 1


def _closed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    closed = {key: change_parts(_closed, key, value) for key, value in node.items()}
    properties, required = node.get("properties"), node.get("required", [])
    named = isinstance(properties, dict) and isinstance(required, list) and all(name in properties for name in required)
    if named and not SAID & node.keys():
        closed["additionalProperties"] = False
    return closed


def _tidied(node: Any) -> Any:
    """Programs that write schemas write null or an empty list for what is absent, references that are not URIs, and the
    $schema of dialects that nobody defined."""
    if not isinstance(node, dict):
        return node
    tidied = Schema()
    for key, value in node.items():
        if key in ("$ref", "$id") and isinstance(value, str):
            tidied[key] = quote(value, safe=IN_REFERENCES)
        elif key == "$schema":
            if isinstance(value, str) and DIALECTS.fullmatch(value):
                tidied[key] = "http:" + value.partition(":")[2] if "/draft-0" in value else value
        elif key == "format" and isinstance(value, str):
            if (known := UUID_VERSION.sub("uuid", value)) in FORMATS:
                tidied[key] = known
        elif key in COUNTS and isinstance(value, float) and value.is_integer():
            tidied[key] = int(value)
        elif key in COMBINATIONS and value == []:
            continue
        elif value is not None or key in NULLS:
            tidied[key] = change_parts(_tidied, key, value)
    return tidied


def _ending(node: Any, endless: Set[int]) -> Any:
    """Without the references in `endless`: what needs one of them can be no part of a document."""
    if not isinstance(node, dict):
        return node
    ending = {key: change_parts(lambda part: _ending(part, endless), key, value) for key, value in node.items()}
    if id(node) in endless:
        del ending["$ref"]
        ending |= NOTHING
    return ending
