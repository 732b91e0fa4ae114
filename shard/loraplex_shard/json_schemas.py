"""Makes a JSON schema as narrow as its author most likely meant it."""

import json
from collections.abc import Callable, Iterator
from typing import Any

MAPS = {"properties", "$defs", "definitions"}  # of schemas
# With one of these an object may be described in several places, none of which may forbid the others' properties.
COMBINING = {"allOf", "if", "not", "dependentSchemas", "$dynamicRef"}
COMBINING_WITH_PROPERTIES = {"anyOf", "oneOf", "$ref"}
SAID = {"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"}
VALUES = {"const", "enum", "default", "examples"}

Schema = dict[str, Any]


def close_objects(text: str) -> str:
    """The schema with no other properties than those it names in an object, wherever it does not say whether there may
    be more: models, small ones above all, would go on adding some. What fits the result fits the schema.

    Left as it is where objects may be described by several schemas together, or if it is no JSON.
    """
    try:
        schema = json.loads(text)
    except ValueError:
        return text
    combined = any(
        COMBINING & node.keys() or (COMBINING_WITH_PROPERTIES & node.keys() and "properties" in node)
        for node in _nodes(schema)
    )
    return text if combined else json.dumps(_closed(schema), ensure_ascii=False)


def _closed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    closed = {key: _mapped(_closed, key, value) for key, value in node.items()}
    properties, required = node.get("properties"), node.get("required", ())
    if isinstance(properties, dict) and not SAID & node.keys() and all(name in properties for name in required):
        closed["additionalProperties"] = False
    return closed


def _mapped(change: Callable[[Any], Any], key: str, value: Any) -> Any:
    """What a schema says with a keyword, with a change made to each schema in it."""
    if key in VALUES:
        return value
    if key in MAPS and isinstance(value, dict):
        return {name: change(part) for name, part in value.items()}
    return [change(part) for part in value] if isinstance(value, list) else change(value)


def _nodes(node: Any) -> Iterator[Schema]:
    """A schema and all schemas in it."""
    if isinstance(node, dict):
        yield node
        for key, value in node.items():
            parts = list[Any]()
            _mapped(parts.append, key, value)
            for part in parts:
                yield from _nodes(part)
